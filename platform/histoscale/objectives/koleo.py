"""KoLeo, DINOv2's term that pushes each class token away from its nearest neighbour.

Shape suffixes: b tiles, G groups, g tiles of a group, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from histoscale.objectives.precision import fp32_or_finer

EPSILON = 1e-8  # [DINOv2] keeps the logarithm of equal features finite


def koleo_loss(cls_bD: Tensor, group: int | None = None) -> Tensor:
    """Minus the mean logarithm of the distance of each feature to its nearest neighbour on the unit sphere.

    It estimates the entropy after Kozachenko and Leonenko, up to constants. Near duplicates dominate it: their
    distance goes to 0, its logarithm to minus infinity.

    Args:
        cls_bD: The student's class tokens before the head, of one global crop (DINOv2 sums the term over the two).
        group: Consecutive tiles that are compared among themselves, two or more, a divisor of b; None: all.

    Returns:
        Scalar in fp32 or finer.
    """
    features_bD = F.normalize(fp32_or_finer(cls_bD), dim=-1)
    features_GgD = features_bD.view(-1, group or len(cls_bD), cls_bD.shape[1])
    with torch.no_grad():
        cosines_Ggg = features_GgD @ features_GgD.mT
        cosines_Ggg.diagonal(dim1=1, dim2=2).fill_(-2.0)
        nearest_Gg1 = cosines_Ggg.argmax(dim=2, keepdim=True)
    neighbours_GgD = features_GgD.gather(1, nearest_Gg1.expand_as(features_GgD))
    return -torch.log(torch.linalg.vector_norm(features_GgD - neighbours_GgD, dim=-1) + EPSILON).mean()
