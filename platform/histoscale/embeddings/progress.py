"""How far an embedding of slides, or the learning from them, is, for a person to read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from histoscale.units import describe_duration

Tell: TypeAlias = Callable[[str, int, int], None]
"""Takes what is counted (`slides read`), how many there are so far, and how many there will be."""
SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class EmbeddingProgress:
    """How far it is.

    Attributes:
        total: Slides that were asked for.
        before: Of these, embedded by an earlier job.
        done: Embedded by this one.
        left_out: Without a file.
        tiles: Tiles that this one embedded.
        seconds: Since the first tiles were asked for.
    """

    total: int
    before: int
    done: int
    left_out: int
    tiles: int
    seconds: float

    @property
    def is_over(self) -> bool:
        """Whether every slide is decided."""
        return self.before + self.done + self.left_out >= self.total

    @property
    def eta_s(self) -> float:
        """Seconds to the end at the rate so far; infinite before the first slide."""
        decided = self.done + self.left_out
        left = self.total - self.before - decided
        return left * self.seconds / decided if decided else float("inf") if left else 0.0

    def line(self) -> str:
        """The progress as a line."""
        text = f"{self.before + self.done + self.left_out} of {self.total} slides, {self.tiles} tiles"
        if self.before:
            text += f", {self.before} slides done before"
        if self.left_out:
            text += f", {self.left_out} left out"
        if self.tiles and self.seconds:
            text += f", {self.tiles / self.seconds:.1f} tiles/s, {self.done / self.seconds:.3g} slides/s"
        return text if self.eta_s in (0.0, float("inf")) else f"{text}, {describe_duration(self.eta_s)} left"


class CountedSteps:
    """Makes lines of counts, at most one in a while and one at the end.

    Args:
        say: Takes a line.
        now_s: The time.
    """

    def __init__(self, say: Callable[[str], None], now_s: Callable[[], float]) -> None:
        self._say, self._now_s = say, now_s
        self._what = ""
        self._start_s = self._said_s = 0.0

    def tell(self, what: str, done: int, total: int) -> None:
        """One count more; see `Tell`."""
        now_s = self._now_s()
        if what != self._what:
            self._what, self._start_s, self._said_s = what, now_s, now_s
        if done < total and now_s - self._said_s < SECONDS_BETWEEN_LINES:
            return
        self._said_s = now_s
        took_s = now_s - self._start_s
        left = f", {describe_duration(took_s / done * (total - done))} left" if done < total else ""
        rate = f", {done / took_s:.2f} per s" if took_s else ""
        self._say(f"{what}: {done} of {total}{rate}{left}")
