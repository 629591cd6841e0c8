"""A run as its owner sees it: the lines that its command prints, and the steps that they tell of."""

import re
import time

from histoscale.bench.watched_job import POLL_S, Line, WatchedJob

SUBMIT = "jobs/submit.py"
_STEP = re.compile(r"step (\d+)/\d+ \|.*\| ([\d.]+) tiles/s")


class WatchedRun(WatchedJob):
    """A command that trains a run, started again when it is killed."""

    @property
    def step(self) -> int:
        """Steps done, by the last line that says it."""
        return next((step for line in reversed(self.lines) if (step := step_of(line)) is not None), 0)

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
        self.status(timeout_s)
        known_s = time.monotonic()
        self.start()
        return known_s


def step_of(line: Line) -> int | None:
    """Steps done, where a line says it."""
    found = _STEP.match(line.text)
    return int(found[1]) if found else None
