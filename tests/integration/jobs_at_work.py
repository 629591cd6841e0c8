"""What the job tests share: the repository's jobs on a real local head, watched line by line."""

import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from histoscale.bench.watched_job import SMALL_RUN, set_words
from histoscale.cluster.local import LocalHead

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ["--recipe", "jobs/recipes/quickstart.yaml", *set_words(*SMALL_RUN)]
WAIT_S = 180.0


@dataclass
class Submission:
    """A job that runs in the background; its lines come as it prints them."""

    head: LocalHead
    command: list[str]
    lines: list[str] = field(default_factory=list)
    status: int | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.status = self.head.submit(self.command, REPOSITORY, self.lines.append)

    def wait_for(self, wanted: Callable[[str], bool]) -> str:
        """The first line that fulfils `wanted`; fails where the job ends or the time runs out without one."""
        deadline_s = time.monotonic() + WAIT_S
        while time.monotonic() < deadline_s:
            for line in list(self.lines):
                if wanted(line):
                    return line
            if self.status is not None:
                break
            time.sleep(0.05)
        raise AssertionError("no such line in\n" + "\n".join(self.lines))

    def finish(self) -> str:
        """Wait for the end; returns everything that was printed."""
        self._thread.join(WAIT_S)
        assert self.status is not None, "still running:\n" + "\n".join(self.lines)
        return "\n".join(self.lines)

    def stop(self) -> None:
        """What `ray job stop` does."""
        request = urllib.request.Request(
            f"{self.head.address}/api/jobs/{self.job_id}/stop",
            method="POST",
            headers={"Authorization": f"Bearer {self.head.environment['RAY_AUTH_TOKEN']}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200

    @property
    def job_id(self) -> str:
        """The submission id that the CLI prints."""
        line = self.wait_for(lambda line: "raysubmit_" in line)
        return next(word.strip("'\",.") for word in line.split() if "raysubmit_" in word)


def run_to_the_end(head: LocalHead, command: list[str]) -> str:
    """Submit a job, demand that it succeeds, and return what it printed."""
    submission = Submission(head, command)
    text = submission.finish()
    assert submission.status == 0, text
    return text


def run_directly(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a job's script without a cluster around it."""
    return subprocess.run(
        [sys.executable, f"jobs/{script}", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def train_workers(head: LocalHead) -> list[psutil.Process]:
    """The processes that train, among those of one head."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::") and "RayTrainWorker" in title and _belongs_to(process, head):
            found.append(process)
    return found


def process_of(head: LocalHead, task: str) -> psutil.Process:
    """The first process that runs a task of this name for one head; fails where none comes in time."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if title.startswith(f"ray::{task}") and _belongs_to(process, head):
                return process
        time.sleep(0.05)
    raise AssertionError(f"no process of {task} within {WAIT_S:g} s")


def _belongs_to(process: psutil.Process, head: LocalHead) -> bool:
    try:
        return process.environ().get("RAY_AUTH_TOKEN") == head.environment["RAY_AUTH_TOKEN"]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
