"""Which tiles of a slide are embedded, and in which order they are read. Pure."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import EmbeddingError
from histoscale.sampling.places import coarsest_scan_mpp, grid, integral, tissue_cells
from histoscale.units import magnification

MAX_UPSAMPLE = 1.1
"""By how much a slide may be enlarged, as a recipe's `data.max_upsample` is by default."""
_BAND_ROWS = 8  # a square block of tiles touches fewer of a slide's own tiles than a strip of as many

Coords = NDArray[np.int64]  # [n, 2], x and y of upper left corners in level-0 px


@dataclass(frozen=True)
class Tiling:
    """Squares of one scale on a grid, as far as they hold tissue.

    Attributes:
        mpp: um/px of a tile.
        tile_px: Side of a tile.
        stride_px: Distance between neighbours in px of the tile; less than `tile_px` where they overlap.
        min_tissue: Least share of tissue of a tile.
    """

    mpp: float
    tile_px: int
    stride_px: int
    min_tissue: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise EmbeddingError("tiles have no scale", value=self.mpp, expected="um/px above zero, such as 0.5")
        if self.tile_px < 1:
            raise EmbeddingError("tiles have no size", value=self.tile_px, expected="a side of 1 px or more")
        if not 1 <= self.stride_px <= self.tile_px:
            raise EmbeddingError(
                "the stride does not cover the tissue",
                value=self.stride_px,
                expected=f"1 to {self.tile_px} px, the side of a tile",
                remedy="leave --stride-px out for tiles side by side, or give less for tiles that overlap",
            )
        if not 0.0 <= self.min_tissue <= 1.0:
            raise EmbeddingError("no tile has such a share of tissue", value=self.min_tissue, expected="0 to 1")

    @classmethod
    def of(cls, mpp: float, tile_px: int, stride_px: int | None, min_tissue: float) -> Self:
        """Such a tiling; tiles side by side where no stride is given."""
        return cls(mpp, tile_px, tile_px if stride_px is None else stride_px, min_tissue)

    @property
    def overlap_px(self) -> int:
        """How far neighbours overlap, in px of the tile."""
        return self.tile_px - self.stride_px

    @property
    def folder(self) -> str:
        """Name of the folder of such tiles, as TRIDENT has it."""
        return f"{magnification(self.mpp):g}x_{self.tile_px}px_{self.overlap_px}px_overlap"

    def serves(self, slide_mpp: float) -> bool:
        """Whether a slide of this scale is fine enough."""
        return slide_mpp <= coarsest_scan_mpp(self.mpp, MAX_UPSAMPLE)

    def side_px0(self, slide_mpp: float) -> float:
        """Side of a tile in level-0 px."""
        return self.tile_px * self.mpp / slide_mpp

    def coords(
        self, mask_HW: NDArray[np.bool_], size_px0: tuple[int, int], slide_mpp: float, mask_um: float
    ) -> tuple[Coords, int]:
        """The tiles of a slide, row by row from the top, each from the left; and the grid's pitch in level-0 px.

        Args:
            mask_HW: Its tissue.
            size_px0: Its width and height.
            slide_mpp: Its um/px.
            mask_um: um per px of the mask.
        """
        stride_px0 = self.stride_px * self.mpp / slide_mpp
        squares = grid(*size_px0, self.side_px0(slide_mpp), stride_px0)
        taken = tissue_cells(squares, integral(mask_HW), mask_um / slide_mpp, self.min_tissue)
        rows, columns = np.divmod(np.flatnonzero(taken), max(squares.columns, 1))
        x, y = squares.left_px0 + columns * squares.pitch_px0, squares.top_px0 + rows * squares.pitch_px0
        return np.stack([x, y], axis=1).astype(np.int64), squares.pitch_px0


def reading_order(coords_N2: Coords, pitch_px0: int) -> NDArray[np.int64]:
    """In which order tiles are read: in bands of rows, column by column, so that a batch is about a square block."""
    if not len(coords_N2):
        return np.zeros(0, np.int64)
    band_N = (coords_N2[:, 1] - coords_N2[:, 1].min()) // (pitch_px0 * _BAND_ROWS)
    return np.lexsort((coords_N2[:, 1], coords_N2[:, 0], band_N)).astype(np.int64)
