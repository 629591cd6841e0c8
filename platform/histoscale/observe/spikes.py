"""Spikes of a curve: steps whose value stands far above those around it, whatever the curve's own noise and trend."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WATCHED = {"loss/total": "loss", "optim/grad_norm": "gradient norm"}
"""Curves that are looked through: name of the metric -> as people call it."""

_AROUND = 50  # steps on either side
_LEAST_AROUND = 15
_LEAST_SCORE = 8.0
_SIGMA = 1.4826  # of a normal distribution, in median absolute deviations
_LEAST_SCALE = 0.01  # of the median: a curve without noise has no spikes of a thousandth
_TOGETHER = 10  # steps within which spikes are one


@dataclass(frozen=True)
class Spike:
    """One spike.

    Attributes:
        metric: Name of the curve in `metrics.jsonl`.
        step: Where it is highest.
        value: There.
        typical: Median of the steps around.
        score: How many robust standard deviations lie between them; infinite for a value that is no number.
    """

    metric: str
    step: int
    value: float
    typical: float
    score: float


def largest_spikes(metrics: Sequence[Mapping[str, float]], most: int, since: int = 0) -> list[Spike]:
    """The largest spikes of the watched curves from step `since` on; of both curves at one step, the larger.

    Args:
        metrics: What was measured of each step, steps ascending.
        most: How many are wanted at most.
        since: First step of interest.
    """
    found: dict[int, Spike] = {}
    for metric in WATCHED:
        points = [(int(line["step"]), line[metric]) for line in metrics if metric in line]
        for spike in find_spikes(points, metric):
            if spike.step >= since and (spike.step not in found or found[spike.step].score < spike.score):
                found[spike.step] = spike
    return sorted(found.values(), key=lambda spike: (-spike.score, spike.step))[:most]


def find_spikes(points: Sequence[tuple[int, float]], metric: str) -> list[Spike]:
    """Every spike of a curve, by step.

    A spike is the highest value of `_TOGETHER` steps on either side, if it lies `_LEAST_SCORE` robust standard
    deviations (from the median absolute deviation) above the median of `_AROUND` steps on either side. The first
    `_TOGETHER` steps, where a curve comes down from its start, have none.

    Args:
        points: (step, value), steps ascending.
        metric: Name of the curve.
    """
    if not points:
        return []
    values_N = np.array([value for _, value in points], np.float64)
    finite_N = np.isfinite(values_N)
    heights_N = np.where(finite_N, values_N, np.inf)
    padded = np.pad(heights_N, _TOGETHER, constant_values=-np.inf)
    highest_N = np.lib.stride_tricks.sliding_window_view(padded, 2 * _TOGETHER + 1).max(axis=1)
    spikes: list[Spike] = []
    for place in np.flatnonzero(heights_N == highest_N).tolist():
        if place < _TOGETHER:
            continue
        around = np.r_[max(0, place - _AROUND) : place, place + 1 : min(len(values_N), place + 1 + _AROUND)]
        judged = _judge(values_N[place], values_N[around[finite_N[around]]])
        step = points[place][0]
        # Of several that are equally high, the first one counts.
        if judged is not None and not (spikes and step - spikes[-1].step <= _TOGETHER):
            spikes.append(Spike(metric, step, float(values_N[place]), *judged))
    return spikes


def _judge(value: float, around: NDArray[np.float64]) -> tuple[float, float] | None:
    """The median of what is around a value, and the value's score, if that makes it a spike."""
    if len(around) < _LEAST_AROUND:
        return None
    typical = float(np.median(around))
    scale = max(_SIGMA * float(np.median(np.abs(around - typical))), _LEAST_SCALE * abs(typical))
    if not math.isfinite(value):
        return typical, math.inf
    if value <= typical:
        return None
    score = float(value - typical) / scale if scale > 0.0 else math.inf
    return (typical, score) if score >= _LEAST_SCORE else None
