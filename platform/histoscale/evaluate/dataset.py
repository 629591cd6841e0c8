"""A labelled dataset: one folder per class, holding tiles as PNG, JPEG or TIFF, on this machine or in a bucket."""

import io
import struct
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoscale.errors import DatasetError
from histoscale.storage import Store, open_store

MIN_TILES_PER_CLASS = 4
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})

Tile = NDArray[np.uint8]  # [h, w, 3], RGB

# What Pillow raises on a damaged file depends on the format and on where the damage is.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class LabelledTiles:
    """The tiles of a dataset, sorted by class and then by key.

    Attributes:
        name: Last part of the dataset's URI.
        classes: Names of the classes, sorted.
        keys: Objects in `store`, one per tile. They may hold patient data and belong in no message.
        labels: int64 [N], positions in `classes`.
        groups: str [N], whose tiles must not be parted (a patient, else a slide), where the dataset tells.
        centers: str [N], where a tile was scanned or stained, where the dataset tells.
        parts: str [N], "train", "val" or "test", where the dataset comes divided.
    """

    name: str
    classes: tuple[str, ...]
    store: Store
    keys: tuple[str, ...]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_] | None = None
    centers: NDArray[np.str_] | None = None
    parts: NDArray[np.str_] | None = None

    def counts(self) -> dict[str, int]:
        """Tiles of each class."""
        return dict(zip(self.classes, np.bincount(self.labels).tolist(), strict=True))

    def describe(self, index: int) -> str:
        """A tile as messages may call it: its class and its number within the class, from 0."""
        label = self.labels[index]
        return f"{self.classes[label]} #{index - int(np.searchsorted(self.labels, label))}"


def open_dataset(uri: str) -> LabelledTiles:
    """List the tiles of a dataset.

    Raises:
        DatasetError: There is no folder with tiles, only one class, or a class with too few tiles to split.
        StorageError: The place cannot be listed.
    """
    store = open_store(uri, private=True)
    by_class: dict[str, list[str]] = {}
    for info in store.list():
        path = PurePosixPath(info.key)
        hidden = any(part.startswith(".") for part in path.parts)
        if len(path.parts) > 1 and path.suffix.lower() in SUFFIXES and not hidden:
            by_class.setdefault(path.parts[0], []).append(info.key)
    _check(uri, by_class)
    classes = tuple(sorted(by_class))
    counts = [len(by_class[name]) for name in classes]
    return LabelledTiles(
        name=PurePosixPath(uri.rstrip("/")).name,
        classes=classes,
        store=store,
        keys=tuple(key for name in classes for key in by_class[name]),
        labels=np.repeat(np.arange(len(classes), dtype=np.int64), counts),
    )


def _check(uri: str, by_class: dict[str, list[str]]) -> None:
    layout = "one folder per class, with PNG, JPEG or TIFF tiles in it"
    if not by_class:
        raise DatasetError("the dataset has no labelled tiles", value=uri, expected=layout, remedy="correct --dataset")
    if len(by_class) < 2:
        raise DatasetError(
            "the dataset has one class only",
            value=next(iter(by_class)),
            expected="two classes or more: " + layout,
            remedy="give the folder that holds the folders of the classes",
        )
    small = {name: len(keys) for name, keys in sorted(by_class.items()) if len(keys) < MIN_TILES_PER_CLASS}
    if small:
        raise DatasetError(
            f"{len(small)} of {len(by_class)} classes have too few tiles",
            value=", ".join(f"{name}: {count}" for name, count in small.items()),
            expected=f"{MIN_TILES_PER_CLASS} tiles or more in each class",
            remedy="add tiles to these classes, or leave the classes out",
        )


def decode_tile(data: bytes) -> Tile | None:
    """The image that a file holds as RGB, or None where it is damaged or no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))
    except _DECODING_ERRORS:
        return None
