"""How far an embedding of slides is, for a person to read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EmbeddingProgress:
    """How far it is.

    Attributes:
        total: Slides that were asked for.
        before: Of these, embedded by an earlier job.
        done: Embedded by this one.
        left_out: Without a file.
        tiles: Tiles that this one embedded.
        seconds: Since it began.
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
        return text if self.eta_s in (0.0, float("inf")) else f"{text}, {self.eta_s:.0f} s left"
