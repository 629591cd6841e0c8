"""Extended-context translation (Virchow2): a crop of nearly its own size, anywhere in a larger region, in any pose.

Shape suffixes: b tiles, R side of the region, S side of the crop. Everything geometric is one affine map, so that a
crop is resampled once.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from histoscale.config.recipe import CropSection

GEOMETRY_DRAWS = 5  # side, aspect, x, y, pose

# A crop may shrink its window by this much before bicubic sampling, whose kernel does not widen, aliases visibly.
_ALIAS_FREE_SHRINK = 1.3

# The dihedral group of the square as maps of (x, y): four rotations by 90 degrees, and each with a flip.
_POSES_8x2x2 = np.array(
    [
        [[1, 0], [0, 1]],
        [[0, -1], [1, 0]],
        [[-1, 0], [0, -1]],
        [[0, 1], [-1, 0]],
        [[-1, 0], [0, 1]],
        [[0, 1], [1, 0]],
        [[1, 0], [0, -1]],
        [[0, -1], [-1, 0]],
    ],
    dtype=np.float64,
)


def crop_maps(draws: NDArray[np.float64], side_px: int, region_px: int, crops: CropSection) -> NDArray[np.float64]:
    """Affine maps from the crop's coordinates to the region's, both in [-1, 1] from edge to edge.

    The window's side is `side_px` times a factor uniform in `crops.scale`, its width over height log-uniform in
    `crops.aspect`, its place uniform in the region, its pose one of eight with equal chances.

    Args:
        draws: [b, GEOMETRY_DRAWS], uniform in [0, 1).
        side_px: Side of the crop.
        region_px: Side of the region.
        crops: The recipe's.

    Returns:
        [b, 2, 3].
    """
    scale, aspect, left, top, pose = draws.T
    side = side_px * (crops.scale[0] + scale * (crops.scale[1] - crops.scale[0]))
    low, high = np.log(crops.aspect)
    stretch = np.exp(0.5 * (low + aspect * (high - low)))
    extent_b2 = np.stack([side * stretch, side / stretch], axis=1) / region_px
    centre_b2 = (1.0 - extent_b2) * (2.0 * np.stack([left, top], axis=1) - 1.0)
    turned_b22 = extent_b2[:, :, None] * _POSES_8x2x2[(8 * pose).astype(np.int64)]
    return np.concatenate([turned_b22, centre_b2[:, :, None]], axis=2)


def cut(regions: Tensor, maps: NDArray[np.float64], side_px: int, crops: CropSection) -> Tensor:
    """Resample one crop of each region, bicubic, averaging finer samples where the recipe's scale shrinks windows.

    Args:
        regions: float32 [b, 3, R, R] in [0, 1].
        maps: [b, 2, 3] from `crop_maps`.
        side_px: S.
        crops: The recipe's.

    Returns:
        float32 [b, 3, S, S] in [0, 1].
    """
    finer = math.ceil(crops.scale[1] / _ALIAS_FREE_SHRINK)
    theta = torch.from_numpy(maps).to(regions.device, torch.float32)
    fine_px = finer * side_px
    grid = F.affine_grid(theta, [len(regions), 3, fine_px, fine_px], align_corners=False)
    sampled = F.grid_sample(regions, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, finer).clamp_(0.0, 1.0)
