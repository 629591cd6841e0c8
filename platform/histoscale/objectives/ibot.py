"""iBOT: the student must predict the teacher's view of the patches that were hidden from it.

Shape suffixes: b tiles, N patches of a global crop, M masked patches, K prototypes, E bottleneck.
"""

import torch
from torch import Tensor

from histoscale.objectives.assignment import Assignment
from histoscale.objectives.cross_entropy import cross_entropy


def ibot_loss(
    student_ME: Tensor, prototypes_KE: Tensor, targets: Assignment, mask: Tensor, temperature: float
) -> Tensor:
    """Cross-entropy of each masked crop's patches, averaged in the crop, summed and divided by all 2b crops.

    As DINOv2 weighs it: one over the number of masked patches of the crop, and crops without a mask count in the
    divisor.

    Args:
        student_ME: The student's bottleneck, in row-major order of `mask`.
        prototypes_KE: The student's.
        targets: Of the same M patches.
        mask: bool [2b, N].
        temperature: The student's; DINOv2 has 0.1.

    Returns:
        Scalar; zero, with a gradient of zero, when nothing is masked.
    """
    weight_2b1 = 1.0 / (mask.sum(dim=1, keepdim=True).clamp(min=1).double() * len(mask))
    weights_M = weight_2b1.expand(mask.shape)[mask]
    pair_11 = torch.ones(1, 1, device=student_ME.device)
    return cross_entropy(student_ME[None], prototypes_KE, targets, pair_11, weights_M, temperature)
