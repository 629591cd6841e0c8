"""Distillation from features: the student's projected tokens turn to the teacher's, by cosine.

Shape suffixes: b tiles, N patches of a global crop in the teacher's grid, W the teacher's width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histoscale.config.archs import ARCHS
from histoscale.config.recipe import DistillSection, Recipe
from histoscale.objectives.cosine import cosine_distances, resample_grid
from histoscale.train.objective import Forward, Inputs, Losses


@dataclass(frozen=True)
class Features:
    """What the teacher makes of the global crops of one micro-batch.

    Attributes:
        cls: [2b, W].
        patches: [2b, N, W], in row-major order of the teacher's grid.
    """

    cls: Tensor
    patches: Tensor


class FeatureObjective:
    """Cosine distance of class tokens and of patches, over the two global crops of every tile.

    Args:
        recipe: The student's.
        distill: Its weights are used.
        teacher: Global crops -> features.

    Attributes:
        names: The terms of the loss.
        weights: Of these.
        centers: None: features are not centred.
    """

    names = ("cls", "patch")

    def __init__(self, recipe: Recipe, distill: DistillSection, teacher: Callable[[Tensor], Features]) -> None:
        self._teacher = teacher
        self._grid = recipe.crops.global_px // ARCHS[recipe.model.arch].patch_px
        self.weights = (distill.cls_weight, distill.patch_weight)
        self.centers: dict[str, Tensor] = {}

    def mask(self, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Every patch of the student's: bool [2b, patches]."""
        return np.ones((2 * len(sample_ids), self._grid**2), np.bool_)

    def targets(self, inputs: Sequence[Inputs], temperature: float) -> list[Features]:  # noqa: ARG002 - see below
        """The teacher's features of each micro-batch; a temperature plays no part."""
        return [self._teacher(each.views.global_crops) for each in inputs]

    def advance(self) -> None:
        """Nothing but the networks has a state."""

    def watch(self, targets: Sequence[Features]) -> Mapping[str, float]:  # noqa: ARG002 - as of every objective
        """Nothing: features are assigned to no prototypes."""
        return {}

    def losses(self, forward: Forward, inputs: Inputs, targets: Features) -> Losses:
        """The student's forward pass over one micro-batch."""
        out = forward(inputs.views.global_crops)
        distances = cosine_distances(out["cls_features"], targets.cls)
        patches = cosine_distances(out["patch_features"], resample_grid(targets.patches, self._grid))
        first, _ = out["cls"].detach().chunk(2)
        tiles_b = distances.detach().view(2, -1).mean(dim=0)
        return Losses(torch.stack([distances.mean(), patches.mean()]), tiles_b, first)
