"""What a step tells of a run's health beside its losses: the same at every world size, up to the order of summation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from histoscale.checkpoint.fragments import EMA, MASTER
from histoscale.objectives.health import effective_rank, gram
from histoscale.objectives.kde import mean_cosine
from histoscale.train.objective import Losses
from histoscale.train.teacher import Average

WATCH_EVERY_STEPS = 10
"""What costs more than a few numbers is told of every tenth step, counted from the first of the run."""


def is_watched(step: int) -> bool:
    """Whether a step tells all that there is; a function of the step alone, so that a resumed run tells the same."""
    return step % WATCH_EVERY_STEPS == 0


class StepSums:
    """What the micro-steps of a rank add up to.

    Args:
        terms: How many terms the loss has.
        groups: How many groups of tiles there are.
        watched: Whether class tokens are added up, too.
        device: Of the losses.

    Attributes:
        losses: fp64 [terms], means over replicas.
        mean_cosine: fp64 scalar, likewise.
        groups_G2: fp64 [groups + 1, 2], the sum of the losses of a group's tiles, and their number; the last row is of
            those in no group.
        gram_DD: fp64, of the class tokens.
    """

    def __init__(self, terms: int, groups: int, watched: bool, device: torch.device) -> None:
        self.losses = torch.zeros(terms, dtype=torch.float64, device=device)
        self.mean_cosine = torch.zeros((), dtype=torch.float64, device=device)
        self.groups_G2 = torch.zeros(groups + 1, 2, dtype=torch.float64, device=device)
        self.gram_DD: Tensor | None = None
        self._watched = watched

    @torch.no_grad()
    def add(self, made: Losses, groups_b2: Tensor, share: float) -> None:
        """Add one micro-batch, which is `share` of the step's tiles."""
        self.losses += made.terms.detach() * share
        self.mean_cosine += mean_cosine(made.cls_bD) * share
        told_b2 = torch.stack([made.tiles_b.double(), torch.ones_like(made.tiles_b, dtype=torch.float64)], dim=1)
        for groups_b in groups_b2.unbind(dim=1):
            self.groups_G2.index_add_(0, groups_b, told_b2)
        if self._watched:
            gram_DD = gram(made.cls_bD)
            self.gram_DD = gram_DD if self.gram_DD is None else self.gram_DD.add_(gram_DD)


def group_means(names: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Mean loss of the tiles of each group that has tiles in this step.

    Args:
        names: Of the groups.
        sums: `StepSums.groups_G2` of all ranks, flat.
    """
    pairs = zip(names, sums[::2], sums[1::2], strict=False)
    return {name: total / count for name, total, count in pairs if count}


@dataclass(frozen=True)
class WeightsBefore:
    """A rank's share of the student before an update: on watched steps, one more copy of it for so long."""

    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, average: Average) -> "WeightsBefore":
        """A copy of the student that an average follows."""
        return cls({name: part.tensors[MASTER].clone() for name, part in average.masters.items()})

    @torch.no_grad()
    def compare(self, average: Average, device: torch.device) -> dict[str, float]:
        """How far the student has moved since, and how far its average is from it, relative to it (collective)."""
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for name, before in self.weights.items():
            now, mean = average.masters[name].tensors[MASTER], average.fragments[name].tensors[EMA]
            for place, values in enumerate((before.sub_(now), mean - now, now)):
                sums[place] += values.square().sum(dtype=torch.float64)
        dist.all_reduce(sums)
        moved, apart, length = sums.sqrt().tolist()
        return {"optim/update_norm": moved / length, "optim/ema_distance": apart / length}


def token_rank(sums: StepSums) -> dict[str, float]:
    """Effective rank of the class tokens of all ranks (collective)."""
    if sums.gram_DD is None:
        return {}
    dist.all_reduce(sums.gram_DD)
    return {"health/effective_rank": effective_rank(sums.gram_DD)}
