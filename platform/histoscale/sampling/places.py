"""Where tiles can be taken from a slide: a grid of squares over its tissue mask.

A region is a square of `region_px` pixels at the magnification's mpp. Regions of the grid do not overlap, lie
wholly inside the slide and start on whole level-0 pixels, so that a slide which has exactly the wanted scale is
read without resampling.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 1e-9  # scales and shares come from decimal text


class SlideGeometry(Protocol):
    """What the plan needs to know of a slide; `slides.index.SlideRecord` is one."""

    @property
    def slide_id(self) -> str:
        """Name of the slide in every table and log."""

    @property
    def width_px0(self) -> int:
        """Width in level-0 pixels."""

    @property
    def height_px0(self) -> int:
        """Height in level-0 pixels."""

    @property
    def mpp(self) -> float:
        """Microns per level-0 pixel."""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Tissue: bool [h, w]."""

    @property
    def mask_px0(self) -> float:
        """Level-0 pixels per mask pixel, on both axes."""


@dataclass(frozen=True)
class Grid:
    """Squares of one slide at one scale, numbered row by row.

    Attributes:
        columns: Squares side by side.
        rows: Squares on top of each other.
        left_px0: Left edge of the first square.
        top_px0: Upper edge of the first square.
        pitch_px0: Distance between neighbours: the side, rounded up to a whole pixel.
        side_px0: Side of a square.
    """

    columns: int
    rows: int
    left_px0: int
    top_px0: int
    pitch_px0: int
    side_px0: float

    def corners_px0(self, cells_P: NDArray[np.int32]) -> NDArray[np.float64]:
        """Upper left corners of the squares with these numbers: float64 [P, 2], x then y."""
        rows_P, columns_P = np.divmod(cells_P, max(self.columns, 1))
        x_P = self.left_px0 + columns_P.astype(np.float64) * self.pitch_px0
        y_P = self.top_px0 + rows_P.astype(np.float64) * self.pitch_px0
        return np.stack([x_P, y_P], axis=1)


def serves(slide_mpp: float, mpp: float, max_upsample: float) -> bool:
    """Whether a slide scanned at `slide_mpp` gives tiles at `mpp`, enlarged by at most `max_upsample`."""
    return slide_mpp <= mpp * max_upsample * (1.0 + _TOLERANCE)


def grid(width_px0: int, height_px0: int, side_px0: float) -> Grid:
    """Grid of squares of `side_px0`, centred in a slide of this size."""
    pitch_px0 = math.ceil(side_px0 * (1.0 - _TOLERANCE))
    columns, rows = width_px0 // pitch_px0, height_px0 // pitch_px0
    left_px0 = (width_px0 - columns * pitch_px0) // 2
    top_px0 = (height_px0 - rows * pitch_px0) // 2
    return Grid(columns, rows, left_px0, top_px0, pitch_px0, side_px0)


def integral(mask_HW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Integral image with a zero first row and column: int32 [H + 1, W + 1]."""
    table = np.zeros((mask_HW.shape[0] + 1, mask_HW.shape[1] + 1), np.int32)
    np.cumsum(mask_HW, axis=1, dtype=np.int32, out=table[1:, 1:])
    np.cumsum(table, axis=0, out=table)
    return table


def tissue_cells(
    squares: Grid, mask_integral: NDArray[np.int32], mask_px0: float, min_tissue: float
) -> NDArray[np.bool_]:
    """Which squares hold at least `min_tissue` tissue: bool [rows * columns].

    The share is exact, fractions of mask pixels included: an integral image is bilinear between its nodes. What
    lies beyond the mask holds no tissue.
    """
    x_C = (squares.left_px0 + squares.pitch_px0 * np.arange(squares.columns)) / mask_px0
    y_R = (squares.top_px0 + squares.pitch_px0 * np.arange(squares.rows)) / mask_px0
    side = squares.side_px0 / mask_px0
    bands = _interpolate(mask_integral, y_R + side, axis=0) - _interpolate(mask_integral, y_R, axis=0)
    area_RC = _interpolate(bands, x_C + side, axis=1) - _interpolate(bands, x_C, axis=1)
    return (area_RC >= (min_tissue - _TOLERANCE) * side * side).reshape(-1)


def places(slide: SlideGeometry, mpp: float, region_px: int, min_tissue: float) -> NDArray[np.float64]:
    """Upper left corners of the regions with enough tissue: float64 [P, 2], level-0 x then y, row by row."""
    squares = grid(slide.width_px0, slide.height_px0, region_px * mpp / slide.mpp)
    cells = tissue_cells(squares, integral(slide.mask), slide.mask_px0, min_tissue)
    return squares.corners_px0(np.flatnonzero(cells).astype(np.int32))


def _interpolate(table: NDArray[Any], at: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    last = table.shape[axis] - 1
    clipped = np.clip(at, 0.0, last)
    lower = np.minimum(clipped.astype(np.int64), max(last - 1, 0))
    share = np.expand_dims(clipped - lower, 1 - axis)
    upper = np.minimum(lower + 1, last)
    below, above = np.take(table, lower, axis), np.take(table, upper, axis)
    mixed: NDArray[np.float64] = below * (1.0 - share) + above * share
    return mixed
