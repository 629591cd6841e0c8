"""One optimiser step over V replicas on W ranks.

The loss is a mean over replicas, and everything that is shared by the step's tiles (the balance of the targets, the
gradient, the metrics) is summed over all of them: which rank computes which replica changes nothing but the order of
summation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from histoscale.augment.crops import Views, augment
from histoscale.config.recipe import Recipe
from histoscale.errors import NonFiniteError
from histoscale.sampling.tile_groups import TileGroups
from histoscale.seeding import key
from histoscale.stream.faults import Fault
from histoscale.train.engine import StudentEngine
from histoscale.train.health import StepSums, WeightsBefore, group_means, is_watched, token_rank
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
    def mpp(self) -> NDArray[np.float64]:
        """[b], um/px."""

    @property
    def slides(self) -> NDArray[np.int32]:
        """[b], rows of the catalogue."""

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
        groups: Name of a group of tiles -> the mean of the class tokens' term over its tiles in this step; only groups
            that have some.
        watched: What is told of some steps only, by its name in `metrics.jsonl`.
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
    groups: Mapping[str, float] = field(default_factory=dict)
    watched: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """What a step learns from, on this rank: students of one teacher can share it.

    Attributes:
        inputs: Of this rank's real micro-batches.
        targets: What the teacher makes of each.
        groups: int64 [b, 2] of each, the groups of its tiles.
        turns: Micro-steps, those of padding included.
    """

    inputs: Sequence[Inputs]
    targets: Sequence[Any]
    groups: Sequence[Tensor]
    turns: int


class TrainStep:
    """Runs optimiser steps of a student, and of the average that follows it."""

    def __init__(
        self,
        recipe: Recipe,
        student: StudentEngine,
        objective: Objective[Any],
        average: Average,
        groups: TileGroups,
    ) -> None:
        self._recipe = recipe
        self._groups = groups
        self._student = student
        self._objective = objective
        self._average = average
        self._weights = torch.tensor(objective.weights, device=student.device)

    def prepare(self, step: int, micro_batches: Sequence[MicroBatch | None]) -> Prepared:
        """Crops of this rank's micro-batches, and what the teacher makes of them (collective).

        Args:
            step: Number of the step.
            micro_batches: This rank's, one for each of its turns, as many on every rank; None is padding, a
                micro-step of weight zero. At least one must be real.
        """
        settings = schedules_at(self._recipe, (step + 1) * self._recipe.batch.tiles)
        real = [micro_batch for micro_batch in micro_batches if micro_batch is not None]
        inputs = [self._prepare(micro_batch) for micro_batch in real]
        groups = [torch.from_numpy(self._groups.of(each.mpp, each.slides)).to(self._student.device) for each in real]
        targets = self._objective.targets(inputs, settings.teacher_temperature)
        return Prepared(inputs, targets, groups, len(micro_batches))

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
        sums = self._accumulate_gradient(step, prepared)
        terms, mean_cosine, loss, stop, groups = self._agree(sums, stop_requested)
        before = WeightsBefore.of(self._average) if is_watched(step) else None
        try:
            grad_norm = self._student.step(settings)
        except NonFiniteError as error:
            error.measured |= {**terms, "loss": loss}
            raise
        self._average.update(settings.ema_momentum)
        watched: dict[str, float] = {}
        if before is not None:
            moved = before.compare(self._average, self._student.device)
            watched = {**token_rank(sums), **self._objective.watch(prepared.targets), **moved}
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
            groups=groups,
            watched=watched,
        )

    def _prepare(self, micro_batch: MicroBatch) -> Inputs:
        """Crops and masks, functions of the sample ids alone."""
        tiles = torch.tensor(micro_batch.tiles, device=self._student.device)
        views = augment(tiles, micro_batch.sample_ids, self._recipe)
        mask = torch.from_numpy(self._objective.mask(micro_batch.sample_ids)).to(self._student.device)
        return Inputs(micro_batch.replica, _cast(views, self._student.dtype), mask)

    def _accumulate_gradient(self, step: int, prepared: Prepared) -> StepSums:
        """Forward and backward of this rank's replicas; returns its share of the means."""
        inputs, targets = prepared.inputs, prepared.targets
        sums = StepSums(len(self._weights), len(self._groups.names), is_watched(step), self._student.device)
        for turn in range(prepared.turns):
            # Collectives of ZeRO 2 and 3 must match across ranks, so padding repeats the last input with weight zero.
            row = min(turn, len(inputs) - 1)
            share = 1.0 / self._recipe.batch.replicas if turn < len(inputs) else 0.0
            torch.manual_seed(key(self._recipe.seed, "droppath", step, inputs[row].replica))
            made = self._objective.losses(self._student.forward, inputs[row], targets[row])
            self._student.backward((self._weights * made.terms).sum() * share)
            if share:
                sums.add(made, prepared.groups[row], share)
        return sums

    def _agree(
        self, sums: StepSums, stop_requested: bool
    ) -> tuple[dict[str, float], float, float, bool, dict[str, float]]:
        """Terms, mean cosine and weighted loss over all ranks, whether any rank wants to stop, means of groups."""
        losses = sums.losses
        weighted = (losses * self._weights).sum()
        wish = torch.tensor(float(stop_requested), device=losses.device, dtype=losses.dtype)
        shares = torch.cat([torch.stack([sums.mean_cosine, weighted, wish]), losses, sums.groups_G2.flatten()])
        mean_cosine, loss, wishes, *values = all_reduce(shares).tolist()
        terms = dict(zip(self._objective.names, values, strict=False))
        if not all(map(math.isfinite, [*terms.values(), loss])):
            raise NonFiniteError(
                "the loss is not finite, so no update was made",
                value=", ".join(f"{name} {value}" for name, value in terms.items()),
                expected="finite numbers",
                remedy="start another run, with a new --out and a lower optim.lr or precision=fp32",
                measured={**terms, "loss": loss},
            )
        return terms, mean_cosine, loss, wishes > 0, group_means(self._groups.names, values[len(terms) :])


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place, and return it."""
    dist.all_reduce(tensor)
    return tensor


def _cast(views: Views, dtype: torch.dtype) -> Views:
    local_crops = None if views.local_crops is None else views.local_crops.to(dtype)
    return Views(views.global_crops.to(dtype), local_crops)
