"""A local Ray head: it answers only to its token, runs jobs with this Python, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from histoscale.cluster.local import HeadSize, LocalHead
from histoscale.errors import ClusterError

SIZE = HeadSize(cpus=2, object_store_bytes=100_000_000)


def repository(folder: Path) -> Path:
    (folder / "jobs").mkdir()
    (folder / "jobs" / "runtime_env.yaml").write_text("env_vars: {HISTOSCALE_TEST: passed on}\n")
    (folder / "jobs" / "good.py").write_text(
        "import os, sys, ray\n"
        "ray.init(log_to_driver=False)\n"
        "print('answer', ray.get(ray.remote(lambda: 6 * 7).remote()), os.environ['HISTOSCALE_TEST'], sys.executable)\n"
    )
    (folder / "jobs" / "endless.py").write_text(
        "import subprocess\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "print('child', child.pid, flush=True)\n"
        "child.wait()\n"
    )
    (folder / "jobs" / "bad.py").write_text("import sys\nsys.stderr.write('error: planted\\n')\nsys.exit(2)\n")
    return folder


def living(pids: list[int]) -> list[int]:
    """Those that still run; one that only waits to be reaped by its parent has ended."""
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def relatives(marker: str) -> list[int]:
    """Processes whose command line names the head's folder, and their descendants."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(marker in word for word in process.info["cmdline"] or ()) and process.pid != os.getpid():
            found += [process.pid, *(child.pid for child in process.children(recursive=True))]
    return found


def test_head_answers_to_its_token_runs_jobs_and_leaves_nothing_behind(tmp_path: Path) -> None:
    root = repository(tmp_path)
    lines: list[str] = []
    child: list[int] = []

    def leave_once_the_child_runs(line: str) -> None:
        if line.startswith("child "):
            child.append(int(line.split()[1]))
            raise InterruptedError

    with LocalHead(SIZE) as head:
        folder = str(head._folder)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=10)
        assert head.submit(["python", "jobs/good.py"], root, lines.append) == 0
        assert f"answer 42 passed on {sys.executable}" in lines
        assert head.submit(["python", "jobs/bad.py"], root, lines.append) == 1
        assert "error: planted" in lines
        with pytest.raises(InterruptedError):
            head.submit(["python", "jobs/endless.py"], root, leave_once_the_child_runs)
        before = relatives(folder)
        assert len(living(child)) == 1
        assert len(living(before)) > 5
    assert living(before + child) == []
    assert relatives(folder) == []
    assert not Path(folder).exists()


def test_sigterm_ends_the_head_too() -> None:
    script = (
        "import time\nfrom histoscale.cluster.local import HeadSize, LocalHead\n"
        f"with LocalHead(HeadSize({SIZE.cpus}, {SIZE.object_store_bytes})) as head:\n"
        "    print(head._folder, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = owner.stdout.readline().strip()
        assert relatives(folder)
        owner.send_signal(signal.SIGTERM)
        assert owner.wait(60) == 128 + signal.SIGTERM
    assert relatives(folder) == []
    assert not Path(folder).exists()


def test_head_that_ends_at_once_is_diagnosed_with_its_last_words() -> None:
    with pytest.raises(ClusterError, match="ended at once"), LocalHead(HeadSize(cpus=2, object_store_bytes=1)):
        pass


def test_head_that_does_not_answer_in_time_is_diagnosed_and_ended() -> None:
    head = LocalHead(SIZE, start_timeout_s=0.0)
    started_s = time.monotonic()
    with pytest.raises(ClusterError, match="does not answer"), head:
        pass
    assert head._process is None
    assert time.monotonic() - started_s < 60
