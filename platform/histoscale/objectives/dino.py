"""DINO: the student's class tokens must predict the teacher's, across the crops of a tile.

Shape suffixes: b tiles, n local crops of a tile, M = (2 + n) b, K prototypes, E bottleneck. Crops are crop-major.
"""

import torch
from torch import Tensor

from histoscale.objectives.assignment import Assignment
from histoscale.objectives.cross_entropy import cross_entropy_and_parts


def dino_losses(
    student_ME: Tensor, prototypes_KE: Tensor, targets: Assignment, local_count: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over tiles and over the 2 + 2n pairs of crops.

    Each local crop is compared with both of the teacher's global crops, each global crop with the other one: the
    weighting of DINOv2, whose sums over 16 local and 2 global pairs are divided by 18.

    Args:
        student_ME: [2b + n*b, E], the student's bottleneck, global crops first.
        prototypes_KE: The student's.
        targets: Of the 2b global crops.
        local_count: n.
        temperature: The student's; DINOv2 has 0.1.

    Returns:
        Scalar, and the mean of each tile, [b], which has no gradient.
    """
    tiles = len(targets) // 2
    pairs_CT = torch.ones(2 + local_count, 2, device=student_ME.device)
    pairs_CT[:2].fill_diagonal_(0)
    weights_b = torch.full((tiles,), 1 / (tiles * (2 + 2 * local_count)), dtype=torch.float64, device=student_ME.device)
    student_CbE = student_ME.view(2 + local_count, tiles, student_ME.shape[1])
    loss, parts_b = cross_entropy_and_parts(student_CbE, prototypes_KE, targets, pairs_CT, weights_b, temperature)
    return loss, parts_b * tiles
