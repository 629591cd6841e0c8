"""Cosine distance of features: what a student minimises that has no prototypes in common with its teacher.

Shape suffixes: B images, N patches, g rows and columns of their grid, W width of the features.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from histoscale.objectives.precision import fp32_or_finer


def cosine_distances(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos of each feature, which lie in the last dimension; both of one shape.

    Returns:
        The shape without its last dimension, in [0, 2], in fp32 or finer.
    """
    return 1.0 - F.cosine_similarity(fp32_or_finer(student), fp32_or_finer(teacher), dim=-1)


def resample_grid(patches_BNW: Tensor, rows: int) -> Tensor:
    """Features of a square grid of patches on another one: bicubic, antialiased where it is coarser.

    Args:
        patches_BNW: In row-major order.
        rows: Rows, and columns, of the grid that is wanted.

    Returns:
        [B, rows * rows, W], in fp32 or finer; the same tensor where the grid is the wanted one.
    """
    grid = math.isqrt(patches_BNW.shape[1])
    if grid == rows:
        return patches_BNW
    images, _, width = patches_BNW.shape
    plane_BWgg = fp32_or_finer(patches_BNW).transpose(1, 2).reshape(images, width, grid, grid)
    return F.interpolate(plane_BWgg, size=(rows, rows), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
