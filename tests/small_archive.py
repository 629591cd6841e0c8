"""Small slides at 0.5 um/px, all of them tissue, with their index: for tests that read tiles without a job."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from histoscale.slides.index import make_index, write_index
from histoscale.slides.records import SlideLocation, SlideRecord
from histoscale.slides.table_cache import TableCache
from histoscale.slides.tiled import open_tiled
from histoscale.storage import open_store
from histoscale.storage.ranges import open_ranges

_MASK_PX = 16


def grey_squares(seed: int, low: int, high: int, shape: tuple[int, int], square_px: int = 16) -> NDArray[np.uint8]:
    """Squares whose channels lie from `low` up to `high`: [height, width, 3]."""
    size = (shape[0] // square_px, shape[1] // square_px, 3)
    coarse = np.random.default_rng(seed).integers(low, high, size).astype(np.uint8)
    return np.kron(coarse, np.ones((square_px, square_px, 1), np.uint8))


def write_small_archive(
    folder: Path,
    slides: Sequence[NDArray[np.uint8]],
    stem: str,
    ids: Sequence[str],
    columns: tuple[str, ...] = (),
    strata: Sequence[tuple[str, ...]] | None = None,
) -> str:
    """Write slides and their index into a folder; gives the snapshot.

    Args:
        folder: Gets slides/ and index/.
        slides: Pixels of each, [height, width, 3].
        stem: Of the names of files.
        ids: Of the slides.
        columns: Names of the strata.
        strata: Of each slide.
    """
    (folder / "slides").mkdir(parents=True)
    for number, pixels in enumerate(slides):
        tifffile.imwrite(
            folder / "slides" / f"{stem}-{number}.tif",
            pixels,
            tile=(128, 128),
            compression="deflate",
            photometric="rgb",
            resolution=(20_000, 20_000),
            resolutionunit="CENTIMETER",
        )
    source, tables = open_store(folder / "slides", private=True), TableCache()
    ranges = open_ranges(source.uri)
    records, locations = [], {}
    values = [()] * len(slides) if strata is None else strata
    for slide_id, pixels, value, info in zip(ids, slides, values, source.list(), strict=True):
        slide = open_tiled([info], ranges, tables)
        assert slide is not None
        height, width = pixels.shape[:2]
        mask = np.ones((height // _MASK_PX, width // _MASK_PX), bool)
        about = ("generic-tiff", width, height, 0.5, "tiff", info.size_bytes, (1.0,), mask, float(_MASK_PX))
        records.append(SlideRecord(slide_id, *about, layout=slide.layout.to_bytes(), strata=value))
        locations[slide_id] = SlideLocation(source.uri, (info,), None)
    return write_index(open_store(folder / "index"), make_index(records, (), columns), locations).snapshot_id
