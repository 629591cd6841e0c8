"""How a network of a sweep is judged, be it a trial's or the teacher: the probe's scores, and the time of a tile."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from histoscale.evaluate.assess import EvaluationPlan
from histoscale.evaluate.comparison import Comparison
from histoscale.evaluate.datasets import LabelledTiles, Tile, open_dataset
from histoscale.evaluate.embed import Embedder
from histoscale.evaluate.figures import PRETRAINED
from histoscale.evaluate.report import EvaluationReport
from histoscale.sweeps.spec import EvaluationSpec

_TIMED, _WARM = 20, 3

Evaluate = Callable[[LabelledTiles, EvaluationPlan], EvaluationReport]


@dataclass(frozen=True)
class Judged:
    """What was measured of a network; see `TrialRow`."""

    scores: dict[str, float]
    chance: dict[str, float]
    latency_ms: float | None


def judge(comparison: Comparison, evaluation: EvaluationSpec, evaluate: Evaluate) -> Judged:
    """Scores on every dataset, and the time of a tile.

    Args:
        comparison: The network.
        evaluation: What decides.
        evaluate: Makes a report of it.

    Raises:
        DatasetError: A dataset cannot be measured on.
    """
    plan = EvaluationPlan((evaluation.probe,), (evaluation.embedding,))
    scores, chance = {}, {}
    for name, uri in evaluation.datasets.items():
        report = evaluate(open_dataset(uri), plan)
        scores[name] = report.figure(PRETRAINED, evaluation.probe).mean
        chance[name] = 1.0 / len(report.counts)
    return Judged(scores, chance, _latency_ms(comparison))


def _latency_ms(comparison: Comparison) -> float:
    """Median time of one tile through the backbone, in milliseconds."""
    network = comparison.network
    embed = Embedder(network.backbone, network.image_px, comparison.device)
    tile: Tile = np.zeros((network.image_px, network.image_px, 3), dtype=np.uint8)
    times_s = []
    for _ in range(_WARM + _TIMED):
        begun_s = time.perf_counter()
        embed([tile])
        times_s.append(time.perf_counter() - begun_s)
    return 1e3 * statistics.median(times_s[_WARM:])
