"""A job script as a process of its own, whose lines are read while it prints them."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from histoscale.errors import RunError


@dataclass(frozen=True)
class Line:
    """What a job printed, and when it was read, on the monotonic clock."""

    text: str
    at_s: float


class WatchedJob:
    """Starts `python SCRIPT ...` from the root of the repository.

    Args:
        command: The script and its arguments.
        environment: Of the process.
        root: Of the repository.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], root: Path = Path()) -> None:
        self.lines: list[Line] = []
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._seen = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(Line(line.rstrip(), time.monotonic()))

    @property
    def output(self) -> str:
        """Everything that was printed so far."""
        return "\n".join(line.text for line in self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 300.0) -> Line:
        """The next line that holds a pattern, after the last one that was waited for.

        Raises:
            RunError: The job ended, or the time ran out, without one.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll() is not None and not self._reader.is_alive()
            for number, line in enumerate(self.lines[self._seen :], self._seen + 1):
                if re.search(pattern, line.text):
                    self._seen = number
                    return line
            if ended or time.monotonic() > deadline_s:
                what = "the job ended" if ended else f"the job went on for {timeout_s:g} s"
                raise RunError(
                    f"{what} without a line that was waited for",
                    value=pattern,
                    expected="a line that matches",
                    remedy=f"see what it printed:\n{self.output}",
                )
            time.sleep(0.05)

    def finish(self, timeout_s: float = 600.0) -> None:
        """Wait for its end.

        Raises:
            RunError: It failed, or takes longer.
        """
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        self._reader.join(timeout_s if status is not None else 0.0)
        if status != 0:
            raise RunError(
                "the job failed" if status is not None else f"the job did not end within {timeout_s:g} s",
                value=status,
                expected="exit status 0",
                remedy=f"see what it printed:\n{self.output}",
            )

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
