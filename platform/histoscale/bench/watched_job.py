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

POLL_S = 0.05
SMALL_RUN = (
    "model.arch=vit_test14",
    "data.region_px=98",
    "crops.global_px=56",
    "crops.local_px=28",
    "crops.local_count=2",
    "heads.dino_prototypes=64",
    "heads.ibot_prototypes=64",
    "batch.tiles=16",
    "optim.lr=1e-4",  # at higher rates rounding grows a hundredfold within some hundred steps
    "optim.warmup_images=64",
    "loss.teacher_temperature_warmup_images=128",
    "checkpoint.every_steps=20",
    "cluster.readers=1",
    "evaluation.pictures=false",
)
"""Changes to the quickstart's recipe with which a step takes a fraction of a second on two cores."""


def set_words(*settings: str) -> list[str]:
    """`--set FIELD=VALUE` for each of them; of a field that comes twice, the last value holds."""
    return [word for setting in settings for word in ("--set", setting)]


@dataclass(frozen=True)
class Line:
    """What a job printed.

    Attributes:
        number: Its place among the lines of all starts, from 0 on.
        time_s: When it was read, on the monotonic clock.
        text: Without the line end.
    """

    number: int
    time_s: float
    text: str


class WatchedJob:
    """Starts `python SCRIPT ...` from the root of the repository.

    Args:
        command: The script and its arguments.
        environment: Of the process.
        root: Of the repository.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], root: Path = Path()) -> None:
        self.lines: list[Line] = []
        self._command = [sys.executable, *command]
        self._environment = dict(environment)
        self._root = root
        self._seen = 0
        self.start()

    def start(self) -> None:
        """Run the command, for the first time or again."""
        self.process = subprocess.Popen(
            self._command,
            cwd=self._root,
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
        """Everything that was printed so far."""
        return "\n".join(line.text for line in self.lines)

    @property
    def mark(self) -> int:
        """The number of the next line."""
        return len(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 300.0) -> Line:
        """The next line that holds a pattern, after the last one that was waited for.

        Raises:
            RunError: The job ended, or the time ran out, without one.
        """
        line = self.after(self._seen, pattern, timeout_s)
        self._seen = line.number + 1
        return line

    def after(self, mark: int, pattern: str, timeout_s: float) -> Line:
        """The first line from `mark` on that holds a pattern.

        Raises:
            RunError: The job ended, or the time ran out, without one.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            ended = self.process.poll() is not None and not self._reader.is_alive()
            for line in self.lines[mark:]:
                if re.search(pattern, line.text):
                    return line
            if ended or time.monotonic() > deadline_s:
                what = "the job ended" if ended else f"the job went on for {timeout_s:g} s"
                raise RunError(
                    f"{what} without a line that was waited for",
                    value=pattern,
                    expected=f"a line that matches, from line {mark} on",
                    remedy=f"see what it printed:\n{self.text}",
                )
            time.sleep(POLL_S)

    def status(self, timeout_s: float) -> int:
        """Wait for its end; answers the exit status.

        Raises:
            RunError: It takes longer.
        """
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise RunError(
                f"the job did not end within {timeout_s:g} s",
                value="it still runs",
                expected="its end",
                remedy=f"see what it printed:\n{self.text}",
            ) from error
        self._reader.join(timeout_s)
        return status

    def finish(self, timeout_s: float = 600.0) -> None:
        """Wait until it has done its work.

        Raises:
            RunError: It failed, or takes longer.
        """
        status = self.status(timeout_s)
        if status != 0:
            raise RunError(
                "the job failed",
                value=status,
                expected="exit status 0",
                remedy=f"see what it printed:\n{self.text}",
            )

    def end(self) -> None:
        """Kill it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
