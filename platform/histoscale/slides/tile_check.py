"""Whether a tile, as it was read, is fit for training: enough tissue, no ink, in focus.

A pure function of the pixels, in whole numbers and in arithmetic that IEEE 754 fixes to the last bit, so that a replay
decides alike on every machine. It looks at a sixteenth of the pixels for colour and at an eighth of the lines, each
way, for sharpness.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import SlideError
from histoscale.slides.tissue import FAR_PX, FLAT, SENSOR_NOISE, ink, stained

BACKGROUND = "background"
PEN = "pen"
BLUR = "blur"
FAULTS = (PEN, BACKGROUND, BLUR)
"""Every reason that `tile_fault` gives, in the order in which it looks for them: a reader counts by these."""

_STRIDE_PX = 4  # of the pixels whose colour is looked at
_CELL_UM = 24.0  # a cell with a membrane in it is tissue, so that fat is; a nucleus does not fill one, ink does
_CELL_PX = (16, 96)  # smaller ones hold too few looked-at pixels, larger ones are too few in a tile
_STAIN_OF_CELL = 16  # a cell is tissue from 1/16 of stained pixels on
_MAX_INK = 10  # a tile is refused from 1/10 of ink cells on
_MIN_CHROMA = 0.06
_GLASS = 246.0  # no tile knows its slide's glass; this is white for every scanner that the rules were measured on

_LINE_STRIDE_PX = 8  # every eighth row and every eighth column
_SHARP = ((0.25, 0.13), (0.5, 0.18), (1.0, 0.20), (2.0, 0.24))
"""Ratio of squared differences over 1 px and over 4 px that a sharp tile has, by um/px."""


@dataclass(frozen=True)
class TileCheck:
    """What a tile must have at least.

    Attributes:
        min_tissue: Share of the tile that is tissue, fat's empty cells counted in, 0 to 1; 0 switches the tests of
            colour off, the one for ink with them.
        min_sharpness: Sharpness in units of what a sharp tile has at this scale; 0 switches the test off. About 0.45
            refuses a defocus of two pixels and more.
    """

    min_tissue: float
    min_sharpness: float


def tile_fault(rgb: NDArray[np.uint8], mpp: float, check: TileCheck) -> str | None:
    """Say what makes a tile unfit for training.

    Args:
        rgb: The tile, uint8 [H, W, 3].
        mpp: Its microns per pixel.
        check: What it must have.

    Returns:
        None for a tile that is fit, else one of `FAULTS`.

    Raises:
        SlideError: The array is no tile, or the scale is not above zero.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or min(rgb.shape[:2]) < _CELL_PX[0]:
        raise SlideError(
            "tile cannot be checked",
            value=f"{rgb.dtype} {list(rgb.shape)}",
            expected=f"uint8 [H, W, 3] with sides of at least {_CELL_PX[0]} px",
        )
    if not 0 < mpp < float("inf"):
        raise SlideError("tile has no scale", value=mpp, expected="um/px above zero")
    if check.min_tissue > 0:
        tissue, inked, cells = _count_cells(rgb, mpp)
        if inked * _MAX_INK >= cells:
            return PEN
        if tissue < check.min_tissue * cells:
            return BACKGROUND
    if check.min_sharpness > 0 and sharpness(rgb, mpp) < check.min_sharpness:
        return BLUR
    return None


def sharpness(rgb: NDArray[np.uint8], mpp: float) -> float:
    """Sharpness of a tile [H, W, 3]: 1 is what sharp tissue has at this scale, 0 and less is nothing but noise."""
    near, far = _differences(np.ascontiguousarray(rgb[::_LINE_STRIDE_PX, :, 1]))
    near_down, far_down = _differences(np.ascontiguousarray(rgb[:, ::_LINE_STRIDE_PX, 1].T))
    ratio = (near + near_down - 2 * SENSOR_NOISE) / (far + far_down + 2 * FLAT)
    scales, ratios = zip(*_SHARP, strict=True)
    return ratio / float(np.interp(mpp, scales, ratios))


def _differences(lines: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean squared difference of lines [N, L] over one pixel and over `FAR_PX`."""
    values = lines.astype(np.int16)
    near = (values[:, 1:] - values[:, :-1]).ravel()
    far = (values[:, FAR_PX:] - values[:, :-FAR_PX]).ravel()
    return _mean_square(near), _mean_square(far)


def _mean_square(values: NDArray[np.int16]) -> float:
    # In float64 a sum of whole numbers is exact in any order; einsum starts no threads of BLAS for it.
    whole = values.astype(np.float64)
    return float(np.einsum("i,i->", whole, whole)) / whole.size


def _count_cells(rgb: NDArray[np.uint8], mpp: float) -> tuple[int, int, int]:
    """Number of cells of a tile with tissue, with ink, and of all."""
    red, green, blue = (rgb[::_STRIDE_PX, ::_STRIDE_PX, channel].astype(np.int32) >> 2 for channel in range(3))
    classes = _colour_classes().take((red << 12) | (green << 6) | blue)
    side = round(min(max(_CELL_UM / mpp, _CELL_PX[0]), _CELL_PX[1], min(rgb.shape[:2])) / _STRIDE_PX)
    rows, columns = classes.shape[0] // side, classes.shape[1] // side
    whole = classes[: rows * side, : columns * side].reshape(rows, side, columns, side)
    sums = whole.sum(axis=1).sum(axis=2)
    stains, inks = sums & 0xFFFF, sums >> 16
    is_ink = inks * 2 > side * side
    is_tissue = (stains * _STAIN_OF_CELL > side * side) & ~is_ink
    return int(np.count_nonzero(is_tissue)), int(np.count_nonzero(is_ink)), rows * columns


@cache
def _colour_classes() -> NDArray[np.int32]:
    """For each colour of six bits a channel: 1 for stain, 1 << 16 for ink, 0 for glass; one sum then counts both."""
    levels = np.arange(64) * 4 + 2
    # Whole thousandths: what follows is exact arithmetic, whatever logarithm a machine has.
    density = np.round(1000.0 * np.log(_GLASS / (levels + 1.0))).clip(0.0) / 1000.0
    planes = np.stack(np.meshgrid(density, density, density, indexing="ij")).reshape(3, -1)
    return np.where(ink(planes), np.int32(1 << 16), stained(planes, _MIN_CHROMA).astype(np.int32))
