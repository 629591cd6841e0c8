"""Alarms over the metrics of a run: pure, one step after the other, so that they can be played over `metrics.jsonl`.

Each tells, for as long as its cause lasts, since which step it does, what it is and what to do. Where a run has come
from is its own measure: healthy runs differ too much for fixed bounds, but for what no healthy run does.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from histoscale.config.recipe import Recipe
from histoscale.observe.group_alarm import GroupAlarm
from histoscale.observe.runaway import BASELINE_STEPS, RECENT_STEPS, Ring, Runaway, Values

COLLAPSED_COSINE = 0.98
COLLAPSE_STEPS = 20
COLLAPSED_RANK = 2.0
STARVATION = "starvation"
STARVED_SHARE = 0.25
STARVED_STEPS = 50
LARGEST_UPDATE = 0.03
HUGE_UPDATE = 0.1
"""A share of the weights that no single step may change: 50 times what a healthy quickstart's largest step does."""
READINGS = 3
REMEMBERED_STEPS = 2 * (BASELINE_STEPS + RECENT_STEPS)
"""So many steps before a resume tell the alarms what is usual."""


class Alarm(Protocol):
    """Looks at each step in turn."""

    def update(self, values: Values) -> Ring | None:
        """What is wrong at this step, None where nothing is."""


class Alarms:
    """All alarms of a run.

    Args:
        recipe: Of the run.
        before: The metrics of the last steps before it was resumed.
    """

    def __init__(self, recipe: Recipe, before: Iterable[Values] = ()) -> None:
        self._alarms: tuple[Alarm, ...] = (
            CollapseAlarm(recipe.optim.warmup_images),
            DivergenceAlarm(),
            GroupAlarm(),
            StarvationAlarm(),
        )
        self._ringing: set[int] = set()
        for values in before:
            self._look(values)

    def update(self, values: Values) -> list[Ring]:
        """What has begun to ring at this step."""
        found = self._look(values)
        new = [ring for place, ring in found.items() if place not in self._ringing]
        self._ringing = set(found)
        return new

    def _look(self, values: Values) -> dict[int, Ring]:
        rings = ((place, alarm.update(values)) for place, alarm in enumerate(self._alarms))
        return {place: ring for place, ring in rings if ring is not None}


@dataclass
class CollapseAlarm:
    """Rings when the class tokens of different tiles have become one, or lie on one line.

    New networks map all tiles to nearly one token, so the alarm is armed when the tokens have once been apart, or when
    the learning rate is past its warm-up.

    Attributes:
        warmup_images: Of the recipe.
    """

    warmup_images: int
    _parted: bool = False
    _wide: bool = False
    _alike: int = 0
    _flat: list[int] = field(default_factory=list)
    _rank: float = 0.0

    def update(self, values: Values) -> Ring | None:
        """See `Alarm`."""
        step, cosine = int(values["step"]), values["health/mean_cosine"]
        warm = values["progress/images_seen"] > self.warmup_images
        alike = cosine > COLLAPSED_COSINE
        self._parted |= not alike or warm
        self._alike = self._alike + 1 if alike and self._parted else 0
        self._look_at_rank(step, values.get("health/effective_rank"), warm)
        if self._alike >= COLLAPSE_STEPS:
            since = step + 1 - self._alike
            what = f"the class tokens of different tiles have a mean cosine above {COLLAPSED_COSINE} (now {cosine:.4f})"
        elif len(self._flat) >= READINGS:
            since = self._flat[0]
            what = f"the class tokens have an effective rank below {COLLAPSED_RANK:g} (now {self._rank:.2f})"
        else:
            return None
        return Ring(
            "collapse",
            since,
            f"the model collapses: since step {since} {what}; start another run with a higher loss.kde_weight, a lower "
            "optim.lr or a lower loss.teacher_temperature",
        )

    def _look_at_rank(self, step: int, rank: float | None, warm: bool) -> None:
        if rank is None:
            return
        self._rank = rank
        self._wide |= rank >= 2 * COLLAPSED_RANK or warm
        if rank < COLLAPSED_RANK and self._wide:
            self._flat.append(step)
        else:
            self._flat.clear()


@dataclass
class DivergenceAlarm:
    """Rings when the loss or the gradient runs away from where it was, or the weights are hardly kept."""

    _watched: Mapping[str, Runaway] = field(
        default_factory=lambda: {"loss/total": Runaway(share=0.5), "optim/grad_norm": Runaway(share=9.0)}
    )
    _large: list[int] = field(default_factory=list)
    _update: float = 0.0

    def update(self, values: Values) -> Ring | None:
        """See `Alarm`."""
        step = int(values["step"])
        away = {name: runaway.update(step, values[name]) for name, runaway in self._watched.items()}
        found = [(name, drift) for name, drift in away.items() if drift is not None]
        self._look_at_update(step, values.get("optim/update_norm"))
        if len(self._large) >= READINGS or self._update > HUGE_UPDATE:
            since = self._large[0]
            what = (
                f"steps change the weights by more than {LARGEST_UPDATE:.0%} of their length (now {self._update:.1%})"
            )
        elif found:
            name, drift = found[0]
            since = drift.since
            what = f"{name} has risen from {drift.usual:.4g} to {drift.now:.4g}"
        else:
            return None
        return Ring(
            "divergence",
            since,
            f"the run diverges: since step {since} {what}; start another run with a lower optim.lr, a longer "
            "optim.warmup_images, a lower optim.clip_norm or model.qk_norm=true",
        )

    def _look_at_update(self, step: int, update: float | None) -> None:
        if update is None:
            return
        self._update = update
        if update > LARGEST_UPDATE:
            self._large.append(step)
        else:
            self._large.clear()


@dataclass
class StarvationAlarm:
    """Rings when training waits for tiles."""

    _last: deque[float] = field(default_factory=lambda: deque(maxlen=STARVED_STEPS))

    def update(self, values: Values) -> Ring | None:
        """See `Alarm`."""
        self._last.append(values["time/wait_share"])
        share = sum(self._last) / STARVED_STEPS
        if len(self._last) < STARVED_STEPS or share <= STARVED_SHARE:
            return None
        return Ring(
            STARVATION,
            int(values["step"]) + 1 - STARVED_STEPS,
            f"training starves: {share:.0%} of the time of the last {STARVED_STEPS} steps went into waiting for tiles; "
            "raise cluster.readers, add CPUs for them, or set cluster.tile_cache_gb",
        )
