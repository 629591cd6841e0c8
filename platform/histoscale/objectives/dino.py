"""DINO: the student's class tokens must predict the teacher's, across the crops of a tile.

Shape suffixes: b tiles, n local crops of a tile, K prototypes. Crops are crop-major.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from histoscale.objectives.precision import fp32_or_finer


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, local_count: int, temperature: float) -> Tensor:
    """Mean cross-entropy over tiles and over the 2 + 2n pairs of crops.

    Each local crop is compared with both of the teacher's global crops, each global crop with the other one: the
    weighting of DINOv2, whose sums over 16 local and 2 global pairs are divided by 18.

    Args:
        student_logits: [2b + n*b, K], global crops first.
        teacher_probs: [2b, K], rows that sum to one.
        local_count: n.
        temperature: The student's; DINOv2 has 0.1.

    Returns:
        Scalar.
    """
    tiles = teacher_probs.shape[0] // 2
    log_probs = F.log_softmax(fp32_or_finer(student_logits) / temperature, dim=-1)
    log_probs_CbK = log_probs.view(2 + local_count, tiles, -1)
    first_bK, second_bK = teacher_probs.chunk(2)
    crossed = (log_probs_CbK[0] * second_bK + log_probs_CbK[1] * first_bK).sum()
    local = torch.einsum("cbk,bk->", log_probs_CbK[2:], first_bK + second_bK)
    return -(crossed + local) / (tiles * (2 + 2 * local_count))
