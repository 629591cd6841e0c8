"""The file of a slide's embeddings: HDF5 in the layout of TRIDENT, with what is needed to make it again.

    features  [n, D]  float16 or float32; attribute: name
    coords    [n, 2]  int64, x and y of upper left corners in level-0 px; attributes: patch_size, patch_size_level0,
                      level0_magnification, target_magnification, overlap, name, level0_width, level0_height

Rows go from top to bottom, from left to right. A slide is known by its keyed id alone.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from histoscale.embeddings.spec import EmbeddingSpec
from histoscale.embeddings.tiling import Coords
from histoscale.errors import EmbeddingError
from histoscale.storage import Store
from histoscale.storage.local import diagnosed_files
from histoscale.units import magnification

FORMAT, VERSION = "histoscale-embeddings", 1
FEATURES, COORDS = "features", "coords"
SUFFIX = ".h5"
_CHUNK_ROWS = 256


@dataclass(frozen=True)
class SlideTiles:
    """The tiles of a slide.

    Attributes:
        slide_id: Its keyed id.
        coords: int64 [n, 2].
        pitch_px0: Distance between neighbours in level-0 px.
        mpp: um per level-0 px.
        size_px0: Width and height of the slide.
    """

    slide_id: str
    coords: Coords
    pitch_px0: int
    mpp: float
    size_px0: tuple[int, int]


@dataclass(frozen=True)
class SlideEmbedding:
    """What a file holds.

    Attributes:
        slide_id: The slide.
        features: [n, D].
        coords: int64 [n, 2].
        side_px0: Side of a tile in level-0 px, rounded up.
        size_px0: Width and height of the slide.
    """

    slide_id: str
    features: NDArray[Any]
    coords: Coords
    side_px0: int
    size_px0: tuple[int, int]


def key_of(slide_id: str) -> str:
    """Name of the file of a slide."""
    return f"{slide_id}{SUFFIX}"


def write_embedding(
    store: Store, spec: EmbeddingSpec, snapshot_id: str, tiles: SlideTiles, features: NDArray[Any], refused: int
) -> None:
    """Write the file of a slide; it appears whole or not at all.

    Args:
        store: The folder of the embeddings.
        spec: How they were made.
        snapshot_id: Of the index.
        tiles: The tiles that were embedded.
        features: Of each of them, [n, D].
        refused: How many more were to be, but could not be read.

    Raises:
        EmbeddingError: A number is not finite.
        StorageError: It cannot be written.
    """
    if not np.isfinite(features).all():
        raise EmbeddingError(
            f"the embeddings of slide {tiles.slide_id} are not finite",
            value=f"{int((~np.isfinite(features)).any(axis=1).sum())} of {len(features)} tiles",
            expected=f"numbers that {spec.dtype} holds",
            remedy="take --dtype float32, or another checkpoint if that does not help",
        )
    with diagnosed_files("the folder of temporary files", private=True), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.h5"
        with h5py.File(path, "w") as file:
            _fill(file, spec, snapshot_id, tiles, features, refused)
        store.upload(path, key_of(tiles.slide_id))


def _fill(
    file: h5py.File, spec: EmbeddingSpec, snapshot_id: str, tiles: SlideTiles, features: NDArray[Any], refused: int
) -> None:
    side_px0 = spec.tiling.side_px0(tiles.mpp)
    rows = max(1, min(_CHUNK_ROWS, len(features)))
    kept = file.create_dataset(FEATURES, data=features, chunks=(rows, features.shape[1]), maxshape=(None, None))
    kept.attrs["name"] = tiles.slide_id
    places = file.create_dataset(COORDS, data=tiles.coords, chunks=(rows, 2), maxshape=(None, 2))
    target = magnification(spec.tiling.mpp)
    places.attrs.update(
        {
            "patch_size": spec.tiling.tile_px,
            "patch_size_level0": whole_side_px0(side_px0),
            "level0_magnification": round(magnification(tiles.mpp)),
            "target_magnification": round(target) if target.is_integer() else target,
            "overlap": spec.tiling.overlap_px,
            "name": tiles.slide_id,
            "level0_width": tiles.size_px0[0],
            "level0_height": tiles.size_px0[1],
        }
    )
    file.attrs.update(
        {
            "format": FORMAT,
            "version": VERSION,
            "histoscale": version("histoscale"),
            "fingerprint": spec.fingerprint,
            "snapshot_id": snapshot_id,
            "slide_id": tiles.slide_id,
            "slide_mpp": tiles.mpp,
            "side_px0": side_px0,
            "pitch_px0": tiles.pitch_px0,
            "refused_tiles": refused,
            **spec.facts(),
        }
    )


def whole_side_px0(side_px0: float) -> int:
    """A tile's side in whole level-0 px: with tiles side by side, their distance."""
    return int(np.ceil(side_px0 * (1.0 - 1e-9)))


@contextlib.contextmanager
def open_embedding(store: Store, slide_id: str) -> Iterator[h5py.File]:
    """The open file of a slide, for as long as the block runs.

    Raises:
        EmbeddingError: It is damaged, or none of ours.
        StorageError: It cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="histoscale-embedding-") as folder:
        path = store.local_path(key_of(slide_id))
        if path is None:
            path = Path(folder) / "slide.h5"
            store.download(key_of(slide_id), path)
        try:
            with h5py.File(path, "r") as file:
                yield file
        except (OSError, KeyError, RuntimeError, ValueError) as error:  # as HDF5 finds the damage
            raise EmbeddingError(
                f"the embeddings of slide {slide_id} cannot be read",
                value=type(error).__name__,
                expected=f"a file that jobs/embed.py wrote to {store.uri}",
                remedy="remove this file and run jobs/embed.py again",
            ) from None


def read_embedding(store: Store, slide_id: str, rows: NDArray[np.int64] | None = None) -> SlideEmbedding:
    """Embeddings and places of the tiles of a slide.

    Args:
        store: The folder of the embeddings.
        slide_id: The slide.
        rows: Ascending numbers of the wanted tiles; all by default.

    Raises:
        EmbeddingError: The file is damaged, or none of ours.
        StorageError: It cannot be read.
    """
    with open_embedding(store, slide_id) as file:
        wanted: Any = () if rows is None else rows
        places = file[COORDS]
        features, coords = np.asarray(file[FEATURES][wanted]), np.asarray(places[wanted], np.int64)
        if features.ndim != 2 or coords.shape != (len(features), 2):
            raise ValueError("shapes")
        size_px0 = int(places.attrs["level0_width"]), int(places.attrs["level0_height"])
        return SlideEmbedding(slide_id, features, coords, int(places.attrs["patch_size_level0"]), size_px0)


def count_tiles(store: Store, slide_id: str) -> int:
    """How many tiles the file of a slide holds; errors as those of `read_embedding`."""
    with open_embedding(store, slide_id) as file:
        return int(file[COORDS].shape[0])
