"""The kernel density estimator that Virchow2 puts in KoLeo's place: it pushes the class tokens apart.

Shape suffixes: b tiles, D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from histoscale.objectives.precision import fp32_or_finer


def kde_loss(cls: Tensor, kappa: float) -> Tensor:
    """Mean log density of each feature under a von Mises-Fisher kernel on all the others, up to a constant.

    (1/b) sum_i [log sum_{j != i} exp(kappa <x_i, x_j>) - log(b - 1)] with x on the unit sphere. Minimising it
    maximises the entropy, so its sign is plus. The kernel is the one that surveys report of Virchow2, with kappa 5
    and weight 0.05; the paper's own equation was not at hand. A feature's kernel on itself is a constant, so it is
    left out.

    Args:
        cls: [b, D], b >= 2, the student's class tokens before the head, of one global crop (DINOv2 sums such a term
            over the two).
        kappa: Concentration of the kernel.

    Returns:
        Scalar in [-kappa, kappa].
    """
    features_bD = F.normalize(fp32_or_finer(cls), dim=-1)
    kernel_bb = kappa * features_bD @ features_bD.T
    itself_bb = torch.eye(len(cls), dtype=torch.bool, device=cls.device)
    return kernel_bb.masked_fill(itself_bb, -math.inf).logsumexp(dim=1).mean() - math.log(len(cls) - 1)
