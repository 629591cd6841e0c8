"""One pass over a labelled dataset: each tile is read and decoded once, for every kind of feature at the same time."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets import LabelledTiles, Tile, TileSource
from histoscale.evaluate.progress import Tell, TileProgress, silent

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


def extract(
    dataset: LabelledTiles,
    extractors: Mapping[str, Extractor],
    batch_tiles: int = BATCH_TILES,
    tell: Tell = silent,
) -> Features:
    """Features of every tile under each extractor; see `extract_tiles`.

    Raises:
        DatasetError: Tiles cannot be decoded; all of them at once, by class and number.
    """
    content = hashlib.sha256("\x1f".join(dataset.classes).encode())

    def note(index: int, digest: bytes) -> None:
        content.update(bytes(dataset.labels[index]) + digest)

    by_name = extract_tiles(dataset.source, extractors, dataset.describe, note, batch_tiles, tell)
    return Features(by_name, content.hexdigest()[:16])


def extract_tiles(
    source: TileSource,
    extractors: Mapping[str, Extractor],
    describe: Callable[[int], str],
    note: Callable[[int, bytes], None] = lambda _index, _digest: None,
    batch_tiles: int = BATCH_TILES,
    tell: Tell = silent,
) -> dict[str, FloatArray]:
    """Features of every tile of a source: name of the extractor -> float32 [N, D].

    Args:
        source: The tiles.
        extractors: How features are taken from tiles, by name.
        describe: A tile as messages may call it.
        note: Takes each tile's number and the SHA-256 of its content, in order.
        batch_tiles: Tiles that an extractor gets at once.
        tell: Takes a line for people.

    Raises:
        DatasetError: Tiles cannot be decoded; all of them at once.
    """
    unreadable: list[int] = []
    progress = TileProgress(len(source), tell)
    parts: dict[str, list[FloatArray]] = {name: [] for name in extractors}
    for start, batch in _batches(source, batch_tiles):
        tiles = []
        for index, (digest, tile) in enumerate(batch, start):
            note(index, digest)
            if tile is None:
                unreadable.append(index)
            else:
                tiles.append(tile)
        if not unreadable:  # the rest of the pass only counts
            for name, extractor in extractors.items():
                parts[name].append(extractor(tiles))
        progress.done(start + len(batch))
    if unreadable:
        raise _unreadable(len(source), [describe(index) for index in unreadable])
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _batches(source: TileSource, batch_tiles: int) -> Iterator[tuple[int, list[tuple[bytes, Tile | None]]]]:
    def read(index: int) -> tuple[bytes, Tile | None]:
        content, tile = source.read(index)
        return hashlib.sha256(content).digest(), tile

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(source), batch_tiles):
            yield start, list(pool.map(read, range(start, min(start + batch_tiles, len(source)))))


def _unreadable(count: int, names: list[str]) -> DatasetError:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return DatasetError(
        f"{len(names)} of {count} tiles cannot be read",
        value=f"{', '.join(names[:_MAX_NAMED])}{more}, numbered from 0 in the order of each class",
        expected="whole PNG, JPEG or TIFF images",
        remedy="replace or remove these files",
    )
