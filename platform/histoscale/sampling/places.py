"""Where tiles can be taken from a slide: a grid of squares over its tissue mask.

A region is a square of `region_px` pixels at the magnification's mpp. Regions of the grid do not overlap, lie
wholly inside the slide and start on whole level-0 pixels, so that a slide which has exactly the wanted scale is
read without resampling.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 1e-9  # scales and shares come from decimal text


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
        width_px0: Width of the slide.
        height_px0: Height of the slide.
    """

    columns: int
    rows: int
    left_px0: int
    top_px0: int
    pitch_px0: int
    side_px0: float
    width_px0: int
    height_px0: int


@dataclass(frozen=True)
class SlidePlaces:
    """The squares of one slide at one scale that hold enough tissue.

    Attributes:
        squares: The grid.
        cells: int32 [P], their numbers in the grid, ascending: neighbours side by side mostly follow each other.
    """

    squares: Grid
    cells: NDArray[np.int32]


@dataclass(frozen=True)
class Frames:
    """The grids of N regions, column by column; float64 [N] each, as the fields of `Grid`."""

    columns: NDArray[np.float64]
    left_px0: NDArray[np.float64]
    top_px0: NDArray[np.float64]
    pitch_px0: NDArray[np.float64]
    side_px0: NDArray[np.float64]
    width_px0: NDArray[np.float64]
    height_px0: NDArray[np.float64]

    @classmethod
    def of(cls, grids: Sequence[Grid]) -> Self:
        """One row for each grid."""
        values = [
            (g.columns or 1, g.left_px0, g.top_px0, g.pitch_px0, g.side_px0, g.width_px0, g.height_px0) for g in grids
        ]
        return cls(*np.array(values, np.float64).T)

    def take(self, which_N: NDArray[np.int64]) -> Self:
        """The rows with these numbers."""
        return type(self)(*(getattr(self, name)[which_N] for name in self.__dataclass_fields__))

    def corners_px0(
        self, cells_N: NDArray[np.integer[Any]], sizes_N: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Upper left corners, x and y, of regions of `sizes_N` squares' sides, centred in their squares."""
        rows_N, columns_N = np.divmod(cells_N, self.columns)
        inset_N = np.floor((1.0 - sizes_N) * self.side_px0 / 2.0)
        return (
            self.left_px0 + columns_N * self.pitch_px0 + inset_N,
            self.top_px0 + rows_N * self.pitch_px0 + inset_N,
        )

    def moved_px0(
        self,
        x_N: NDArray[np.float64],
        y_N: NDArray[np.float64],
        sizes_N: NDArray[np.float64],
        shifts_N2: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Corners shifted by a part of the region's side (x, y), to whole pixels inside the slide."""
        side_N = sizes_N * self.side_px0
        return (
            np.clip(np.rint(x_N + shifts_N2[:, 0] * side_N), 0.0, np.floor(self.width_px0 - side_N)),
            np.clip(np.rint(y_N + shifts_N2[:, 1] * side_N), 0.0, np.floor(self.height_px0 - side_N)),
        )


def coarsest_scan_mpp(mpp: float, max_upsample: float) -> float:
    """Scale up to which a slide gives tiles at `mpp`, enlarged by at most `max_upsample`."""
    return mpp * max_upsample * (1.0 + _TOLERANCE)


def grid(width_px0: int, height_px0: int, side_px0: float, stride_px0: float | None = None) -> Grid:
    """Grid of squares of `side_px0`, centred in a slide of this size.

    Args:
        width_px0: Width of the slide.
        height_px0: Height of the slide.
        side_px0: Side of a square.
        stride_px0: Distance between neighbours, rounded up to a whole pixel; by default the side: no square overlaps.
    """
    whole_px0 = math.ceil(side_px0 * (1.0 - _TOLERANCE))
    pitch_px0 = whole_px0 if stride_px0 is None else math.ceil(stride_px0 * (1.0 - _TOLERANCE))
    columns, left_px0 = _laid(width_px0, whole_px0, pitch_px0)
    rows, top_px0 = _laid(height_px0, whole_px0, pitch_px0)
    return Grid(columns, rows, left_px0, top_px0, pitch_px0, side_px0, width_px0, height_px0)


def _laid(length_px0: int, side_px0: int, pitch_px0: int) -> tuple[int, int]:
    """How many squares lie side by side in a length, and where the first begins."""
    count = max(0, (length_px0 - side_px0) // pitch_px0 + 1)
    taken_px0 = (count - 1) * pitch_px0 + side_px0 if count else 0
    return count, (length_px0 - taken_px0) // 2


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


def find_places(
    mask_HW: NDArray[np.bool_], size_px0: tuple[int, int], side_px0: float, mask_px0: float, min_tissue: float
) -> SlidePlaces:
    """The places of one slide at one scale.

    Args:
        mask_HW: Tissue.
        size_px0: Width and height of the slide.
        side_px0: Side of a region.
        mask_px0: Level-0 pixels per mask pixel.
        min_tissue: Least share of tissue in a region.
    """
    squares = grid(*size_px0, side_px0)
    cells = tissue_cells(squares, integral(mask_HW), mask_px0, min_tissue)
    return SlidePlaces(squares, np.flatnonzero(cells).astype(np.int32))


def _interpolate(table: NDArray[Any], at: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    last = table.shape[axis] - 1
    clipped = np.clip(at, 0.0, last)
    lower = np.minimum(clipped.astype(np.int64), max(last - 1, 0))
    share = np.expand_dims(clipped - lower, 1 - axis)
    upper = np.minimum(lower + 1, last)
    below, above = np.take(table, lower, axis), np.take(table, upper, axis)
    mixed: NDArray[np.float64] = below * (1.0 - share) + above * share
    return mixed
