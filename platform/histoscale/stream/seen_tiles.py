"""Tiles of a plan read once more, to be looked at: what cannot be read is left out, and told."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import HistoscaleError
from histoscale.sampling.plan import TilePlan
from histoscale.slides.catalogue import Catalogue
from histoscale.slides.tiled import Region
from histoscale.stream.slide_pool import Outcome, Refusal, SlidePool


@dataclass(frozen=True)
class SeenTile:
    """A tile and its pixels.

    Attributes:
        plan: Which sample it is, of which place at which scale.
        slide_id: Of its slide.
        pixels: uint8 [R, R, 3].
    """

    plan: TilePlan
    slide_id: str
    pixels: NDArray[np.uint8]


def read_tiles(
    pool: SlidePool, catalogue: Catalogue, wanted: Sequence[TilePlan], side_px: int
) -> tuple[list[SeenTile], list[str]]:
    """The tiles that can be read, in their order, and a line for each slide of which one cannot.

    Args:
        pool: Reads the slides.
        catalogue: Of the slides.
        wanted: The tiles.
        side_px: Side of a region.
    """
    by_slide = [list(tiles) for _, tiles in groupby(sorted(wanted, key=_order), key=lambda tile: tile.row)]
    found: dict[int, SeenTile] = {}
    lines = []
    for tiles in by_slide:
        slide_id = catalogue.slide_id(tiles[0].row)
        outcomes = _read(pool, tiles, side_px)
        for tile, outcome in zip(tiles, outcomes, strict=True):
            if not isinstance(outcome, Refusal):
                found[tile.sample_id] = SeenTile(tile, slide_id, outcome)
        reasons = dict.fromkeys(outcome.reason for outcome in outcomes if isinstance(outcome, Refusal))
        lines += [f"tiles of slide {slide_id} are left out: {reason}" for reason in reasons]
    return [found[tile.sample_id] for tile in wanted if tile.sample_id in found], lines


def _read(pool: SlidePool, tiles: Sequence[TilePlan], side_px: int) -> list[Outcome]:
    try:
        return pool.begin(tiles[0].row, [Region(tile.x_px0, tile.y_px0, side_px, tile.mpp) for tile in tiles])()
    except HistoscaleError as error:  # of one slide; the others may be there
        return [Refusal(str(error), whole_slide=False)] * len(tiles)


def _order(tile: TilePlan) -> tuple[int, float, float]:
    return tile.row, tile.y_px0, tile.x_px0
