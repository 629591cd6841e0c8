"""One optimiser step of DINOv2's objective with Virchow2's KDE term, over V replicas on W ranks.

The loss is a mean over replicas, and everything that is shared by the step's tiles (Sinkhorn-Knopp, the gradient, the
metrics) is summed over all of them: which rank computes which replica changes nothing but the order of summation.

Shape suffixes: b tiles of a micro-batch, N patches of a global crop, K prototypes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from histoscale.augment.crops import Views, augment
from histoscale.augment.masks import block_masks
from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.errors import TrainingError
from histoscale.objectives import dino_loss, ibot_loss, kde_loss, sinkhorn
from histoscale.seeding import key
from histoscale.stream.faults import Fault
from histoscale.train.engine import StudentEngine
from histoscale.train.schedules import schedules_at
from histoscale.train.teacher import EMATeacher


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
    """What one step reports, the same on every rank. Losses are means over the step's replicas, unweighted.

    Attributes:
        images_seen: After the step.
        loss: The weighted sum that was minimised.
        grad_norm: Global, before clipping.
        stop: Some rank asked to stop after this step.
    """

    step: int
    images_seen: int
    loss: float
    dino: float
    ibot: float
    kde: float
    grad_norm: float
    lr: float
    weight_decay: float
    ema_momentum: float
    teacher_temperature: float
    stop: bool


@dataclass(frozen=True)
class _Inputs:
    """One micro-batch on the device."""

    replica: int
    views: Views
    mask: Tensor  # bool [2b, N]


@dataclass(frozen=True)
class _Targets:
    """The teacher's assignments for one micro-batch."""

    dino: Tensor  # [2b, K]
    ibot: Tensor  # [masked patches, K2]


class TrainStep:
    """Runs optimiser steps of a student and its teacher."""

    def __init__(self, recipe: Recipe, student: StudentEngine, teacher: EMATeacher) -> None:
        self._recipe = recipe
        self._student = student
        self._teacher = teacher
        self._grid = recipe.crops.global_px // ARCHS[recipe.model.arch].patch_px
        loss = recipe.loss
        self._weights = torch.tensor([loss.dino_weight, loss.ibot_weight, loss.kde_weight], device=student.device)

    def run(self, step: int, micro_batches: Sequence[MicroBatch | None], stop_requested: bool = False) -> StepMetrics:
        """Take one optimiser step (collective).

        Args:
            step: Number of the step.
            micro_batches: This rank's, one for each of its turns, as many on every rank; None is padding, a
                micro-step of weight zero. At least one must be real.
            stop_requested: Whether this rank wants the run to stop after this step.

        Raises:
            TrainingError: A loss or a gradient is not finite; raised on every rank, before anything is updated.
        """
        images_seen = (step + 1) * self._recipe.batch.tiles
        settings = schedules_at(self._recipe, images_seen)
        inputs = [self._prepare(micro_batch) for micro_batch in micro_batches if micro_batch is not None]
        targets = self._assign(inputs, settings.teacher_temperature)
        losses = self._accumulate_gradient(step, inputs, targets, turns=len(micro_batches))
        (dino, ibot, kde, loss), stop = self._agree(losses, stop_requested)
        grad_norm = self._student.step(settings)
        self._teacher.update(settings.ema_momentum)
        return StepMetrics(
            step=step,
            images_seen=images_seen,
            loss=loss,
            dino=dino,
            ibot=ibot,
            kde=kde,
            grad_norm=grad_norm,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            ema_momentum=settings.ema_momentum,
            teacher_temperature=settings.teacher_temperature,
            stop=stop,
        )

    def _prepare(self, micro_batch: MicroBatch) -> _Inputs:
        """Crops and masks, functions of the sample ids alone."""
        recipe, student = self._recipe, self._student
        tiles = torch.tensor(micro_batch.tiles, device=student.device)
        views = augment(tiles, micro_batch.sample_ids, recipe)
        mask = block_masks(micro_batch.sample_ids, recipe.seed, self._grid, recipe.loss)
        return _Inputs(micro_batch.replica, _cast(views, student.dtype), torch.from_numpy(mask).to(student.device))

    @torch.no_grad()
    def _assign(self, inputs: Sequence[_Inputs], temperature: float) -> list[_Targets]:
        """The teacher's logits of all local micro-batches, balanced over the tiles of the whole step."""
        outputs = [self._teacher(each.views.global_crops, each.mask) for each in inputs]
        crops = 2 * self._recipe.batch.tiles
        masked = torch.stack([each.mask.sum() for each in inputs]).to(torch.int64)
        patches = int(_all_reduce(masked.sum()))
        dino = self._balance([each["dino"] for each in outputs], temperature, crops)
        ibot = self._balance([each["ibot"] for each in outputs], temperature, patches)
        return [_Targets(*pair) for pair in zip(dino, ibot, strict=True)]

    def _balance(self, logits: Sequence[Tensor], temperature: float, total: int) -> list[Tensor]:
        iterations = self._recipe.loss.sinkhorn_iterations
        balanced = sinkhorn(torch.cat(list(logits)), temperature, iterations, total, _all_reduce)
        return list(torch.split(balanced, [len(each) for each in logits]))

    def _accumulate_gradient(
        self, step: int, inputs: Sequence[_Inputs], targets: Sequence[_Targets], turns: int
    ) -> Tensor:
        """Forward and backward of this rank's replicas; returns its share of the mean losses, [3]."""
        total = torch.zeros(3, device=self._student.device, dtype=torch.float64)
        for turn in range(turns):
            # Collectives of ZeRO 2 and 3 must match across ranks, so padding repeats the last input with weight zero.
            row = min(turn, len(inputs) - 1)
            share = 1.0 / self._recipe.batch.replicas if turn < len(inputs) else 0.0
            torch.manual_seed(key(self._recipe.seed, "droppath", step, inputs[row].replica))
            losses = self._losses(inputs[row], targets[row])
            self._student.backward((self._weights * losses).sum() * share)
            total += losses.detach() * share
        return total

    def _losses(self, inputs: _Inputs, targets: _Targets) -> Tensor:
        """DINO, iBOT and KDE of one micro-batch, [3]."""
        recipe, views = self._recipe, inputs.views
        outputs = self._student.forward(views.global_crops, views.local_crops, inputs.mask)
        temperature = recipe.loss.student_temperature
        dino = dino_loss(outputs["dino"], targets.dino, recipe.crops.local_count, temperature)
        ibot = ibot_loss(outputs["ibot"], targets.ibot, inputs.mask, temperature)
        first, second = outputs["cls"].chunk(2)
        kde = kde_loss(first, recipe.loss.kde_kappa) + kde_loss(second, recipe.loss.kde_kappa)
        return torch.stack([dino, ibot, kde])

    def _agree(self, losses: Tensor, stop_requested: bool) -> tuple[list[float], bool]:
        """DINO, iBOT, KDE and the weighted loss over all ranks, and whether any rank wants to stop."""
        weighted = (losses * self._weights).sum()
        wish = torch.tensor(float(stop_requested), device=losses.device, dtype=losses.dtype)
        *values, wishes = _all_reduce(torch.stack([*losses, weighted, wish])).tolist()
        if not all(map(math.isfinite, values)):
            raise TrainingError(
                "the loss is not finite, so no update was made",
                value=f"dino {values[0]}, ibot {values[1]}, kde {values[2]}",
                expected="finite numbers",
                remedy="lower optim.lr or train in fp32, then resume from the last commit",
            )
        return values, wishes > 0


def _cast(views: Views, dtype: torch.dtype) -> Views:
    local_crops = None if views.local_crops is None else views.local_crops.to(dtype)
    return Views(views.global_crops.to(dtype), local_crops)


def _all_reduce(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor
