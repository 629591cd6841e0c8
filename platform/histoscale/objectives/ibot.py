"""iBOT: the student must predict the teacher's view of the patches that were hidden from it.

Shape suffixes: b tiles, N patches of a global crop, M masked patches, K prototypes.
"""

import torch.nn.functional as F
from torch import Tensor

from histoscale.objectives.precision import fp32_or_finer


def ibot_loss(student_logits: Tensor, teacher_probs: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each masked crop's patches, averaged in the crop, summed and divided by all 2b crops.

    As DINOv2 weighs it: one over the number of masked patches of the crop, and crops without a mask count in the
    divisor.

    Args:
        student_logits: [M, K], in row-major order of `mask`.
        teacher_probs: [M, K], rows that sum to one, of the same patches.
        mask: bool [2b, N].
        temperature: The student's; DINOv2 has 0.1.

    Returns:
        Scalar; zero, with a gradient of zero, when nothing is masked.
    """
    log_probs_MK = F.log_softmax(fp32_or_finer(student_logits) / temperature, dim=-1)
    cross_entropy_M = -(teacher_probs * log_probs_MK).sum(dim=-1)
    weight_2b1 = 1.0 / mask.sum(dim=1, keepdim=True).clamp(min=1).to(cross_entropy_M.dtype)
    return (cross_entropy_M * weight_2b1.expand(mask.shape)[mask]).sum() / mask.shape[0]
