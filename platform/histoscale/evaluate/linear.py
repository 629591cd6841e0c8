"""Linear probes: logistic regression, ridge, and the protocol of the Virchow papers.

Each z-scores the features on the tiles that it is fitted on, chooses its strength by the split's `val`, and is fitted
at last on the split's `train`. Features are float32 [N, D], of the whole dataset; scores are float64 [M, C], of the
split's `test`.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import cross_entropy

from histoscale.evaluate.features import FloatArray
from histoscale.evaluate.metrics import Scores
from histoscale.evaluate.splits import Labels, Split
from histoscale.seeding import key

_MAX_ITERATIONS = 2000
_TOLERANCE = 1e-4
_SEARCH_TOLERANCE = 1e-3
_WORSE_IN_A_ROW = 2
_SMALL_ELEMENTS = 1 << 22

_Pair = tuple[Tensor, Tensor]  # features [N, D] and classes [N]


@dataclass(frozen=True)
class Linear:
    """Logistic regression by L-BFGS; the strength with the lowest log loss on `val`.

    Attributes:
        inverse_strengths: The choice, from strong to weak: scikit-learn's C, of the sum of the losses.
    """

    inverse_strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    draws: int = 1
    title: str = "linear"

    @property
    def protocol(self) -> str:
        """In a sentence."""
        return f"logistic regression on z-scored features, C of {list(self.inverse_strengths)} by validation loss"

    def scores(self, features: FloatArray, labels: Labels, split: Split, seed: int) -> Scores:  # noqa: ARG002 - as of `Probe`
        """Probabilities of the classes."""
        choice = self.choose(features, labels, split)
        return logistic_scores(features[split.train], labels[split.train], features[split.test], choice)

    def choose(self, features: FloatArray, labels: Labels, split: Split) -> float:
        """The strength with the lowest validation loss, the stronger of equals.

        The search ends once two weaker ones in a row are worse: those beyond overfit more, and take longest to fit.
        """
        classes = np.unique(labels[split.fit])
        with _threads(features[split.fit]):
            scaler = StandardScaler().fit(features[split.fit])
            fit, val = scaler.transform(features[split.fit]), scaler.transform(features[split.val])
            # Each strength starts from the solution of the one before it.
            probe = LogisticRegression(max_iter=_MAX_ITERATIONS, tol=_SEARCH_TOLERANCE, warm_start=True)
            losses: list[float] = []
            for inverse_strength in self.inverse_strengths:
                probe.set_params(C=inverse_strength).fit(fit, labels[split.fit])
                losses.append(log_loss(labels[split.val], probe.predict_proba(val), labels=classes))
                if int(np.argmin(losses)) < len(losses) - _WORSE_IN_A_ROW:
                    break
        return self.inverse_strengths[int(np.argmin(losses))]


@dataclass(frozen=True)
class Ridge:
    """Least squares on targets of -1 and 1 with an L2 penalty, in closed form; the strength by balanced accuracy.

    One eigendecomposition serves every strength, so it costs a fraction of logistic regression on wide features.

    Attributes:
        strengths: The choice, from strong to weak, per tile: of the mean of the squared errors.
    """

    strengths: tuple[float, ...] = (1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3)
    draws: int = 1
    title: str = "ridge"

    @property
    def protocol(self) -> str:
        """In a sentence."""
        return f"ridge on z-scored features, strength per tile of {list(self.strengths)} by validation accuracy"

    def scores(self, features: FloatArray, labels: Labels, split: Split, seed: int) -> Scores:  # noqa: ARG002 - as of `Probe`
        """Least-squares estimates of the targets."""
        classes = int(labels.max()) + 1
        told = _ridge(features[split.fit], labels[split.fit], features[split.val], self.strengths, classes)
        reached = [balanced_accuracy_score(labels[split.val], scores.argmax(axis=1)) for scores in told]
        choice = self.strengths[int(np.argmax(reached))]
        return _ridge(features[split.train], labels[split.train], features[split.test], (choice,), classes)[0]


@dataclass(frozen=True)
class VirchowLinear:
    """The linear probe of Virchow (arXiv 2309.07778) and Virchow2, as far as it is known.

    One linear layer on frozen embeddings, SGD with a cosine schedule from 0.01 to 0, batches of 4,096, 12,500
    iterations, no augmentation, and of all checkpoints the one with the lowest validation loss. Momentum 0.9 without
    weight decay is DINOv2's for linear probes: the papers name none. A tenth of the training part is their validation
    part where a dataset has none; here it is the split's.

    Attributes:
        learning_rate: At the start.
        batch: Tiles of a step, or all that there are.
        iterations: Steps.
        checks: How often the validation loss is taken.
    """

    learning_rate: float = 0.01
    batch: int = 4096
    iterations: int = 12_500
    checks: int = 125
    draws: int = 1
    title: str = "Virchow linear"

    @property
    def protocol(self) -> str:
        """In a sentence."""
        return (
            f"one linear layer on z-scored features, SGD with momentum 0.9, cosine from {self.learning_rate} to 0, "
            f"batch {self.batch}, {self.iterations} iterations, the checkpoint of the lowest validation loss"
        )

    def scores(self, features: FloatArray, labels: Labels, split: Split, seed: int) -> Scores:
        """Logits of the classes."""
        scaler = StandardScaler().fit(features[split.fit])
        fit, val, test = (
            torch.from_numpy(scaler.transform(features[rows]).astype(np.float32))
            for rows in (split.fit, split.val, split.test)
        )
        targets, val_targets = torch.from_numpy(labels[split.fit]), torch.from_numpy(labels[split.val])
        generator = torch.Generator().manual_seed(key(seed, "virchow linear") >> 1)
        layer = torch.nn.Linear(fit.shape[1], int(labels.max()) + 1)
        torch.nn.init.normal_(layer.weight, std=0.01, generator=generator)
        torch.nn.init.zeros_(layer.bias)
        with _threads(features[split.fit]):
            self._descend(layer, (fit, targets), (val, val_targets), generator)
            with torch.no_grad():
                logits: Scores = layer(test).double().numpy()
        return logits

    def _descend(self, layer: torch.nn.Linear, fit: _Pair, val: _Pair, generator: torch.Generator) -> None:
        """Leave the layer at the checkpoint of the lowest validation loss."""
        optimiser = torch.optim.SGD(layer.parameters(), lr=self.learning_rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.iterations)
        every = max(1, self.iterations // self.checks)
        lowest, best = float("inf"), copy.deepcopy(layer.state_dict())
        order, place = torch.empty(0, dtype=torch.int64), 0
        for iteration in range(1, self.iterations + 1):
            if place >= len(order):
                order, place = torch.randperm(len(fit[0]), generator=generator), 0
            rows = order[place : place + self.batch]
            place += self.batch
            optimiser.zero_grad()
            cross_entropy(layer(fit[0][rows]), fit[1][rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            if iteration % every == 0 or iteration == self.iterations:
                with torch.no_grad():
                    loss = float(cross_entropy(layer(val[0]), val[1]))
                if loss < lowest:
                    lowest, best = loss, copy.deepcopy(layer.state_dict())
        layer.load_state_dict(best)


def logistic_scores(train: FloatArray, labels: Labels, test: FloatArray, inverse_strength: float = 1.0) -> Scores:
    """Probabilities of the classes by logistic regression on features that are z-scored on the training rows.

    Args:
        train: float32 [N, D].
        labels: int64 [N], holding every class from 0 on.
        test: float32 [M, D].
        inverse_strength: scikit-learn's C.
    """
    probe: Pipeline = make_pipeline(
        StandardScaler(), LogisticRegression(C=inverse_strength, max_iter=_MAX_ITERATIONS, tol=_TOLERANCE)
    )
    with _threads(train):
        scores: Scores = probe.fit(train, labels).predict_proba(test).astype(np.float64)
    return scores


def _ridge(
    train: FloatArray, labels: Labels, test: FloatArray, strengths: tuple[float, ...], classes: int
) -> list[Scores]:
    """Scores [M, C] for each strength; the penalty is the strength times the number of training rows."""
    with _threads(train):
        scaler = StandardScaler().fit(train)
        train_ND = scaler.transform(train).astype(np.float64)
        test_MD = scaler.transform(test).astype(np.float64)
        targets_NC = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
        mean_C = targets_NC.mean(axis=0)
        # A wide matrix is decomposed on its short side: the solutions are the same.
        is_wide = train_ND.shape[1] > len(train_ND)
        gram = train_ND @ train_ND.T if is_wide else train_ND.T @ train_ND
        values, vectors = eigh(gram)
        right = targets_NC - mean_C if is_wide else train_ND.T @ (targets_NC - mean_C)
        left = test_MD @ train_ND.T if is_wide else test_MD
        projected, rotated = left @ vectors, vectors.T @ right
        return [projected @ (rotated / (values + strength * len(train))[:, None]) + mean_C for strength in strengths]


def _threads(matrix: NDArray[np.float32]) -> AbstractContextManager[object]:
    """One thread for a small matrix: more would wait for each other most of the time."""
    limits: AbstractContextManager[object] = (
        threadpool_limits(limits=1) if matrix.size < _SMALL_ELEMENTS else nullcontext()
    )
    return limits
