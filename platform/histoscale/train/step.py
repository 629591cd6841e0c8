"""One optimiser step over V replicas on W ranks.

The loss is a mean over replicas, and everything that is shared by the step's tiles (the balance of the targets, the
gradient, the metrics) is summed over all of them: which rank computes which replica changes nothing but the order of
summation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from histoscale.augment.crops import Views, augment
from histoscale.config.recipe import Recipe
from histoscale.errors import NonFiniteError
from histoscale.seeding import key
from histoscale.stream.faults import Fault
from histoscale.train.engine import StudentEngine
from histoscale.train.objective import Inputs, Objective
from histoscale.train.schedules import schedules_at
from histoscale.train.teacher import Average


class MicroBatch(Protocol):
    """The tiles of one replica in one step."""

    @property
    def replica(self) -> int:
        """Index in 0..V-1."""

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """[b]."""

    @property
    def tiles(self) -> NDArray[np.uint8]:
        """[b, R, R, 3]."""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """Attempts at these samples that the content refused."""


@dataclass(frozen=True)
class StepMetrics:
    """What one step reports, the same on every rank.

    Attributes:
        images_seen: After the step.
        loss: The weighted sum that was minimised.
        terms: Each part of it, a mean over the step's replicas, unweighted.
        mean_cosine: Between the student's class tokens of different tiles, likewise; near 1 the model has collapsed.
        grad_norm: Global, before clipping.
        stop: Some rank asked to stop after this step.
    """

    step: int
    images_seen: int
    loss: float
    terms: Mapping[str, float]
    mean_cosine: float
    grad_norm: float
    lr: float
    weight_decay: float
    ema_momentum: float
    teacher_temperature: float
    stop: bool


@dataclass(frozen=True)
class Prepared:
    """What a step learns from, on this rank: students of one teacher can share it.

    Attributes:
        inputs: Of this rank's real micro-batches.
        targets: What the teacher makes of each.
        turns: Micro-steps, those of padding included.
    """

    inputs: Sequence[Inputs]
    targets: Sequence[Any]
    turns: int


class TrainStep:
    """Runs optimiser steps of a student, and of the average that follows it."""

    def __init__(self, recipe: Recipe, student: StudentEngine, objective: Objective[Any], average: Average) -> None:
        self._recipe = recipe
        self._student = student
        self._objective = objective
        self._average = average
        # The last value of a micro-batch, the mean cosine, is only watched.
        self._weights = torch.tensor([*objective.weights, 0.0], device=student.device)

    def prepare(self, step: int, micro_batches: Sequence[MicroBatch | None]) -> Prepared:
        """Crops of this rank's micro-batches, and what the teacher makes of them (collective).

        Args:
            step: Number of the step.
            micro_batches: This rank's, one for each of its turns, as many on every rank; None is padding, a
                micro-step of weight zero. At least one must be real.
        """
        settings = schedules_at(self._recipe, (step + 1) * self._recipe.batch.tiles)
        inputs = [self._prepare(micro_batch) for micro_batch in micro_batches if micro_batch is not None]
        targets = self._objective.targets(inputs, settings.teacher_temperature)
        return Prepared(inputs, targets, len(micro_batches))

    def update(self, step: int, prepared: Prepared, stop_requested: bool = False) -> StepMetrics:
        """Take one optimiser step (collective).

        Args:
            step: Number of the step.
            prepared: What `prepare` made of its micro-batches.
            stop_requested: Whether this rank wants the run to stop after this step.

        Raises:
            NonFiniteError: A loss or a gradient is not finite; raised on every rank, before anything is updated.
        """
        images_seen = (step + 1) * self._recipe.batch.tiles
        settings = schedules_at(self._recipe, images_seen)
        losses = self._accumulate_gradient(step, prepared)
        terms, mean_cosine, loss, stop = self._agree(losses, stop_requested)
        try:
            grad_norm = self._student.step(settings)
        except NonFiniteError as error:
            error.measured |= {**terms, "loss": loss}
            raise
        self._average.update(settings.ema_momentum)
        self._objective.advance()
        return StepMetrics(
            step=step,
            images_seen=images_seen,
            loss=loss,
            terms=terms,
            mean_cosine=mean_cosine,
            grad_norm=grad_norm,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            ema_momentum=settings.ema_momentum,
            teacher_temperature=settings.teacher_temperature,
            stop=stop,
        )

    def _prepare(self, micro_batch: MicroBatch) -> Inputs:
        """Crops and masks, functions of the sample ids alone."""
        tiles = torch.tensor(micro_batch.tiles, device=self._student.device)
        views = augment(tiles, micro_batch.sample_ids, self._recipe)
        mask = torch.from_numpy(self._objective.mask(micro_batch.sample_ids)).to(self._student.device)
        return Inputs(micro_batch.replica, _cast(views, self._student.dtype), mask)

    def _accumulate_gradient(self, step: int, prepared: Prepared) -> Tensor:
        """Forward and backward of this rank's replicas; returns its share of the mean losses."""
        inputs, targets = prepared.inputs, prepared.targets
        total = torch.zeros(len(self._weights), device=self._student.device, dtype=torch.float64)
        for turn in range(prepared.turns):
            # Collectives of ZeRO 2 and 3 must match across ranks, so padding repeats the last input with weight zero.
            row = min(turn, len(inputs) - 1)
            share = 1.0 / self._recipe.batch.replicas if turn < len(inputs) else 0.0
            torch.manual_seed(key(self._recipe.seed, "droppath", step, inputs[row].replica))
            losses = self._objective.losses(self._student.forward, inputs[row], targets[row])
            self._student.backward((self._weights * losses).sum() * share)
            total += losses.detach() * share
        return total

    def _agree(self, losses: Tensor, stop_requested: bool) -> tuple[dict[str, float], float, float, bool]:
        """Terms, mean cosine and weighted loss over all ranks, and whether any rank wants to stop."""
        weighted = (losses * self._weights).sum()
        wish = torch.tensor(float(stop_requested), device=losses.device, dtype=losses.dtype)
        *values, mean_cosine, loss, wishes = all_reduce(torch.stack([*losses, weighted, wish])).tolist()
        terms = dict(zip(self._objective.names, values, strict=True))
        if not all(map(math.isfinite, [*values, loss])):
            raise NonFiniteError(
                "the loss is not finite, so no update was made",
                value=", ".join(f"{name} {value}" for name, value in terms.items()),
                expected="finite numbers",
                remedy="start another run, with a new --out and a lower optim.lr or precision=fp32",
                measured={**terms, "loss": loss},
            )
        return terms, mean_cosine, loss, wishes > 0


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place, and return it."""
    dist.all_reduce(tensor)
    return tensor


def _cast(views: Views, dtype: torch.dtype) -> Views:
    local_crops = None if views.local_crops is None else views.local_crops.to(dtype)
    return Views(views.global_crops.to(dtype), local_crops)
