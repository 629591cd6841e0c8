"""How sure a figure is: a bootstrap over groups of the test tiles, and the comparison of two models on the same tiles.

One resample draws as many units (groups; tiles where none are known) as there are, with replacement, and weighs every
test tile of every split by how often its unit was drawn. So tiles of one patient come and go together, and a tile that
several splits test counts alike in all of them. All models are resampled alike: the difference of two of them is that
of their samples. Of a probe that is fitted on several draws of each split, the draws are resampled as well. Else
intervals hold for these probes as fitted: how another training part would change them, the values of the splits show.

Shape suffixes: R resamples, U units, C classes, T test parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoscale.evaluate.metrics import (
    AUROC,
    DECIDED,
    METRICS,
    Samples,
    Scores,
    confusions,
    measure,
    of_confusions,
    weighted_auroc,
)
from histoscale.evaluate.splits import Labels, Rows, Units
from histoscale.seeding import key, uniforms

RESAMPLES = 1000
PERMUTATIONS = 1000
PERCENTILES = (2.5, 97.5)
_CHUNK_ELEMENTS = 1 << 22  # of the largest matrix at one time: 32 MB in float64

Interval = tuple[float, float]


@dataclass(frozen=True)
class Told:
    """What one probe tells of one test part: the scores [M, C] of the tiles `rows` [M] of the dataset."""

    rows: Rows
    scores: Scores


def values_of(labels: Labels, told: Sequence[Told]) -> dict[str, tuple[float, ...]]:
    """Every metric on every test part."""
    measured = [measure(labels[part.rows], part.scores) for part in told]
    return {metric: tuple(values[metric] for values in measured) for metric in METRICS}


def bootstrap(
    labels: Labels, units: Units, told: Sequence[Told], resamples: int = RESAMPLES, seed: int = 0, draws: int = 1
) -> Samples:
    """The mean of each metric over the test parts, in every resample: metric -> [R].

    Args:
        labels: int64 [N], of the dataset.
        units: int64 [N], what is drawn as a whole.
        told: What one probe tells of each test part.
        resamples: How many.
        seed: The same one draws the same resamples, whatever is measured.
        draws: How many of `told`, one after the other, are of one split and differ in the draw that was fitted.
    """
    count = int(units.max()) + 1
    tables = [confusions(labels[part.rows], part.scores, units[part.rows], count) for part in told]
    widest = max(count, *(max(len(part.rows), table.shape[1]) for part, table in zip(told, tables, strict=True)))
    pieces: dict[str, list[NDArray[np.float64]]] = {metric: [] for metric in METRICS}
    tested = np.unique(units[np.concatenate([part.rows for part in told])])
    shares_RT = _shares(len(told), draws, resamples, seed)
    start = 0
    for weights_RU in _weights(tested, count, resamples, seed, max(1, _CHUNK_ELEMENTS // widest)):
        for metric in METRICS:
            pieces[metric].append(np.zeros(len(weights_RU)))
        shares = shares_RT[start : start + len(weights_RU)]
        start += len(weights_RU)
        for number, (part, table) in enumerate(zip(told, tables, strict=True)):
            sampled = of_confusions(_tables(weights_RU, table, part.scores.shape[1]))
            sampled[AUROC] = weighted_auroc(labels[part.rows], part.scores, weights_RU[:, units[part.rows]])
            for metric in METRICS:
                pieces[metric][-1] += sampled[metric] * shares[:, number]
    return {metric: np.concatenate(parts) for metric, parts in pieces.items()}


def interval(samples: NDArray[np.float64]) -> Interval:
    """Between which values 95 % of the samples lie; those without a value (a class was never drawn) are left out."""
    low, high = np.nanpercentile(samples, PERCENTILES)
    return float(low), float(high)


def permutation_p(
    labels: Labels,
    units: Units,
    ours: Sequence[Told],
    theirs: Sequence[Told],
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> dict[str, float]:
    """How often chance alone would set two models as far apart as they are, for each of the `DECIDED` metrics.

    Were the models alike, it would not matter which of them a unit's answers are called after. So both models'
    answers change places in half of the units, drawn anew each time, and the difference of the means over the test
    parts is taken again. The p-value is two-sided and never zero: (1 + times as large) / (1 + permutations).

    Args:
        labels: int64 [N], of the dataset.
        units: int64 [N], what changes places as a whole.
        ours: What one model's probe tells of each test part.
        theirs: What the other's tells of the same ones.
        permutations: How many are drawn.
        seed: Of the draws.
    """
    count = int(units.max()) + 1
    draw_key = key(seed, "permutation")
    differences = {metric: np.zeros(permutations + 1) for metric in DECIDED}
    classes = ours[0].scores.shape[1]
    chunk = max(1, _CHUNK_ELEMENTS // max(count, classes * classes))
    pairs = [
        tuple(confusions(labels[part.rows], part.scores, units[part.rows], count) for part in pair)
        for pair in zip(ours, theirs, strict=True)
    ]
    for start in range(0, permutations + 1, chunk):
        numbers = np.arange(start, min(start + chunk, permutations + 1), dtype=np.int64)
        swapped_RU = (uniforms(draw_key, numbers, count) < 0.5).astype(np.float64)
        swapped_RU[numbers == 0] = 0.0  # as they are
        for our_table, their_table in pairs:
            first = of_confusions(
                _tables(1.0 - swapped_RU, our_table, classes) + _tables(swapped_RU, their_table, classes)
            )
            second = of_confusions(
                _tables(swapped_RU, our_table, classes) + _tables(1.0 - swapped_RU, their_table, classes)
            )
            for metric in DECIDED:
                differences[metric][numbers] += (first[metric] - second[metric]) / len(pairs)
    # Equal up to rounding counts as large: the sums of the same numbers come in other orders.
    return {metric: float(np.mean(np.abs(values) >= abs(values[0]) - 1e-12)) for metric, values in differences.items()}


def _weights(tested: Units, count: int, resamples: int, seed: int, chunk: int) -> Iterator[NDArray[np.float64]]:
    """How often each unit is drawn, of those that any test part holds: [R, U], `chunk` resamples at a time."""
    draw_key = key(seed, "bootstrap")
    for start in range(0, resamples, chunk):
        numbers = np.arange(start, min(start + chunk, resamples), dtype=np.int64)
        drawn = tested[(uniforms(draw_key, numbers, len(tested)) * len(tested)).astype(np.int64)]
        codes = (np.arange(len(numbers))[:, None] * count + drawn).ravel()
        yield np.bincount(codes, minlength=len(numbers) * count).reshape(len(numbers), count).astype(np.float64)


def _shares(parts: int, draws: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """What each test part adds to the mean: [R, T]; within a split, as many draws are drawn as there are."""
    splits = parts // draws
    numbers = np.arange(resamples, dtype=np.int64)
    uniform_RT = uniforms(key(seed, "draws"), numbers, parts)
    drawn_RT = (uniform_RT * draws).astype(np.int64) + np.repeat(np.arange(splits), draws) * draws
    codes = (numbers[:, None] * parts + drawn_RT).ravel()
    return np.bincount(codes, minlength=resamples * parts).reshape(resamples, parts) / parts


def _tables(weights_RU: NDArray[np.float64], table: object, classes: int) -> NDArray[np.float64]:
    product: NDArray[np.float64] = weights_RU @ table  # type: ignore[operator]
    return product.reshape(len(weights_RU), classes, classes)
