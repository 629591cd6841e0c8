"""The teacher's assignments of rows to prototypes, held as the factors from which any part of them is made.

At 131,072 prototypes the probabilities of a step's rows do not fit into memory, but their factors do: a row's
probabilities are the softmax of its logits plus one potential for each prototype. Sinkhorn-Knopp, over the global
batch, and the centre of DINO are two ways to choose the potentials.

Shape suffixes: M local rows, m rows of a chunk, K prototypes, E bottleneck.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from histoscale.objectives.logits import CHUNK_ELEMENTS, Workspace, chunks
from histoscale.objectives.precision import fp32_or_finer


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Assignment:
    """Probabilities of M rows over K prototypes: softmax(features @ prototypes.T / temperature + log_potentials).

    Attributes:
        features_ME: The teacher's bottleneck, rows on the unit sphere, of any floating dtype.
        prototypes_KE: The teacher's prototypes, rows on the unit sphere, of the same dtype.
        temperature: The teacher's.
        log_potentials_K: In fp32 or fp64.
    """

    features_ME: Tensor
    prototypes_KE: Tensor
    temperature: float
    log_potentials_K: Tensor

    def __len__(self) -> int:
        return len(self.features_ME)

    def take(self, part: slice) -> "Assignment":
        """The same assignment of fewer rows."""
        return replace(self, features_ME=self.features_ME[part])

    @torch.no_grad()
    def probs(self, part: slice, workspace: Workspace | None = None) -> Tensor:
        """Probabilities of some rows, [m, K], in fp32 or finer; they lie in the workspace, if one is given."""
        features_mE = self.features_ME[part]
        workspace = workspace or Workspace(len(features_mE), self.prototypes_KE)
        plan_mK = workspace.logits(features_mE, self.prototypes_KE, self.temperature).add_(self.log_potentials_K)
        plan_mK.sub_(plan_mK.amax(dim=1, keepdim=True)).exp_()
        return plan_mK.div_(plan_mK.sum(dim=1, keepdim=True))


@torch.no_grad()
def sinkhorn(
    features_ME: Tensor,
    prototypes_KE: Tensor,
    temperature: float,
    iterations: int,
    total: int,
    all_reduce: Callable[[Tensor], Tensor] = _alone,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Assignment:
    """Assignment after `iterations` rounds of giving each prototype the mass total / K, then each row the mass 1.

    A rank passes the rows of all its micro-batches at once, and may have none: it still takes part in the sums.
    Each round costs one sum over the ranks, of K numbers in fp64, and makes all logits once more where they do not
    fit in one chunk.

    Args:
        features_ME: The teacher's bottleneck, rows on the unit sphere.
        prototypes_KE: The teacher's prototypes, rows on the unit sphere.
        temperature: The teacher's; exp(1 / temperature) must be finite in fp64.
        iterations: DINOv2 has 3.
        total: Rows over all ranks; for iBOT, the masked patches of the whole step. With none, all potentials are 0.
        all_reduce: Sums a tensor over the ranks, in place, and returns it.
        chunk_elements: Logits held at a time.

    Returns:
        The assignment of the local rows.
    """
    count, rows = len(prototypes_KE), len(features_ME)
    parts = chunks(rows, count, chunk_elements)
    workspace = Workspace(max((part.stop - part.start for part in parts), default=0), prototypes_KE)
    alone = len(parts) == 1  # then the logits stay for the next round, and the exponentials need room beside them
    scratch_mK = torch.empty_like(workspace.logits_mK) if alone else workspace.logits_mK
    log_potentials_K = torch.zeros(count, dtype=torch.float64, device=prototypes_KE.device)
    for done in range(iterations):
        sums_K = torch.zeros_like(log_potentials_K)
        for part in parts:
            if done == 0 or not alone:
                logits_mK = workspace.logits(features_ME[part], prototypes_KE, temperature)
            if done == 0:
                sums_K += _sums_of_exponentials(logits_mK, scratch_mK[: len(logits_mK)])
            else:
                sums_K += _sums_of_shares(logits_mK, log_potentials_K, scratch_mK[: len(logits_mK)])
        sums_K = all_reduce(sums_K)
        if total:
            log_potentials_K += math.log(total / count) - sums_K.log()
    return Assignment(features_ME, prototypes_KE, temperature, log_potentials_K.to(scratch_mK.dtype))


def _sums_of_exponentials(logits_mK: Tensor, scratch_mK: Tensor) -> Tensor:
    """Sum over the rows of exp(logits), [K], fp64: before the first round rows have no mass of their own."""
    peak_K = logits_mK.amax(dim=0)
    sums_K = torch.sub(logits_mK, peak_K, out=scratch_mK).exp_().sum(dim=0)
    return sums_K.double() * peak_K.double().exp()


def _sums_of_shares(logits_mK: Tensor, log_potentials_K: Tensor, scratch_mK: Tensor) -> Tensor:
    """Sum of the rows' probabilities, [K]; over all ranks it is 1 / K or more, so it does not vanish in fp32."""
    plan_mK = torch.add(logits_mK, log_potentials_K.to(logits_mK.dtype), out=scratch_mK)
    plan_mK.sub_(plan_mK.amax(dim=1, keepdim=True)).exp_()
    return plan_mK.sum(dim=1).reciprocal_() @ plan_mK


def centered(features_ME: Tensor, prototypes_KE: Tensor, temperature: float, center_K: Tensor) -> Assignment:
    """The assignment of DINO's centring: softmax((logits - center) / temperature).

    Args:
        features_ME: The teacher's bottleneck, rows on the unit sphere.
        prototypes_KE: The teacher's prototypes, rows on the unit sphere.
        temperature: The teacher's.
        center_K: Running mean of the logits.

    Returns:
        The assignment of the local rows.
    """
    return Assignment(features_ME, prototypes_KE, temperature, fp32_or_finer(center_K) / -temperature)


@torch.no_grad()
def logit_sums(features_ME: Tensor, prototypes_KE: Tensor) -> Tensor:
    """Sum of the logits over the rows, [K], in fp32 or finer, for the running mean that `centered` takes."""
    return fp32_or_finer(prototypes_KE) @ fp32_or_finer(features_ME).sum(dim=0)
