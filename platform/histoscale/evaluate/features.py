"""One pass over a labelled dataset: each tile is read and decoded once, for every kind of feature at the same time."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets import LabelledTiles, Tile

BATCH_TILES = 64
_READERS = 8  # reads wait for the bucket far longer than they decode
_MAX_NAMED = 10

FloatArray = NDArray[np.float32]
Extractor = Callable[[Sequence[Tile]], FloatArray]  # tiles -> [B, D], D of the extractor's own


@dataclass(frozen=True)
class Features:
    """Features of every tile of a dataset.

    Attributes:
        by_name: Name of the extractor -> float32 [N, D].
        content_hash: 16 hex digits that name the tiles and their labels, wherever they lie.
    """

    by_name: dict[str, FloatArray]
    content_hash: str


def extract(dataset: LabelledTiles, extractors: Mapping[str, Extractor], batch_tiles: int = BATCH_TILES) -> Features:
    """Features of every tile under each extractor.

    Raises:
        DatasetError: Tiles cannot be decoded; all of them at once, by class and number.
    """
    content = hashlib.sha256("\x1f".join(dataset.classes).encode())
    unreadable: list[int] = []
    parts: dict[str, list[FloatArray]] = {name: [] for name in extractors}
    for start, batch in _batches(dataset, batch_tiles):
        tiles = []
        for index, (digest, tile) in enumerate(batch, start):
            content.update(bytes(dataset.labels[index]) + digest)
            if tile is None:
                unreadable.append(index)
            else:
                tiles.append(tile)
        if not unreadable:  # the rest of the pass only counts
            for name, extractor in extractors.items():
                parts[name].append(extractor(tiles))
    if unreadable:
        raise _unreadable(dataset, unreadable)
    return Features({name: np.concatenate(rows) for name, rows in parts.items()}, content.hexdigest()[:16])


def _batches(dataset: LabelledTiles, batch_tiles: int) -> Iterator[tuple[int, list[tuple[bytes, Tile | None]]]]:
    def read(index: int) -> tuple[bytes, Tile | None]:
        content, tile = dataset.source.read(index)
        return hashlib.sha256(content).digest(), tile

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(dataset), batch_tiles):
            yield start, list(pool.map(read, range(start, min(start + batch_tiles, len(dataset)))))


def _unreadable(dataset: LabelledTiles, indices: list[int]) -> DatasetError:
    named = ", ".join(dataset.describe(index) for index in indices[:_MAX_NAMED])
    more = f" and {len(indices) - _MAX_NAMED} more" if len(indices) > _MAX_NAMED else ""
    return DatasetError(
        f"{len(indices)} of {len(dataset)} tiles cannot be read",
        value=f"{named}{more}, numbered from 0 in the order of each class",
        expected="whole PNG, JPEG or TIFF images",
        remedy="replace or remove these files",
    )
