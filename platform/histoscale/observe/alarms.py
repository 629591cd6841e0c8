"""Alarms over the metrics of a run: pure, one step after the other, so that they can be played over `metrics.jsonl`.

Each rings once for each time that its cause lasts, and names the cause and what to do.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from histoscale.config.recipe import Recipe

COLLAPSED_COSINE = 0.98
COLLAPSE_STEPS = 20
STARVED_SHARE = 0.25
STARVED_STEPS = 50

Values = Mapping[str, float]
"""What `metrics.jsonl` holds of a step."""


class Alarm(Protocol):
    """Looks at each step in turn."""

    def update(self, values: Values) -> str | None:
        """A sentence for the log at the step at which the alarm rings, None otherwise."""


class Alarms:
    """All alarms of a run.

    Args:
        recipe: Of the run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._alarms: tuple[Alarm, ...] = (CollapseAlarm(recipe.optim.warmup_images), StarvationAlarm())

    def update(self, values: Values) -> list[str]:
        """What rings at this step."""
        return [said for alarm in self._alarms if (said := alarm.update(values)) is not None]


@dataclass
class CollapseAlarm:
    """Rings when the class tokens of different tiles have become one.

    New networks map all tiles to nearly one token, so the alarm is armed when the tokens have once been apart, or when
    the learning rate is past its warm-up.

    Attributes:
        warmup_images: Of the recipe.
    """

    warmup_images: int
    _armed: bool = False
    _steps: int = 0

    def update(self, values: Values) -> str | None:
        """See `Alarm`."""
        cosine = values["health/mean_cosine"]
        high = cosine > COLLAPSED_COSINE
        self._armed |= not high or values["progress/images_seen"] > self.warmup_images
        self._steps = self._steps + 1 if high and self._armed else 0
        if self._steps != COLLAPSE_STEPS:
            return None
        return (
            f"the model collapses: the class tokens of different tiles have had a mean cosine above {COLLAPSED_COSINE} "
            f"for {COLLAPSE_STEPS} steps (now {cosine:.4f}); start another run with a higher loss.kde_weight, a "
            "lower optim.lr or a lower loss.teacher_temperature"
        )


@dataclass
class StarvationAlarm:
    """Rings when training waits for tiles."""

    _last: deque[float] = field(default_factory=lambda: deque(maxlen=STARVED_STEPS))
    _rung: bool = False

    def update(self, values: Values) -> str | None:
        """See `Alarm`."""
        self._last.append(values["time/wait_share"])
        share = sum(self._last) / STARVED_STEPS
        high = len(self._last) == STARVED_STEPS and share > STARVED_SHARE
        rings = high and not self._rung
        self._rung = high
        if not rings:
            return None
        return (
            f"training starves: {share:.0%} of the time of the last {STARVED_STEPS} steps went into waiting for tiles; "
            "raise cluster.readers, add CPUs for them, or set cluster.tile_cache_gb"
        )
