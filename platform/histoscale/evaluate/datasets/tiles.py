"""Labelled tiles, wherever they lie: what every dataset gives, and where its tiles come from."""

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoscale.storage import Store

TRAIN, VAL, TEST = "train", "val", "test"

Tile = NDArray[np.uint8]  # [h, w, 3], RGB
Labels = NDArray[np.int64]
Names = NDArray[np.str_]

# What Pillow raises on a damaged file depends on the format and on where the damage is.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class TileSource(Protocol):
    """Tiles by index, read when they are asked for.

    A source can be used by several threads at once, and can be pickled.
    """

    def __len__(self) -> int:
        """Number of tiles."""
        ...

    def read(self, index: int) -> tuple[bytes, Tile | None]:
        """The content that names a tile, and the tile, or None where it is damaged.

        Raises:
            StorageError: The tile's object cannot be read.
        """
        ...


@dataclass(frozen=True)
class FileTiles:
    """Tiles that are image files of their own.

    Attributes:
        store: Where they lie.
        keys: Objects in `store`, one per tile. They may hold patient data and belong in no message.
    """

    store: Store
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> tuple[bytes, Tile | None]:
        """The file's bytes, and the image in it."""
        data = self.store.get(self.keys[index])
        return data, decode_tile(data)


@dataclass(frozen=True)
class LabelledTiles:
    """The tiles of a dataset, sorted by class, and within a class in the order of the dataset.

    Attributes:
        name: Of the dataset: its layout's where the layout is that of one dataset, else the last part of its URI.
        classes: Names of the classes, sorted.
        source: The tiles.
        labels: int64 [N], positions in `classes`.
        groups: str [N], whose tiles must not be parted (a patient, else a slide), where the dataset tells.
        centers: str [N], where a tile was scanned or stained, where the dataset tells.
        parts: str [N], "train", "val" or "test", where the dataset comes divided.
    """

    name: str
    classes: tuple[str, ...]
    source: TileSource
    labels: Labels
    groups: Names | None = None
    centers: Names | None = None
    parts: Names | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> dict[str, int]:
        """Tiles of each class."""
        return dict(zip(self.classes, np.bincount(self.labels, minlength=len(self.classes)).tolist(), strict=True))

    def describe(self, index: int) -> str:
        """A tile as messages may call it: its class and its number within the class, from 0."""
        label = self.labels[index]
        return f"{self.classes[label]} #{index - int(np.searchsorted(self.labels, label))}"


@dataclass(frozen=True, slots=True)
class FileRow:
    """What a dataset says of a tile that is a file; "" where it does not say."""

    key: str
    label: str
    group: str = ""
    center: str = ""
    part: str = ""


def arrange(
    name: str,
    classes: tuple[str, ...],
    labels: Labels,
    source: Callable[[NDArray[np.int64]], TileSource],
    *,
    groups: Names | None = None,
    centers: Names | None = None,
    parts: Names | None = None,
) -> LabelledTiles:
    """Labelled tiles from those of a dataset in any order.

    Args:
        name: Of the dataset.
        classes: Names of the classes, sorted.
        labels: int64 [N], positions in `classes`.
        source: Makes the source of the tiles from their order, int64 [N].
        groups: str [N]; as of `LabelledTiles`, and `centers` and `parts` likewise.
        centers: See above.
        parts: See above.
    """
    order = np.argsort(labels, kind="stable").astype(np.int64)
    columns = [None if column is None else column[order] for column in (groups, centers, parts)]
    return LabelledTiles(name, classes, source(order), labels[order], *columns)


def from_files(name: str, classes: Sequence[str], store: Store, rows: Sequence[FileRow]) -> LabelledTiles:
    """Labelled tiles of image files; a column that any row leaves open is left out.

    Args:
        name: Of the dataset.
        classes: Names of the classes, sorted; every row's label is one of them.
        store: Where the files lie.
        rows: The tiles in the order that those of a class are to have.
    """
    position = {label: index for index, label in enumerate(classes)}
    labels = np.array([position[row.label] for row in rows], dtype=np.int64)
    keys = [row.key for row in rows]
    return arrange(
        name,
        tuple(classes),
        labels,
        lambda order: FileTiles(store, tuple(keys[index] for index in order)),
        groups=_column([row.group for row in rows]),
        centers=_column([row.center for row in rows]),
        parts=_column([row.part for row in rows]),
    )


def decode_tile(data: bytes) -> Tile | None:
    """The image that a file holds as RGB, or None where it is damaged or no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except _DECODING_ERRORS:
        return None


def _column(values: list[str]) -> Names | None:
    return np.array(values, dtype=np.str_) if values and all(values) else None
