"""A run as its owner sees it: the lines that its command prints, each with the time at which it came."""

import re
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.integration.jobs_at_work import REPOSITORY

POLL_S = 0.1
SUBMIT = "jobs/submit.py"
_STEP = re.compile(r"step (\d+)/\d+ \|.*\| ([\d.]+) tiles/s")


@dataclass(frozen=True)
class Line:
    """A line of the log, its number and when it came."""

    number: int
    time_s: float
    text: str


class WatchedRun:
    """A command that trains a run, and what it prints, from its first start on.

    Args:
        command: Program and arguments.
        environment: Of the command.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.lines: list[Line] = []
        self._command = list(command)
        self._environment = dict(environment)
        self.start()

    def start(self) -> None:
        """Run the command, for the first time or again."""
        self.process = subprocess.Popen(
            self._command,
            cwd=REPOSITORY,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for text in self.process.stdout or ():
            self.lines.append(Line(len(self.lines), time.monotonic(), text.rstrip()))

    @property
    def text(self) -> str:
        """Everything so far."""
        return "\n".join(line.text for line in self.lines)

    @property
    def mark(self) -> int:
        """What is said from now on has this number or a later one."""
        return len(self.lines)

    @property
    def step(self) -> int:
        """Steps done, by the last line that says it."""
        return next((step for line in reversed(self.lines) if (step := step_of(line)) is not None), 0)

    def after(self, mark: int, pattern: str, timeout_s: float) -> Line:
        """The first line from `mark` on that holds the pattern.

        Raises:
            AssertionError: None came in time, or the run ended without one.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll() is not None and not self._reader.is_alive()
            for line in self.lines[mark:]:
                if re.search(pattern, line.text):
                    return line
            if ended or time.monotonic() > deadline_s:
                why = "the run ended" if ended else f"within {timeout_s:g} s"
                raise AssertionError(f"no line with {pattern!r} ({why}) after line {mark} of\n{self.text}")
            time.sleep(POLL_S)

    def holds(self, mark: int, pattern: str) -> bool:
        """Whether a line from `mark` on holds the pattern."""
        return any(re.search(pattern, line.text) for line in self.lines[mark:])

    def wait_for_step(self, step: int, timeout_s: float) -> None:
        """Wait until so many steps are done.

        Raises:
            AssertionError: They are not, in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while self.step < step:
            assert time.monotonic() < deadline_s, f"step {step} was not reached in {timeout_s:g} s\n{self.text}"
            assert self.process.poll() is None, f"the run ended before step {step}\n{self.text}"
            time.sleep(POLL_S)

    def speeds(self, mark: int) -> list[float]:
        """Tiles a second, of the lines from `mark` on that say it."""
        return [float(found[2]) for line in self.lines[mark:] if (found := _STEP.match(line.text))]

    def wait_for_resubmission(self, mark: int, timeout_s: float) -> float:
        """Wait until the death of the driver is known and the job is started again; answers when it was known.

        `jobs/submit.py` does so by itself, a command that is the driver is run again.
        """
        if SUBMIT in self._command:
            return self.after(mark, "^submit: job .* failed with exit status 137", timeout_s).time_s
        self.finish(timeout_s)
        known_s = time.monotonic()
        self.start()
        return known_s

    def finish(self, timeout_s: float) -> int:
        """Wait for the end; answers the exit status."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def stop(self) -> None:
        """Leave nothing of it behind; the job goes with its cluster."""
        self.process.kill()
        self.process.wait()


def step_of(line: Line) -> int | None:
    """Steps done, where a line says it."""
    found = _STEP.match(line.text)
    return int(found[1]) if found else None
