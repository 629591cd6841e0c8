"""Reads batches of tiles of one slide, for a process that embeds them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histoscale.embeddings.files import SlideTiles
from histoscale.embeddings.spec import EmbeddingSpec
from histoscale.embeddings.tiling import Coords, Tiling
from histoscale.slides.catalogue import Catalogue, Locations, open_catalogue
from histoscale.slides.tiled import Region
from histoscale.stream.slide_pool import Refusal, SlidePool

TOO_COARSE = "it is scanned too coarsely for this scale"
NO_TILE = "no tile of it has enough tissue"


@dataclass(frozen=True)
class Source:
    """The slides that are read.

    Attributes:
        index_uri: The index, whose protected part says where the slides lie.
        snapshot_id: The snapshot of it.
        spec: How they are embedded.
        cache_folder: A node-local folder for copies of slides that cannot be read in place.
        cache_bytes: Disk of a node for these copies, which its readers share.
    """

    index_uri: str
    snapshot_id: str
    spec: EmbeddingSpec
    cache_folder: Path
    cache_bytes: int


@dataclass(frozen=True)
class Batch:
    """Tiles of one slide.

    Attributes:
        tiles: uint8 [n, side, side, 3].
        kept: Which of the wanted ones they are, ascending.
        refused: Reason -> how many of the others.
        whole_slide: Why nothing of the slide can be read, if that is so.
    """

    tiles: NDArray[np.uint8]
    kept: NDArray[np.int64]
    refused: Mapping[str, int] = field(default_factory=dict)
    whole_slide: str | None = None


def tiles_of(catalogue: Catalogue, row: int, tiling: Tiling) -> SlideTiles | str:
    """The tiles of a slide, or why it has none.

    Raises:
        SlideIndexError: The index is damaged.
    """
    entry = catalogue.rows[row]
    mpp = float(entry["mpp"])
    if not tiling.serves(mpp):
        return TOO_COARSE
    size_px0 = int(entry["width_px0"]), int(entry["height_px0"])
    coords, pitch_px0 = tiling.coords(catalogue.mask(row), size_px0, mpp, float(entry["mask_um"]))
    return SlideTiles(catalogue.slide_id(row), coords, pitch_px0, mpp, size_px0) if len(coords) else NO_TILE


class TileReader:
    """Reads tiles of the slides of an index, at exactly the wanted scale.

    Args:
        source: What is read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @cached_property
    def _slides(self) -> SlidePool:
        source = self._source
        catalogue = open_catalogue(source.index_uri, source.snapshot_id)
        return SlidePool(catalogue, Locations(catalogue), source.cache_folder, source.cache_bytes)

    def prepare(self) -> None:
        """Open the index.

        Raises:
            SlideIndexError: It is damaged.
            StorageError: It cannot be read.
        """
        _ = self._slides

    def read(self, row: int, coords_N2: Coords) -> Batch:
        """Read tiles of one slide.

        Args:
            row: The slide's row of the catalogue.
            coords_N2: Upper left corners of the tiles in level-0 px.

        Raises:
            StorageError: The slide's objects cannot be fetched for now.
        """
        tiling = self._source.spec.tiling
        side_px = tiling.tile_px
        regions = [Region(float(x), float(y), side_px, tiling.mpp) for x, y in coords_N2.tolist()]
        outcomes = self._slides.begin(row, regions)()
        refusals: list[Refusal] = []
        kept: list[int] = []
        tiles = np.empty((len(regions), side_px, side_px, 3), np.uint8)
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, Refusal):
                refusals.append(outcome)
            else:
                tiles[len(kept)] = outcome
                kept.append(number)
        whole = next((refusal.reason for refusal in refusals if refusal.whole_slide), None)
        reasons = Counter(refusal.reason for refusal in refusals)
        return Batch(tiles[: len(kept)], np.array(kept, np.int64), dict(reasons), whole)


def kept_tiles(
    tiles: SlideTiles, order: NDArray[np.int64], kept: Sequence[NDArray[np.int64]], batch_tiles: int
) -> tuple[SlideTiles, NDArray[np.int64]]:
    """The tiles of a slide that could be read, row by row, and where among them each one that was read belongs.

    Args:
        tiles: All of its tiles.
        order: int64 [N], in which order they were read, `batch_tiles` at a time.
        kept: Of each batch, which of its tiles could be read.
        batch_tiles: Size of a batch.
    """
    positions = order[np.concatenate([number * batch_tiles + part for number, part in enumerate(kept)])]
    ranks = np.empty(len(tiles.coords), np.int64)
    in_rows = np.sort(positions)
    ranks[in_rows] = np.arange(len(in_rows))
    left = SlideTiles(tiles.slide_id, tiles.coords[in_rows], tiles.pitch_px0, tiles.mpp, tiles.size_px0)
    return left, ranks[positions]
