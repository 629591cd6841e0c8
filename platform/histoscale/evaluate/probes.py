"""What features know about classes: probes that are fitted on one part of the tiles and asked about another.

Every kind of feature goes through the same steps: nothing is tuned for one of them by hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.neighbors import KNeighborsClassifier

from histoscale.errors import DatasetError, RecipeError
from histoscale.evaluate.features import FloatArray
from histoscale.evaluate.intervals import Told
from histoscale.evaluate.linear import Linear, Ridge, VirchowLinear
from histoscale.evaluate.metrics import Scores
from histoscale.evaluate.splits import Labels, Rows, Split
from histoscale.seeding import key, uniforms

NEIGHBOURS = 20  # DINO's
TEMPERATURE = 0.07  # DINO's, of the neighbours' votes


class Probe(Protocol):
    """A way to classify tiles by their features."""

    @property
    def title(self) -> str:
        """As tables call it."""

    @property
    def protocol(self) -> str:
        """What it does, in a sentence."""

    @property
    def draws(self) -> int:
        """How often it is fitted on each split, each time on another draw of tiles."""

    def scores(self, features: FloatArray, labels: Labels, split: Split, seed: int) -> Scores:
        """Scores [M, C] of the test tiles of a split.

        Args:
            features: float32 [N, D], of the whole dataset.
            labels: int64 [N].
            split: Which rows are which.
            seed: Of the draw and of what the fit draws.
        """


@dataclass(frozen=True)
class Knn:
    """Votes of the nearest training tiles; nothing is fitted, so it cannot overfit and needs no choice."""

    neighbours: int = NEIGHBOURS
    draws: int = 1

    @property
    def title(self) -> str:
        """As tables call it."""
        return f"kNN (k={self.neighbours})"

    @property
    def protocol(self) -> str:
        """In a sentence."""
        return f"{self.neighbours} neighbours, cosine of centred features, votes exp(cosine / {TEMPERATURE})"

    def scores(self, features: FloatArray, labels: Labels, split: Split, seed: int) -> Scores:  # noqa: ARG002 - as of `Probe`
        """Shares of the votes."""
        return knn_scores(features[split.train], labels[split.train], features[split.test], self.neighbours)


@dataclass(frozen=True)
class FewShot:
    """The nearest class mean of a few tiles per class (SimpleShot, arXiv 1911.04623).

    Features are centred on the mean of the drawn tiles and brought to length one.

    Attributes:
        shots: Tiles of each class.
        draws: How many such choices.
    """

    shots: int
    draws: int = 10

    @property
    def title(self) -> str:
        """As tables call it."""
        return f"{self.shots} shot{'s' if self.shots > 1 else ''}"

    @property
    def protocol(self) -> str:
        """In a sentence."""
        return f"nearest class mean of {self.shots} training tiles per class (SimpleShot), {self.draws} draws per split"

    def scores(self, features: FloatArray, labels: Labels, split: Split, seed: int) -> Scores:
        """Shares of the classes by a softmax of negative squared distances to their means.

        Raises:
            DatasetError: A class has fewer training tiles than shots.
        """
        support = self.support(labels, split.train, seed)
        center = features[support].mean(axis=0)
        shot_SD, test_MD = _unit_length(features[support] - center), _unit_length(features[split.test] - center)
        means_CD = shot_SD.reshape(-1, self.shots, shot_SD.shape[1]).mean(axis=1)
        distances_MC = ((test_MD**2).sum(axis=1)[:, None] - 2.0 * test_MD @ means_CD.T) + (means_CD**2).sum(axis=1)
        shares: Scores = softmax(-distances_MC, axis=1)
        return shares

    def support(self, labels: Labels, train: Rows, seed: int) -> Rows:
        """The drawn tiles, class by class: [C * shots]."""
        draws = uniforms(key(seed, "few-shot"), train, 1)[:, 0]
        rows = []
        for label in range(int(labels.max()) + 1):
            of_class = np.flatnonzero(labels[train] == label)
            if len(of_class) < self.shots:
                raise DatasetError(
                    f"a class has fewer training tiles than few_shot_{self.shots} needs",
                    value=f"{len(of_class)} tiles",
                    expected=f"{self.shots} or more of each class",
                    remedy="choose a probe with fewer shots, or add tiles to the class",
                )
            rows.append(train[of_class[np.argsort(draws[of_class], kind="stable")[: self.shots]]])
        return np.concatenate(rows)


PROBES: dict[str, Probe] = {
    "knn": Knn(),
    "linear": Linear(),
    "ridge": Ridge(),
    "virchow_linear": VirchowLinear(),
    "few_shot_1": FewShot(1),
    "few_shot_4": FewShot(4),
    "few_shot_16": FewShot(16),
}
DEFAULT_PROBES = ("knn", "linear")


def require_known(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that are none.

    Raises:
        RecipeError: Which one, and the nearest that there is; or there is no name, or one twice.
    """
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise RecipeError(
                f"there is no {what} of this name",
                value=name,
                expected=", ".join(known),
                remedy=f"use {near[0]}" if near else "choose from these",
            )
    if not given or len(set(given)) < len(given):
        raise RecipeError(
            f"each {what} is named once, and one at least",
            value=",".join(given),
            expected=f"names from {', '.join(known)}, with commas between",
            remedy="correct the list",
        )


def probe_features(probe: Probe, features: FloatArray, labels: Labels, splits: Sequence[Split]) -> tuple[Told, ...]:
    """What a probe tells of the test part of each split, for each of its draws."""
    return tuple(
        Told(split.test, probe.scores(features, labels, split, key(number, "draw", draw)))
        for number, split in enumerate(splits)
        for draw in range(probe.draws)
    )


def knn_scores(train: FloatArray, labels: Labels, test: FloatArray, neighbours: int = NEIGHBOURS) -> Scores:
    """Shares of the votes of the nearest neighbours by cosine, each with the weight exp(cosine / temperature).

    Features are centred on the training rows first: a direction that all tiles share would drown the differences.

    Args:
        train: float32 [N, D].
        labels: int64 [N], holding every class from 0 on.
        test: float32 [M, D].
        neighbours: How many vote; all rows, where there are fewer.
    """
    center = train.mean(axis=0)
    voters = KNeighborsClassifier(
        n_neighbors=min(neighbours, len(train)), metric="cosine", algorithm="brute", weights=_votes
    )
    scores: Scores = voters.fit(train - center, labels).predict_proba(test - center)
    return scores


def _votes(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-distances / TEMPERATURE)  # a cosine distance is 1 - cosine; the constant factor cancels


def _unit_length(features: FloatArray) -> NDArray[np.float64]:
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    scaled: NDArray[np.float64] = features.astype(np.float64) / np.maximum(lengths, 1e-12)
    return scaled
