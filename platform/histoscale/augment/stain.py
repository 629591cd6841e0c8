"""Stain jitter: the amounts of haematoxylin, eosin and residue, each with a factor and an offset of its own.

Stains multiply in the light and add in optical density, -log10(RGB), where those of H&E lie along known directions
(Ruifrok and Johnston 2001); the jitter of their amounts is that of Tellez et al. 2018.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STAIN_DRAWS = 7  # whether, three factors, three offsets

# Ruifrok and Johnston 2001: optical density in red, green and blue of haematoxylin, eosin and DAB.
_DENSITIES = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_DARKEST = 1.0 / 255.0  # black has no finite density


def draw_stains(draws: NDArray[np.float64], probability: float, strength: float) -> NDArray[np.float64]:
    """How the logarithms of RGB change, as one affine map for each image: float64 [b, 3, 4], all zero for no change.

    Args:
        draws: [b, STAIN_DRAWS], uniform in [0, 1).
        probability: Share of the images that change.
        strength: A stain's amount is multiplied by a factor uniform in 1 +- strength, and a density uniform in
            +- strength is added to it.
    """
    chosen, jitter = draws[:, 0] < probability, strength * (2.0 * draws[:, 1:] - 1.0)
    factor_b3, offset_b3 = 1.0 + jitter[:, :3], jitter[:, 3:]
    # Of rows: density = stains @ _DENSITIES; so stains * factor + offset is the density's map below.
    linear = np.linalg.inv(_DENSITIES) @ (factor_b3[:, :, None] * _DENSITIES) - np.eye(3)
    constant = -math.log(10.0) * (offset_b3 @ _DENSITIES)
    change: NDArray[np.float64] = np.concatenate([linear.transpose(0, 2, 1), constant[:, :, None]], axis=2)
    return change * chosen[:, None, None]


def restain(images: Tensor, change: NDArray[np.float64]) -> Tensor:
    """Apply maps of `draw_stains`, in place: float32 [b, 3, S, S] in [0, 1]; a zero map changes no bit."""
    change_b34 = torch.from_numpy(change).to(images.device, torch.float32)
    logs = images.clamp(min=_DARKEST).log_().flatten(2)
    gain = torch.baddbmm(change_b34[:, :, 3:], change_b34[:, :, :3], logs).exp_()
    return images.mul_(gain.view_as(images)).clamp_(max=1.0)
