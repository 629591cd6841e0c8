"""A Ray head on this machine that is guarded by a token of its own and leaves nothing behind.

Ray listens on every interface for its own traffic, so the head runs in token mode: whoever has no token gets no
answer. The token lives in the environment of the head and of what is started through it, and dies with it.
"""

import atexit
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn, Self

from histoscale.errors import ClusterError

START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0
_LOOPBACK = "127.0.0.1"
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_PROC = Path("/proc")
# Settings of a cluster around us that would turn the head, or what talks to it, to another cluster.
_FOREIGN_SETTINGS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_HEADERS")


@dataclass(frozen=True)
class HeadSize:
    """What the head offers: logical CPUs (they need not be cores) and shared memory for blocks."""

    cpus: int
    object_store_bytes: int


class LocalHead:
    """A Ray head for as long as the `with` block lasts, its job server on 127.0.0.1.

    Leaving the block ends the head and everything that was started through it, also after Ctrl-C and SIGTERM.

    Args:
        size: What the head offers.
        environment: Environment of the head, hence of its jobs; that of this process by default.
        start_timeout_s: Seconds to wait for the job server.
        options: More words for `ray start`; of an option that is given twice, the last value holds.

    Raises:
        ClusterError: On entering, where the head ends at once or does not answer in time.
    """

    def __init__(
        self,
        size: HeadSize,
        environment: dict[str, str] | None = None,
        start_timeout_s: float = START_TIMEOUT_S,
        options: Sequence[str] = (),
    ) -> None:
        self._size = size
        self._options = options
        self._start_timeout_s = start_timeout_s
        self._token = secrets.token_hex(32)
        self._environment = _head_environment(dict(os.environ if environment is None else environment), self._token)
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._dashboard_port = 0

    @property
    def address(self) -> str:
        """Where the job server and the dashboard answer."""
        return f"http://{_LOOPBACK}:{self._dashboard_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment with which `ray job` reaches this head; holds its token."""
        return dict(self._environment)

    def __enter__(self) -> Self:
        # A signal that ends Python without unwinding would leave the head behind.
        self._previous_handler = signal.signal(signal.SIGTERM, _exit_on_signal)
        atexit.register(self.stop)
        try:
            self._start()
            self._wait_for_the_job_server()
        except BaseException:  # cleaned up and raised again
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        atexit.unregister(self.stop)
        signal.signal(signal.SIGTERM, self._previous_handler)

    def submit(self, entrypoint: Sequence[str], working_dir: Path, on_line: Callable[[str], None]) -> int:
        """Run a command as a job through the `ray job submit` CLI, and answer its exit status.

        Args:
            entrypoint: The job's command line, relative to `working_dir`.
            working_dir: The repository: sent along, with `jobs/runtime_env.yaml`.
            on_line: Takes each line of the CLI's output as it comes.
        """
        command = [*_RAY, "job", "submit", "--address", self.address, "--log-style=record", "--log-color=false"]
        command += ["--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml", "--", *entrypoint]
        with subprocess.Popen(
            command,
            cwd=working_dir,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                for line in process.stdout or ():
                    on_line(line.rstrip("\n"))
            except BaseException:  # cleaned up and raised again
                process.kill()
                raise
        return process.returncode

    def stop(self) -> None:
        """End the head and everything that was started through it; does nothing a second time."""
        process, self._process = self._process, None
        if process is not None:
            sessions = _sessions_below(process.pid)  # before the tree falls apart
            process.terminate()
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            _end_sessions(sessions)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        # Sockets below this folder must stay within the 107 bytes of a Unix socket's path.
        self._folder = Path(tempfile.mkdtemp(prefix="hs-", dir="/tmp"))
        gcs, self._dashboard_port, client, agent = _free_ports(4)
        command = [*_RAY, "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={self._folder}"]
        command += [f"--port={gcs}", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--dashboard-host={_LOOPBACK}", f"--dashboard-port={self._dashboard_port}"]
        command += [f"--num-cpus={self._size.cpus}", f"--object-store-memory={self._size.object_store_bytes}"]
        command += self._options
        with (self._folder / "head.log").open("wb") as log:
            # A session of its own: Ctrl-C in the terminal reaches us, and we end the head in order.
            self._process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_for_the_job_server(self) -> None:
        deadline_s = time.monotonic() + self._start_timeout_s
        while not self._answers():
            ended = self._process is None or self._process.poll() is not None
            if ended or time.monotonic() > deadline_s:
                raise ClusterError(
                    "the local Ray head " + ("ended at once" if ended else "does not answer"),
                    value=self._last_words(),
                    expected=f"a job server on {self.address} within {self._start_timeout_s:g} s",
                    remedy="free memory or processes on this machine and run the command again",
                )
            time.sleep(0.2)

    def _answers(self) -> bool:
        """Whether the job server answers and has a node to run jobs on: it is up before the node, which may fail."""
        request = urllib.request.Request(
            f"{self.address}/api/v0/nodes", headers={"Authorization": f"Bearer {self._token}"}
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=5.0) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
        except OSError:  # URLError and HTTPError are OSErrors
            return False
        return any(node["state"] == "ALIVE" for node in nodes)

    def _last_words(self) -> str:
        lines = (self._folder / "head.log").read_text(errors="replace").split("\n") if self._folder else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def _head_environment(environment: dict[str, str], token: str) -> dict[str, str]:
    for name in _FOREIGN_SETTINGS:
        environment.pop(name, None)
    for name in ("no_proxy", "NO_PROXY"):  # a company's proxy does not know our loopback
        environment[name] = ",".join(filter(None, [environment.get(name), _LOOPBACK]))
    # Jobs say `python`: it must be this one.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nobody takes over this head's work
    }
    return environment


def _exit_on_signal(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.socket() for _ in range(count)]
    try:
        for listener in listeners:
            listener.bind((_LOOPBACK, 0))
        return [listener.getsockname()[1] for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    session: int


def _processes() -> list[_Process]:
    """Every living process of this machine; empty where there is no /proc."""
    found = []
    for entry in _PROC.glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue  # it ended while we looked
        # The name in brackets may hold anything, so fields count from the last bracket on.
        state, parent, _, session, *_ = stat.rpartition(")")[2].split()
        if state != "Z":
            found.append(_Process(int(entry.name), int(parent), int(session)))
    return found


def _sessions_below(pid: int) -> set[int]:
    """Sessions of a process that leads one, and of all its descendants: a job's driver has one of its own."""
    sessions = {pid}
    table = _processes()
    while True:
        members = {process.pid for process in table if process.session in sessions}
        grown = sessions | {process.session for process in table if process.parent in members}
        if grown == sessions:
            return sessions
        sessions = grown


def _end_sessions(sessions: set[int]) -> None:
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    while time.monotonic() < deadline_s:
        left = [process.pid for process in _processes() if process.session in sessions]
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
