"""How far an indexing is, for a person to read."""

from dataclasses import dataclass

from histoscale.units import describe_duration


@dataclass(frozen=True)
class IndexProgress:
    """How far an indexing is, in slides.

    Attributes:
        total: Slides of the archive.
        accepted: Examined and taken by this run.
        refused: Examined and refused by this run.
        reused: Decided by an earlier run, and not changed since.
        slides_per_s: Rate of this run.
        unreachable: Not given by the storage so far.
    """

    total: int
    accepted: int
    refused: int
    reused: int
    slides_per_s: float
    unreachable: int = 0

    @property
    def done(self) -> int:
        """Slides that are decided, or given up for this run."""
        return self.accepted + self.refused + self.reused + self.unreachable

    @property
    def eta_s(self) -> float:
        """Seconds to the end at the present rate; infinite before the first slide."""
        left = self.total - self.done
        return left / self.slides_per_s if self.slides_per_s else float("inf") if left else 0.0

    def line(self) -> str:
        """The progress as a line."""
        rate = f", {self.slides_per_s:.2f} slides/s, {describe_duration(self.eta_s)} left" if self.slides_per_s else ""
        kept = f", {self.reused} unchanged" if self.reused else ""
        lost = f", {self.unreachable} unreachable" if self.unreachable else ""
        return f"{self.done} of {self.total} slides: {self.accepted} accepted, {self.refused} refused{kept}{lost}{rate}"
