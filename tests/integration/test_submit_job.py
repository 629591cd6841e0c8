"""A job outlives its cluster: a real head is killed, a new one comes up at its port, and the job goes on there."""

import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from histoscale.cluster import local
from histoscale.cluster.local import HeadSize, LocalHead

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = HeadSize(cpus=1, object_store_bytes=100_000_000)
WAIT_S = 120.0
LAST = 20
COUNT = f"""
import pathlib, sys, time
file = pathlib.Path(sys.argv[1])
count = int(file.read_text())
while count < {LAST}:
    count += 1
    file.write_text(str(count))
    print("count", count, flush=True)
    time.sleep(0.3)
sys.stderr.write("error: planted\\n")
sys.exit(2)
"""


@pytest.mark.slow
def test_a_job_goes_on_at_the_next_head_after_the_first_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports, token = local._free_ports(4), secrets.token_hex(32)
    monkeypatch.setattr(local, "_free_ports", lambda count: ports[:count])
    monkeypatch.setattr(local.secrets, "token_hex", lambda size: token)
    (tmp_path / "count.py").write_text(COUNT)
    (tmp_path / "env.yaml").write_text("env_vars: {}\n")
    counted = tmp_path / "counted"
    counted.write_text("0")
    lines: list[str] = []
    with LocalHead(SIZE) as head:
        command = [sys.executable, str(REPOSITORY / "jobs" / "submit.py"), "--address", head.address]
        command += ["--runtime-env", "env.yaml", "--submission-id", "counting", "--wait-s", str(WAIT_S)]
        command += ["--", "python", "count.py", str(counted)]
        submit = subprocess.Popen(
            command, cwd=tmp_path, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        reader = threading.Thread(target=lambda: lines.extend(submit.stdout or ()), daemon=True)
        reader.start()
        wait_until(lambda: "count 3\n" in lines, lines)
        assert head._process is not None
        local._end_sessions(local._sessions_below(head._process.pid))  # SIGKILL, the job's driver included
        before = int(counted.read_text())
    wait_until(lambda: any("no answer from" in line for line in lines), lines)
    with LocalHead(SIZE):
        try:
            status = submit.wait(WAIT_S)
        finally:
            submit.kill()
        reader.join(WAIT_S)
    said = "".join(lines)
    assert status == 2, said
    assert 3 <= before < LAST
    # What the first head had counted but not yet passed on died with it.
    shown = [int(line.split()[1]) for line in lines if line.startswith("count ")]
    assert shown == sorted(set(shown)), said
    assert set(range(1, LAST + 1)) - set(shown) <= set(range(4, before + 1)), said
    assert "error: planted\n" in lines
    assert lines[-1] == "submit: job counting-2 ended with exit status 2\n"
    assert "Traceback" not in said


def wait_until(true: Callable[[], bool], lines: list[str]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline_s, "".join(lines)
        time.sleep(0.05)
