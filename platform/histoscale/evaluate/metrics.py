"""How well classes are told: the metrics of an evaluation, once by scikit-learn and for thousands of resamples at once.

Shape suffixes: R resamples, M tiles of a test part, U units (groups, or tiles that are their own), C classes.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from histoscale.evaluate.splits import Labels, Units

BALANCED_ACCURACY = "balanced_accuracy"
AUROC = "auroc"
DECIDED = (BALANCED_ACCURACY, "weighted_f1", "macro_f1", "accuracy")
"""Metrics of the class with the highest score."""
METRICS = (*DECIDED, AUROC)

Scores = NDArray[np.float64]  # [M, C]; the class with the highest one is told, and each column ranks the tiles
Samples = dict[str, NDArray[np.float64]]  # metric -> [R]


def measure(labels: Labels, scores: Scores) -> dict[str, float]:
    """Every metric on a test part that holds every class; AUROC is the mean over the classes, each against the rest."""
    told = scores.argmax(axis=1)
    return {
        BALANCED_ACCURACY: float(balanced_accuracy_score(labels, told)),
        "weighted_f1": float(f1_score(labels, told, average="weighted", zero_division=0.0)),
        "macro_f1": float(f1_score(labels, told, average="macro", zero_division=0.0)),
        "accuracy": float(accuracy_score(labels, told)),
        AUROC: float(np.mean([roc_auc_score(labels == label, scores[:, label]) for label in np.unique(labels)])),
    }


def confusions(labels: Labels, scores: Scores, units: Units, count: int) -> csr_array:
    """Tiles of each unit by true and told class: sparse [U, C * C], `count` units."""
    classes = scores.shape[1]
    codes = labels * classes + scores.argmax(axis=1)
    return csr_array((np.ones(len(labels)), (units, codes)), shape=(count, classes * classes))


def of_confusions(confusion_RCC: NDArray[np.float64]) -> Samples:
    """The `DECIDED` metrics of R tables [true, told]; classes without tiles count as scikit-learn has it."""
    right_RC = np.einsum("rcc->rc", confusion_RCC)
    true_RC, told_RC = confusion_RCC.sum(axis=2), confusion_RCC.sum(axis=1)
    total_R = true_RC.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall_RC = right_RC / true_RC
        f1_RC = np.where(true_RC + told_RC > 0, 2.0 * right_RC / (true_RC + told_RC), np.nan)
        return {
            BALANCED_ACCURACY: _mean_of_known(recall_RC),
            "weighted_f1": np.nansum(f1_RC * true_RC, axis=1) / total_R,
            "macro_f1": _mean_of_known(f1_RC),
            "accuracy": right_RC.sum(axis=1) / total_R,
        }


def weighted_auroc(labels: Labels, scores: Scores, weights_RM: NDArray[np.float64]) -> NDArray[np.float64]:
    """AUROC, as in `measure`, where each tile counts as often as its weight says: [R].

    A tie is half a win. Classes without weight, or with all of it, are left out.
    """
    areas = np.stack([_area(labels == label, scores[:, label], weights_RM) for label in np.unique(labels)], axis=1)
    return _mean_of_known(areas)


def _area(positive: NDArray[np.bool_], scores: Scores, weights_RM: NDArray[np.float64]) -> NDArray[np.float64]:
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # of each run of equal scores
    ranked = weights_RM[:, order]
    positives = np.add.reduceat(ranked * positive[order], starts, axis=1)
    negatives = np.add.reduceat(ranked * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    with np.errstate(invalid="ignore"):
        area: NDArray[np.float64] = (positives * (below + negatives / 2.0)).sum(axis=1) / (
            positives.sum(axis=1) * negatives.sum(axis=1)
        )
    return area


def _mean_of_known(values_RC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the columns that are numbers; NaN where none is."""
    known = ~np.isnan(values_RC)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = np.where(known, values_RC, 0.0).sum(axis=1) / known.sum(axis=1)
    return mean
