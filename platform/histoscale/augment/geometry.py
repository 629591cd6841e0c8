"""Where the crops of a tile lie: a window of its region, in one of the square's poses, resampled once.

A window's sides are parallel to the region's, so a crop is a map of rows, a map of columns and perhaps a transposition.
It is resampled with the cubic kernel (a = -0.5) that widens where the window shrinks, as Pillow's does.

Shape suffixes: b crops, R side of the region, S side of the crop.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histoscale.augment.bands import Bands, apply_bands, make_bands
from histoscale.config.recipe import CropSection, RandomResized

GEOMETRY_DRAWS = 5  # size, aspect, x, y, pose

_POSES = {"dihedral": 8, "flips": 4, "none": 1}
_CUBIC_REACH = 2.0


@dataclass(frozen=True)
class Places:
    """Affine maps from the crop to the region, or to its transpose; lengths in pixels of the region.

    Attributes:
        rows: float64 [b, 2], (origin, extent): the crop's row `t` lies at origin + (t + 0.5) / S * extent; a flipped
            crop starts at the window's far edge and has a negative extent.
        columns: Likewise.
        turned: bool [b]; the rows of the crop run along the region's x, its columns along y.
    """

    rows: NDArray[np.float64]
    columns: NDArray[np.float64]
    turned: NDArray[np.bool_]

    def part(self, rows: slice) -> Self:
        """Those of some crops."""
        return type(self)(self.rows[rows], self.columns[rows], self.turned[rows])


@dataclass(frozen=True)
class Sizes:
    """How large windows are drawn: a side of base_px * (uniform in `scale`) ** power before the aspect."""

    base_px: int
    scale: tuple[float, float]
    power: float
    aspect: tuple[float, float]

    def longest_px(self, region_px: int) -> float:
        """Upper bound of a window's sides."""
        low, high = self.aspect
        side_px = self.base_px * math.pow(self.scale[1], self.power)
        return min(float(region_px), side_px * math.sqrt(max(high, 1.0 / low)))


def window_sizes(crops: CropSection, region_px: int, *, local: bool) -> Sizes:
    """Those of the recipe's local or global crops."""
    window = crops.window
    if isinstance(window, RandomResized):
        return Sizes(region_px, window.local_scale if local else window.global_scale, 0.5, window.aspect)
    power = 1.0 if window.scale_of == "side" else 0.5
    return Sizes(crops.local_px if local else crops.global_px, window.scale, power, window.aspect)


def draw_places(draws: NDArray[np.float64], sizes: Sizes, region_px: int, poses: str) -> Places:
    """Turn uniform draws [b, GEOMETRY_DRAWS] into places.

    The aspect (width over height) is log-uniform, the place uniform in the region, every pose equally likely. A window
    that does not fit in the region is shrunk until it does, and keeps its aspect.
    """
    scale, aspect, x, y, pose = draws.T
    low, high = sizes.scale
    side = sizes.base_px * (low + scale * (high - low)) ** sizes.power
    low, high = np.log(sizes.aspect)
    stretch = np.exp(0.5 * (low + aspect * (high - low)))
    side *= np.minimum(1.0, region_px / (side * np.maximum(stretch, 1.0 / stretch)))
    # A side that fills the region comes out longer by a rounding error, or shorter.
    width, height = (np.minimum(side_px, region_px) for side_px in (side * stretch, side / stretch))
    number = (_POSES[poses] * pose).astype(np.int64)
    turned = (number & 4) > 0
    left_width = np.stack([x * (region_px - width), width], axis=1)
    top_height = np.stack([y * (region_px - height), height], axis=1)
    return Places(
        rows=_flipped(np.where(turned[:, None], left_width, top_height), (number & 2) > 0),
        columns=_flipped(np.where(turned[:, None], top_height, left_width), (number & 1) > 0),
        turned=turned,
    )


def planes_of(tiles: Tensor, poses: str) -> Tensor:
    """Tiles with their channels first, and after them, where there are quarter turns, their transposes.

    Args:
        tiles: uint8 [b, R, R, 3].
        poses: The recipe's.

    Returns:
        uint8 [b or 2b, 3, R, R].
    """
    planes = tiles.permute(0, 3, 1, 2)
    return torch.cat([planes, planes.mT]) if poses == "dihedral" else planes.contiguous()


def cut(planes: Tensor, tile: NDArray[np.int64], places: Places, side_px: int, longest_px: float) -> Tensor:
    """Resample crops, each once.

    Args:
        planes: uint8, from `planes_of`.
        tile: [b]; which tile each crop is of.
        places: Of b crops.
        side_px: S.
        longest_px: Upper bound of the windows' sides, over all batches.

    Returns:
        float32 [b, 3, S, S] in [0, 1].
    """
    source = tile + places.turned * (len(planes) // 2)
    rows, columns = (
        _cubic_bands(axis, side_px, planes.shape[-1], longest_px / side_px, planes.device)
        for axis in (places.rows, places.columns)
    )
    return apply_bands(planes, source, rows, columns).mul_(1.0 / 255.0).clamp_(0.0, 1.0)


def _flipped(axis: NDArray[np.float64], flip: NDArray[np.bool_]) -> NDArray[np.float64]:
    origin, extent = axis.T
    return np.stack([np.where(flip, origin + extent, origin), np.where(flip, -extent, extent)], axis=1)


def _cubic_bands(
    axis: NDArray[np.float64], side_px: int, region_px: int, max_step: float, device: torch.device
) -> Bands:
    origin, extent = axis.T
    steps = extent / side_px
    shrinks = np.maximum(np.abs(steps), 1.0)
    widths = torch.from_numpy(shrinks).to(device, torch.float32).view(-1, 1, 1, 1)

    return make_bands(
        origin[:, None] + (np.arange(side_px) + 0.5) * steps[:, None],
        _CUBIC_REACH * shrinks,
        lambda distances: _cubic(distances.div_(widths)),
        length_px=region_px,
        max_step=max_step,
        max_reach_px=_CUBIC_REACH * max(max_step, 1.0),
        device=device,
    )


def _cubic(distance: Tensor) -> Tensor:
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return torch.where(distance < 1.0, near, torch.where(distance < _CUBIC_REACH, far, 0.0))
