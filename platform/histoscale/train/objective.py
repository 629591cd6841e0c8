"""What a step minimises: the student predicts the teacher's prototypes, and its class tokens keep apart.

One class serves pretraining, where the teacher is the student's own average and patches are hidden from the student,
and distillation from the heads of a frozen teacher, where nothing is hidden (DINOv2, arXiv 2304.07193, section 5).

Shape suffixes: b tiles, N patches of a global crop, K prototypes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histoscale.augment.crops import Views
from histoscale.augment.masks import block_masks
from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.objectives import (
    Assignment,
    centered,
    dino_losses,
    ibot_loss,
    kde_loss,
    koleo_loss,
    logit_sums,
    sinkhorn,
)
from histoscale.objectives.health import assignment_sums, perplexity

AllReduce = Callable[[Tensor], Tensor]


Forward: TypeAlias = Callable[..., dict[str, Tensor]]
"""The student's forward pass: that of its network."""

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """One micro-batch on the device.

    Attributes:
        replica: Which replica.
        views: Its crops, in the dtype that the networks compute in.
        mask: bool [2b, N], the patches that are compared.
    """

    replica: int
    views: Views
    mask: Tensor


@dataclass(frozen=True)
class Targets:
    """The teacher's assignments for one micro-batch, of its class tokens and of its chosen patches."""

    dino: Assignment
    ibot: Assignment


@dataclass(frozen=True)
class Losses:
    """What the student made of one micro-batch.

    Attributes:
        terms: [names], the terms of its loss.
        tiles_b: The term of the class tokens, tile by tile, without a gradient.
        cls_bD: The student's class tokens of the first global crop, likewise.
    """

    terms: Tensor
    tiles_b: Tensor
    cls_bD: Tensor


class Objective(Protocol[T]):
    """What a step minimises, as sums over the step's replicas; T is what it compares one micro-batch with."""

    @property
    def names(self) -> tuple[str, ...]:
        """The terms of the loss."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Of these."""

    def mask(self, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Patches that are compared, bool [2b, N]."""

    def targets(self, inputs: Sequence[Inputs], temperature: float) -> list[T]:
        """What the teacher makes of all local micro-batches (collective)."""

    def losses(self, forward: Forward, inputs: Inputs, targets: T) -> Losses:
        """The student's forward pass over one micro-batch."""

    def watch(self, targets: Sequence[T]) -> Mapping[str, float]:
        """What the targets of all local micro-batches tell of the run's health, by metric (collective)."""

    @property
    def centers(self) -> dict[str, Tensor]:
        """State of the run beside the networks, fp32 on the CPU, the same on every rank."""

    def advance(self) -> None:
        """Take over what the targets of a step changed in that state, once the step is taken."""


class Teacher(Protocol):
    """A network of the student's kind that only looks."""

    def __call__(self, global_crops: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Outputs of `SSLNet` for whole global crops; `mask` says which patches to project."""


class PrototypeObjective:
    """DINO + iBOT + KDE, and KoLeo where it has a weight.

    Args:
        recipe: The run's.
        teacher: Who is to be predicted.
        all_reduce: Sums a tensor over the ranks, in place, and returns it.
        hide_masked: Whether the student does not see the patches that iBOT compares.

    Attributes:
        names: The terms of the loss.
        weights: Of these.
        centers: Of the teacher's logits, where the recipe centres them: state of the run.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, all_reduce: AllReduce, *, hide_masked: bool) -> None:
        loss = recipe.loss
        self._recipe, self._teacher, self._all_reduce, self._hide_masked = recipe, teacher, all_reduce, hide_masked
        self._koleo = loss.koleo_weight > 0.0
        weights = {"dino": loss.dino_weight, "ibot": loss.ibot_weight, "kde": loss.kde_weight}
        if self._koleo:
            weights["koleo"] = loss.koleo_weight
        self.names, self.weights = tuple(weights), tuple(weights.values())
        self.centers: dict[str, Tensor] = {}
        self._next_centers: dict[str, Tensor] = {}
        if loss.centering == "center":
            heads = recipe.heads
            counts = {"dino": heads.dino_prototypes, "ibot": heads.ibot_prototypes}
            if heads.shared:
                counts["ibot"] = heads.dino_prototypes
            self.centers = {name: torch.zeros(count) for name, count in counts.items()}

    def mask(self, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Patches that iBOT compares, bool [2b, N]: those that are hidden, or all where none are."""
        recipe = self._recipe
        grid = recipe.crops.global_px // ARCHS[recipe.model.arch].patch_px
        if not self._hide_masked:
            return np.ones((2 * len(sample_ids), grid * grid), np.bool_)
        return block_masks(sample_ids, recipe.seed, grid, recipe.loss)

    @torch.no_grad()
    def targets(self, inputs: Sequence[Inputs], temperature: float) -> list[Targets]:
        """What the teacher makes of all local micro-batches, balanced over the tiles of the whole step (collective)."""
        outputs: list[dict[str, Tensor]] = []
        for each in inputs:
            out = self._teacher(each.views.global_crops, each.mask)
            # Every call makes all prototypes anew, which are the largest part of it: the first ones serve all.
            outputs.append({name: out[name] for name in ("dino", "ibot")} if outputs else out)
        patches = int(self._all_reduce(torch.stack([each.mask.sum() for each in inputs]).sum()))
        totals = {"dino": 2 * self._recipe.batch.tiles, "ibot": patches}
        parts = [self._assign(name, outputs, temperature, total) for name, total in totals.items()]
        return [Targets(*pair) for pair in zip(*parts, strict=True)]

    def losses(self, forward: Forward, inputs: Inputs, targets: Targets) -> Losses:
        """The student's forward pass over one micro-batch."""
        loss, crops = self._recipe.loss, self._recipe.crops
        views, mask = inputs.views, inputs.mask
        out = forward(views.global_crops, views.local_crops, mask, hide_masked=self._hide_masked)
        temperature = loss.student_temperature
        first, second = out["cls"].chunk(2)
        dino, tiles_b = dino_losses(out["dino"], out["dino_prototypes"], targets.dino, crops.local_count, temperature)
        terms = [
            dino,
            ibot_loss(out["ibot"], out["ibot_prototypes"], targets.ibot, mask, temperature),
            kde_loss(first, loss.kde_kappa, loss.spread_group) + kde_loss(second, loss.kde_kappa, loss.spread_group),
        ]
        if self._koleo:
            terms.append(koleo_loss(first, loss.spread_group) + koleo_loss(second, loss.spread_group))
        return Losses(torch.stack(terms), tiles_b, first.detach())

    @torch.no_grad()
    def watch(self, targets: Sequence[Targets]) -> Mapping[str, float]:
        """Entropy of the class tokens' targets, and which share of the prototypes the teacher prefers."""
        features_ME = torch.cat([each.dino.features_ME for each in targets])
        entropy, use_K = assignment_sums(replace(targets[0].dino, features_ME=features_ME))
        entropy, *use = self._all_reduce(torch.cat([entropy[None], use_K])).div_(2 * self._recipe.batch.tiles)
        return {
            "health/target_entropy": float(entropy),
            "health/prototype_use": perplexity(torch.stack(use)) / len(use_K),
        }

    def advance(self) -> None:
        """Move the centres: the next step is the first that sees them."""
        self.centers |= self._next_centers

    def _assign(
        self, name: str, outputs: Sequence[dict[str, Tensor]], temperature: float, total: int
    ) -> list[Assignment]:
        features, prototypes = [each[name] for each in outputs], outputs[0][f"{name}_prototypes"]
        together = torch.cat(features)
        if self.centers:
            center = self.centers[name].to(together.device)
            assignment = centered(together, prototypes, temperature, center)
            sums = self._all_reduce(logit_sums(together, prototypes))
            if total:
                momentum = self._recipe.loss.center_momentum
                self._next_centers[name] = (momentum * center + (1.0 - momentum) * sums / total).cpu()
        else:
            iterations = self._recipe.loss.sinkhorn_iterations
            assignment = sinkhorn(together, prototypes, temperature, iterations, total, self._all_reduce)
        ends = torch.tensor([0, *(len(each) for each in features)]).cumsum(0).tolist()
        return [assignment.take(slice(start, end)) for start, end in pairwise(ends)]
