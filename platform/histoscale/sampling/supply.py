"""Which slides serve a magnification, and where: a compact table that is made once and shipped to every reader."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import PlanError
from histoscale.sampling.places import SlideGeometry, grid, integral, serves, tissue_cells
from histoscale.sampling.spec import PlanSpec
from histoscale.units import describe_mpp


@dataclass(frozen=True)
class Supply:
    """The n slides that serve one magnification; their places are packed bits over the cells of their grids.

    Attributes:
        mpp: The magnification.
        rows: int32 [n], rows of the plan's slides.
        counts: int32 [n], places of each.
        offsets: int64 [n + 1], first byte of each in `bits`.
        bits: uint8, one bit for each cell of a grid.
    """

    mpp: float
    rows: NDArray[np.int32]
    counts: NDArray[np.int32]
    offsets: NDArray[np.int64]
    bits: NDArray[np.uint8]

    def cells(self, entry: int) -> NDArray[np.int32]:
        """Numbers of the grid cells that are places of the slide in this entry: int32 [counts[entry]]."""
        packed = self.bits[self.offsets[entry] : self.offsets[entry + 1]]
        return np.flatnonzero(np.unpackbits(packed)).astype(np.int32)


def survey(spec: PlanSpec, slides: Sequence[SlideGeometry]) -> tuple[Supply, ...]:
    """Supply of each magnification of the mix; reads every mask once.

    Raises:
        PlanError: No slide serves a magnification.
    """
    found: list[list[tuple[int, int, NDArray[np.uint8]]]] = [[] for _ in spec.mix]
    for row, slide in enumerate(slides):
        served = [q for q, (mpp, _) in enumerate(spec.mix) if serves(slide.mpp, mpp, spec.max_upsample)]
        if not served:
            continue
        mask_integral = integral(slide.mask)
        for q in served:
            side_px0 = spec.region_px * spec.mix[q][0] / slide.mpp
            squares = grid(slide.width_px0, slide.height_px0, side_px0)
            cells = tissue_cells(squares, mask_integral, slide.mask_px0, spec.min_tissue)
            if cells.any():
                found[q].append((row, int(cells.sum()), np.packbits(cells)))
    return tuple(_supply(spec, slides, q, entries) for q, entries in enumerate(found))


def _supply(
    spec: PlanSpec, slides: Sequence[SlideGeometry], q: int, entries: list[tuple[int, int, NDArray[np.uint8]]]
) -> Supply:
    mpp = spec.mix[q][0]
    if not entries:
        scans = [slide.mpp for slide in slides]
        raise PlanError(
            f"no slide serves {describe_mpp(mpp)}",
            value=f"{len(scans)} slides at {min(scans):g} to {max(scans):g} um/px" if scans else "no slides",
            expected=f"a slide at {mpp * spec.max_upsample:g} um/px or finer with a region of {spec.region_px} px "
            f"that holds {spec.min_tissue:.0%} tissue",
            remedy="add slides, take this magnification out of data.mix, or lower data.min_tissue",
        )
    rows, counts, bits = zip(*entries, strict=True)
    offsets = np.cumsum([0, *(len(packed) for packed in bits)], dtype=np.int64)
    return Supply(mpp, np.array(rows, np.int32), np.array(counts, np.int32), offsets, np.concatenate(bits))
