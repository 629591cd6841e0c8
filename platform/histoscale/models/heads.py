"""Projection heads of DINO and iBOT: MLP, bottleneck on the unit sphere, prototypes on the unit sphere.

A head stops before the logits, the cosines of features with prototypes: at 131,072 prototypes they would not fit, and
the objectives make them a part at a time.

Shape suffixes: M tokens, D width of the backbone, K prototypes, E bottleneck.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """A weight-normed linear layer whose gain is fixed to 1, as the two factors of its product."""

    def __init__(self, bottleneck: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, bottleneck))

    def forward(self, features_ME: Tensor) -> tuple[Tensor, Tensor]:
        """Features [M, E] and prototypes [K, E] on the unit sphere, in the features' dtype; norms are taken in fp32."""
        unit_ME = F.normalize(features_ME.float(), dim=-1).to(features_ME.dtype)
        unit_KE = F.normalize(self.weight.float(), dim=-1).to(features_ME.dtype)
        return unit_ME, unit_KE


class ProjectionHead(nn.Module):
    """Three layers with GELU, then prototypes (DINOv2's head)."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = Prototypes(bottleneck, prototypes)

    def forward(self, tokens_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Features [M, E] and prototypes [K, E], both on the unit sphere."""
        projected: tuple[Tensor, Tensor] = self.prototypes(self.mlp(tokens_MD))
        return projected
