"""The kernel density estimator that Virchow2 puts in KoLeo's place: it pushes the class tokens apart.

Shape suffixes: b tiles, G groups, g tiles of a group, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from histoscale.objectives.precision import fp32_or_finer


def kde_loss(cls_bD: Tensor, kappa: float, group: int | None = None) -> Tensor:
    """Mean log density of each feature under a von Mises-Fisher kernel on all the others, up to a constant.

    (1/g) sum_i [log sum_{j != i} exp(kappa <x_i, x_j>) - log(g - 1)] with x on the unit sphere. Minimising it
    maximises the entropy, so its sign is plus. The kernel is the one that surveys report of Virchow2, with kappa 5
    and weight 0.05; the paper's own equation was not at hand. A feature's kernel on itself is a constant, so it is
    left out.

    Args:
        cls_bD: The student's class tokens before the head, of one global crop (DINOv2 sums such a term over the two).
        kappa: Concentration of the kernel.
        group: Consecutive tiles that are compared among themselves, two or more, a divisor of b; the loss is the mean
            over the groups. None: all b.

    Returns:
        Scalar in [-kappa, kappa].
    """
    size = group or len(cls_bD)
    features_GgD = F.normalize(fp32_or_finer(cls_bD), dim=-1).view(-1, size, cls_bD.shape[1])
    kernel_Ggg = kappa * features_GgD @ features_GgD.mT
    itself_gg = torch.eye(size, dtype=torch.bool, device=cls_bD.device)
    log_density_Gg = kernel_Ggg.masked_fill(itself_gg, -math.inf).logsumexp(dim=2) - math.log(size - 1)
    return log_density_Gg.mean()


@torch.no_grad()
def mean_cosine(cls_bD: Tensor) -> Tensor:
    """Mean cosine of two different features: near 1 where they collapse. Its cost is linear in b, which is 2 or more.

    Returns:
        Scalar in fp32 or finer.
    """
    features_bD = F.normalize(fp32_or_finer(cls_bD), dim=-1)
    count = len(features_bD)
    return (features_bD.sum(dim=0).square().sum() - features_bD.square().sum()) / (count * (count - 1))
