"""What embeddings know of the expression of genes: HEST's random forests, one for each gene, fold by fold."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestRegressor

from histoscale.evaluate.datasets.hest import ExpressionTiles, Fold
from histoscale.evaluate.embed import of_kind
from histoscale.evaluate.features import Extractor, FloatArray, extract_tiles
from histoscale.evaluate.progress import Tell, silent

TREES, SEED = 70, 42  # HEST's
DEPTH = 16  # the default of cuML's forests, which HEST fits


@dataclass(frozen=True)
class ExpressionScore:
    """How well the expression of a task's genes is told.

    Attributes:
        task: Name of the task's folder.
        features: Name of the network.
        embedding: Which of its tokens.
        folds: Mean over the genes of Pearson's r, on the test part of each fold.
    """

    task: str
    features: str
    embedding: str
    folds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the folds."""
        return statistics.fmean(self.folds)

    @property
    def std(self) -> float:
        """Standard deviation over the folds, of the sample; 0 for one fold."""
        return statistics.stdev(self.folds) if len(self.folds) > 1 else 0.0


def score_expression(
    tiles: ExpressionTiles,
    extractors: Mapping[str, Extractor],
    embeddings: tuple[str, ...],
    jobs: int,
    tell: Tell = silent,
) -> list[ExpressionScore]:
    """Fit and test the forests on each kind of embedding of each network.

    Args:
        tiles: Of the task.
        extractors: Name of a network -> how its class token ++ mean of patches is taken from tiles.
        embeddings: Names from `EMBEDDINGS`.
        jobs: Threads that grow trees.
        tell: Takes a line for people.

    Raises:
        DatasetError: Tiles cannot be decoded.
    """
    features = extract_tiles(tiles.source, extractors, lambda index: f"{tiles.name} #{index}", tell=tell)
    found = []
    for name, rows in features.items():
        for embedding in embeddings:
            tell(f"{tiles.name}: {len(tiles.folds)} folds of {len(tiles.genes)} forests on {name}, {embedding}")
            kind = of_kind(rows, embedding)
            folds = tuple(pearson_of_fold(kind, tiles.values, fold, jobs) for fold in tiles.folds)
            found.append(ExpressionScore(tiles.name, name, embedding, folds))
    return found


def pearson_of_fold(features: FloatArray, values: NDArray[np.float32], fold: Fold, jobs: int) -> float:
    """Mean over the genes of Pearson's r between what is told and what is.

    A gene that is told alike everywhere, or is alike everywhere, counts as 0: nothing is known of its order.

    Args:
        features: float32 [N, D].
        values: float32 [N, genes].
        fold: Which rows are fitted and which are tested.
        jobs: Threads that grow trees.
    """
    found = []
    for gene in range(values.shape[1]):
        forest = RandomForestRegressor(TREES, max_depth=DEPTH, random_state=SEED, n_jobs=jobs)
        told = forest.fit(features[fold.train], values[fold.train, gene]).predict(features[fold.test])
        found.append(_pearson(told, values[fold.test, gene]))
    return statistics.fmean(found)


def _pearson(told: NDArray[np.float64], true: NDArray[np.float32]) -> float:
    if np.ptp(told) == 0.0 or np.ptp(true) == 0.0:
        return 0.0
    return float(np.corrcoef(told, true.astype(np.float64))[0, 1])
