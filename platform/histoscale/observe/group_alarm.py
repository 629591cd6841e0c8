"""The alarm for one stratum, or one magnification, that runs away from the others."""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from histoscale.observe.runaway import Drift, Ring, Runaway, Values
from histoscale.sampling.tile_groups import BY_MPP, BY_STRATUM, OTHERS

SHARE = 0.1
SPREADS = 1.5
"""A step has few tiles of a group, so that gaps are noisy, but their noise has no memory: the median of the recent ones
is four times as sure as one of them."""
_FAMILIES = {BY_STRATUM: ("stratum", "strata"), BY_MPP: ("magnification", "magnifications")}


@dataclass
class GroupAlarm:
    """Rings when the loss of a group of tiles moves against that of the others, up or down.

    What all groups have in common (a warm-up, a schedule) is in no gap.
    """

    _gaps: dict[str, Runaway] = field(default_factory=lambda: defaultdict(_gap))
    _names: dict[str, list[str]] = field(default_factory=lambda: {family: [] for family in _FAMILIES})
    _away: dict[str, Drift] = field(default_factory=dict)

    def update(self, values: Values) -> Ring | None:
        """See `Alarm`."""
        step = int(values["step"])
        for family in _FAMILIES:
            self._names[family] = sorted({*self._names[family], *(name for name in values if name.startswith(family))})
            for name, gap, size in _gaps_in(values, family):
                drift = self._gaps[name].update(step, gap, size)
                if drift is None:
                    self._away.pop(name, None)
                else:
                    self._away[name] = drift
        if not self._away:
            return None
        # Who leaves moves the others' distances, too, but less.
        name, drift = max(self._away.items(), key=lambda item: abs(item[1].now - item[1].usual))
        family = BY_STRATUM if name.startswith(BY_STRATUM) else BY_MPP
        group, all_names = name.removeprefix(family), self._names[family]
        one, several = _FAMILIES[family]
        if len(all_names) == 2:  # of two, distances do not tell which one has moved
            what = f"the {several} {' and '.join(each.removeprefix(family) for each in all_names)} run apart"
        else:
            what = f"the {one} {group} runs away from the others"
        return Ring(
            "group",
            drift.since,
            f"{what}: since step {drift.since} the loss of {group} is {drift.now:+.3g} beside that of the others, "
            f"{drift.usual:+.3g} before; {_remedy(family, group)}",
        )


def _gap() -> Runaway:
    return Runaway(SHARE, SPREADS, falls=True)


def _gaps_in(values: Values, family: str) -> Iterator[tuple[str, float, float]]:
    """Name, distance from the others' mean, and size of the loss, of each group that has tiles in this step."""
    losses = {name: value for name, value in values.items() if name.startswith(family)}
    if len(losses) < 2:
        return
    total = sum(losses.values())
    for name, loss in losses.items():
        others = (total - loss) / (len(losses) - 1)
        yield name, loss - others, statistics.median(map(abs, losses.values()))


def _remedy(family: str, group: str) -> str:
    if family == BY_MPP or group == OTHERS:
        return "look at its tiles (jobs/index.py draws some of each slide), and at what was added to the archive last"
    return "look at its slides, and leave it out of another run with a weight of 0 in data.weights if they are damaged"
