"""What an evaluation finds, as values: figures, gains over baselines, and robustness against the center."""

import statistics
from dataclasses import dataclass

from histoscale.evaluate.intervals import Interval
from histoscale.evaluate.metrics import BALANCED_ACCURACY

PRETRAINED = "pretrained"
UNTRAINED = "untrained"
COLOUR = "colour statistics"
BASELINES = (UNTRAINED, COLOUR)

NO_EMBEDDING = ""
"""Of the colour statistics, which are no network's."""


@dataclass(frozen=True)
class Figure:
    """One metric of one probe on one kind of feature.

    Attributes:
        features: `PRETRAINED`, one of `BASELINES`, or the name of a network beside it.
        embedding: Which tokens of the network; `NO_EMBEDDING` for `COLOUR`.
        probe: Name of the probe.
        metric: Name of the metric.
        values: On each split, or on each draw of each split.
        interval: Of the mean, 95 %.
    """

    features: str
    embedding: str
    probe: str
    metric: str
    values: tuple[float, ...]
    interval: Interval

    @property
    def mean(self) -> float:
        """Mean over the splits."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation over the splits, of the sample; 0 for one split."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Gain:
    """By how much the pretrained network is above another, by one metric of one probe on the same tiles.

    Attributes:
        baseline: The other: one of `BASELINES`, or the name of a network beside it.
        embedding: Which tokens of the networks.
        probe: Name of the probe.
        metric: Name of the metric.
        difference: Of the means over the splits.
        interval: Of the difference, 95 %.
        p_value: That chance alone would set them as far apart; None for AUROC, whose scores cannot change places.
    """

    baseline: str
    embedding: str
    probe: str
    metric: str
    difference: float
    interval: Interval
    p_value: float | None


@dataclass(frozen=True)
class Robustness:
    """How much of a kind of feature is about the center, on tiles where classes and centers are balanced.

    Attributes:
        features: As of `Figure`.
        embedding: Which tokens of the network; `NO_EMBEDDING` for `COLOUR`.
        tiles: That are balanced.
        neighbours: Of each tile that are looked at.
        index: The robustness index, 0 to 1.
        index_interval: Of it, 95 %.
        index_chance: What features without any order give.
        center_values: Balanced accuracy of telling the center, on each split.
        center_interval: Of their mean, 95 %.
        center_chance: One in the number of centers.
    """

    features: str
    embedding: str
    tiles: int
    neighbours: int
    index: float
    index_interval: Interval
    index_chance: float
    center_values: tuple[float, ...]
    center_interval: Interval
    center_chance: float

    @property
    def center_accuracy(self) -> float:
        """Mean over the splits."""
        return statistics.fmean(self.center_values)


def find_figure(
    figures: tuple[Figure, ...],
    features: str,
    probe: str,
    metric: str = BALANCED_ACCURACY,
    embedding: str | None = None,
) -> Figure:
    """One figure; without `embedding`, that of the first kind there is.

    Raises:
        LookupError: There is none.
    """
    for figure in figures:
        if (figure.features, figure.probe, figure.metric) == (features, probe, metric) and embedding in (
            None,
            figure.embedding,
        ):
            return figure
    raise LookupError(f"no {metric} of {probe} on {features}")
