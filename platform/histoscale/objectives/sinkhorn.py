"""Sinkhorn-Knopp: the teacher's logits become probabilities that use all prototypes alike, over the global batch.

Shape suffixes: M local rows, K prototypes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from histoscale.objectives.precision import fp32_or_finer


def _alone(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def sinkhorn(
    logits: Tensor,
    temperature: float,
    iterations: int,
    total: int,
    all_reduce: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:
    """Assignments after `iterations` rounds of giving each prototype the mass total / K, then each row the mass 1.

    A rank passes the rows of all its micro-batches at once, and may have none: it still takes part in the sums.
    Each round costs one sum over the ranks, of K numbers.

    Args:
        logits: [M, K], cosines: exp(1 / temperature) must be finite in fp32.
        temperature: The teacher's.
        iterations: DINOv2 has 3.
        total: Rows over all ranks; for iBOT, the masked patches of the whole step.
        all_reduce: Sums a tensor over the ranks, in place, and returns it.

    Returns:
        [M, K], fp32, rows that sum to one.
    """
    plan_MK = torch.exp(fp32_or_finer(logits) / temperature)
    share = total / plan_MK.shape[1]
    for _ in range(iterations):
        plan_MK *= share / all_reduce(plan_MK.sum(dim=0))
        plan_MK /= plan_MK.sum(dim=1, keepdim=True)
    return plan_MK
