"""A small index of slides, and its tiles as a rank's feed would give them, read without Ray."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch.distributed as dist
from numpy.typing import NDArray

from histoscale.config.recipe import Recipe
from histoscale.sampling.replicas import replicas_of
from histoscale.slides.catalogue import open_catalogue
from histoscale.slides.index import SlideLocation, SlideRecord, make_index, write_index
from histoscale.slides.table_cache import TableCache
from histoscale.slides.tiled import open_tiled
from histoscale.storage import open_store
from histoscale.storage.ranges import open_ranges
from histoscale.stream.chapters import Chapter
from histoscale.stream.feed import MicroBatch
from histoscale.stream.reader import Reader, ReaderSpec

NAME = "Mustermann-1957-07-01"

# What a recipe's data must be for such slides: every place of them is tissue, however it looks.
DATA: dict[str, Any] = {
    "mix": [{"mpp": 0.5, "share": 1.0}, {"mpp": 1.0, "share": 1.0}],
    "min_tissue": 0.5,
    "min_tile_tissue": 0.0,
    "min_sharpness": 0.0,
}


def noise(seed: int, low: int, high: int, square_px: int = 16) -> NDArray[np.uint8]:
    """Squares whose grey values lie from `low` up to `high`."""
    shape = (640 // square_px, 800 // square_px, 3)
    coarse = np.random.default_rng(seed).integers(low, high, shape).astype(np.uint8)
    return np.kron(coarse, np.ones((square_px, square_px, 1), np.uint8))


def write_archive(folder: Path, slides: Sequence[NDArray[np.uint8]]) -> str:
    """Write slides of 640 x 800 pixels at 0.5 um/px with their index into a folder; answers the snapshot."""
    (folder / "slides").mkdir(parents=True)
    for n, pixels in enumerate(slides):
        tifffile.imwrite(
            folder / "slides" / f"{NAME}-{n}.tif",
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
    for n, info in enumerate(source.list()):
        slide = open_tiled([info], ranges, tables)
        assert slide is not None
        mask = np.ones((40, 50), bool)
        name = f"{n + 1:032x}"
        record = SlideRecord(name, "generic-tiff", 800, 640, 0.5, "tiff", info.size_bytes, (1.0,), mask, 16.0)
        records.append(replace(record, layout=slide.layout.to_bytes()))
        locations[name] = SlideLocation(source.uri, (info,), None)
    return write_index(open_store(folder / "index"), make_index(records, ()), locations).snapshot_id


def open_reader(recipe: Recipe, folder: Path) -> Reader:
    """A reader of the tiles of a recipe on the index in this folder."""
    index = str(folder / "index")
    return Reader(ReaderSpec.from_recipe(recipe, index, open_catalogue(index).snapshot_id, {}))


def read(reader: Reader, recipe: Recipe, step: int, replica: int) -> MicroBatch:
    """One micro-batch."""
    found = reader.read(Chapter(step // recipe.batch.chapter_steps, replica, step, step), replica)
    return MicroBatch(replica, found.sample_ids[0], found.tiles[0], found.mpp[0], found.slides[0], tuple(found.faults))


def read_turns(reader: Reader, recipe: Recipe, rank: int, step: int) -> list[MicroBatch | None]:
    """A rank's micro-batches of a step, None for padding."""
    mine = replicas_of(rank, dist.get_world_size(), recipe.batch.replicas)
    return [None if replica is None else read(reader, recipe, step, replica) for replica in mine]
