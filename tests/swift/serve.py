"""A real S3 server on loopback: OpenStack Swift with its S3 API, in an environment of its own.

`python tests/swift/serve.py` prints one line of JSON (endpoint, access_key, secret_key, region) once the server
answers, and serves until its standard input closes or it is told to terminate. Nothing outlives it: the servers
are told by the kernel when it dies, and their data lie in a temporary folder.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / ".swift-venv"
CONSTRAINTS = HERE / "constraints.txt"
STORAGE = ("account", "container", "object")
ACCESS_KEY, SECRET_KEY, REGION = "histology:tests", "not-a-secret", "us-east-1"
START_TIMEOUT_S = 60
PR_SET_PDEATHSIG = 1


class ServerError(Exception):
    """The server cannot be installed or started."""


def install() -> Path:
    """Folder of the programs of the pinned Swift; installed if it is not there, by one process at a time."""
    ENVIRONMENT.mkdir(exist_ok=True)
    wanted = hashlib.sha256(CONSTRAINTS.read_bytes() + sys.version.encode()).hexdigest()
    stamp = ENVIRONMENT / "installed.sha256"
    with (ENVIRONMENT / ".lock").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            for entry in ENVIRONMENT.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                elif entry.name != ".lock":
                    entry.unlink()
            _checked([sys.executable, "-m", "venv", str(ENVIRONMENT)])
            pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input"]
            _checked([*pip, "--disable-pip-version-check", "--requirement", str(CONSTRAINTS)])
            stamp.write_text(wanted)
    return ENVIRONMENT / "bin"


def _checked(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        tail = "\n".join((finished.stdout + finished.stderr).splitlines()[-15:])
        raise ServerError(
            f"Swift {CONSTRAINTS.name} cannot be installed into {ENVIRONMENT}: {' '.join(command)} failed.\n{tail}\n"
            "The S3 tests need PyPI, or that folder from an earlier run."
        )


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nothing listens on just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def write_configuration(folder: Path, programs: Path) -> int:
    """Rings and configuration files of the four servers; returns the port of the proxy, which speaks S3."""
    *storage_ports, proxy_port = free_ports(len(STORAGE) + 1)
    (folder / "disks" / "disk").mkdir(parents=True)
    values = {"folder": folder, "user": pwd.getpwuid(os.getuid()).pw_name}
    storage = Template((HERE / "storage.conf.in").read_text())
    for service, port in zip(STORAGE, storage_ports, strict=True):
        (folder / f"{service}.conf").write_text(storage.substitute(values, service=service, port=port))
    account, user = ACCESS_KEY.split(":")
    keys = {"account": account, "tester": user, "secret": SECRET_KEY, "region": REGION, "port": proxy_port}
    (folder / "proxy.conf").write_text(Template((HERE / "proxy.conf.in").read_text()).substitute(values, **keys))
    shutil.copy(HERE / "swift.conf", folder)
    services = [f"{service}={port}" for service, port in zip(STORAGE, storage_ports, strict=True)]
    _checked([str(programs / "python"), str(HERE / "rings.py"), str(folder), *services])
    return proxy_port


@contextlib.contextmanager
def running(folder: Path, programs: Path) -> Iterator[str]:
    """The four servers; yields the endpoint once it answers, and stops them by their pids."""
    port = write_configuration(folder, programs)
    endpoint = f"http://127.0.0.1:{port}"
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for service in (*STORAGE, "proxy"):
            with (folder / f"{service}.log").open("wb") as log:
                servers.append(_start(programs, service, folder, log.fileno()))
        _wait(endpoint, servers, folder)
        yield endpoint
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _start(programs: Path, service: str, folder: Path, log: int) -> "subprocess.Popen[bytes]":
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        if sys.platform == "linux":
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    command = [str(programs / "python"), str(programs / f"swift-{service}-server"), str(folder / f"{service}.conf")]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "EVENTLET_NO_GREENDNS": "yes", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        [*command, "--verbose"],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,  # a Ctrl-C is for pytest, which then closes our standard input
        preexec_fn=die_with_parent,  # safe: this process has one thread
    )


def _wait(endpoint: str, servers: list["subprocess.Popen[bytes]"], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if any(server.poll() is not None for server in servers):
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{endpoint}/healthcheck", timeout=1) as answer:
            if answer.status == 200 and all(_listens(folder, service) for service in STORAGE):
                return
        time.sleep(0.05)
    logs = [f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(folder.glob("*.log"))]
    raise ServerError("Swift does not start.\n" + "\n".join(logs))


def _listens(folder: Path, service: str) -> bool:
    text = (folder / f"{service}.conf").read_text()
    port = next(int(line.split("=")[1]) for line in text.splitlines() if line.startswith("bind_port"))
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _tell(message: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Serve until the parent closes our standard input."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        programs = install()
        with tempfile.TemporaryDirectory(prefix="histoscale-swift-") as folder, running(Path(folder), programs) as url:
            _tell({"endpoint": url, "access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "region": REGION})
            sys.stdin.read()
    except ServerError as error:
        _tell({"error": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
