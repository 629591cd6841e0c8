"""What features know about classes: k nearest neighbours and a linear probe, on stratified splits.

Every kind of feature goes through the same steps: nothing is tuned for one of them.
"""

import statistics
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from histoscale.evaluate.features import FloatArray
from histoscale.seeding import key, uniforms

NEIGHBOURS = 20  # DINO's
TEMPERATURE = 0.07  # DINO's, of the neighbours' votes
SPLITS = 3
TEST_SHARE = 0.3
_MAX_ITERATIONS = 2000
_TOLERANCE = 1e-3
PROBES = ("knn", "linear")

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Figure:
    """One metric of one probe on one kind of feature: its value on each split."""

    features: str
    probe: str
    metric: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the splits."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation over the splits, of the sample."""
        return statistics.stdev(self.values)


def split(labels: Labels, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to fit on and rows to test on, sorted; each class is divided alike and stands on both sides."""
    draws = uniforms(key(seed, "probe split"), np.arange(len(labels), dtype=np.int64), 1)[:, 0]
    test = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(TEST_SHARE * len(rows)))
        test.append(rows[np.argsort(draws[rows], kind="stable")[:count]])
    test_rows = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test_rows), test_rows


def predict_knn(train: FloatArray, labels: Labels, test: FloatArray) -> Labels:
    """Class by the cosine to the nearest neighbours, each with the weight exp(cosine / temperature).

    Features are centred on the training rows first: a direction that all tiles share would drown the differences.
    """
    center = train.mean(axis=0)
    neighbours = KNeighborsClassifier(
        n_neighbors=min(NEIGHBOURS, len(train)), metric="cosine", algorithm="brute", weights=_votes
    )
    predicted: Labels = neighbours.fit(train - center, labels).predict(test - center)
    return predicted


def predict_linear(train: FloatArray, labels: Labels, test: FloatArray) -> Labels:
    """Class by logistic regression on features that are z-scored on the training rows."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS, tol=_TOLERANCE))
    # The matrices are small: threads would wait for each other most of the time.
    with threadpool_limits(limits=1):
        predicted: Labels = probe.fit(train, labels).predict(test)
    return predicted


def probe_features(name: str, features: FloatArray, labels: Labels) -> list[Figure]:
    """Balanced accuracy and weighted F1 of both probes over the splits."""
    values: dict[tuple[str, str], list[float]] = {}
    for seed in range(SPLITS):
        train, test = split(labels, seed)
        for probe, predict in zip(PROBES, (predict_knn, predict_linear), strict=True):
            predicted = predict(features[train], labels[train], features[test])
            values.setdefault((probe, "balanced_accuracy"), []).append(
                float(balanced_accuracy_score(labels[test], predicted))
            )
            values.setdefault((probe, "weighted_f1"), []).append(
                float(f1_score(labels[test], predicted, average="weighted"))
            )
    return [Figure(name, probe, metric, tuple(found)) for (probe, metric), found in values.items()]


def _votes(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-distances / TEMPERATURE)  # a cosine distance is 1 - cosine; the constant factor cancels
