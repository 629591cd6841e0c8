"""A small index of slides, and its tiles as a rank's feed would give them, read without Ray."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from tests.small_archive import grey_squares, write_small_archive

from histoscale.config.recipe import Recipe
from histoscale.sampling.replicas import replicas_of
from histoscale.slides.catalogue import open_catalogue
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
    return grey_squares(seed, low, high, (640, 800), square_px)


def write_archive(folder: Path, slides: Sequence[NDArray[np.uint8]]) -> str:
    """Write slides of 640 x 800 pixels at 0.5 um/px with their index into a folder; answers the snapshot."""
    return write_small_archive(folder, slides, NAME, [f"{number:032x}" for number in range(1, len(slides) + 1)])


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
