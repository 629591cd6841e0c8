"""Any folder with a folder of tiles per class; and what every dataset of a user's own must hold."""

import re
from collections import Counter
from pathlib import PurePosixPath

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets.layout import Layout, Listing
from histoscale.evaluate.datasets.tiles import FileRow, LabelledTiles, from_files

MIN_TILES_PER_CLASS = 4
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})

_EXPECTED = "one folder per class, with PNG, JPEG or TIFF tiles in it"


def _read(layout: Layout, listing: Listing, _: str) -> LabelledTiles:  # noqa: ARG001 - as of `Layout.read`
    by_class: dict[str, list[str]] = {}
    for key in listing.keys:
        path = PurePosixPath(key)
        if len(path.parts) > 1 and path.suffix.lower() in SUFFIXES:
            by_class.setdefault(path.parts[0], []).append(key)
    uri = listing.store.uri
    if not by_class:
        raise DatasetError(
            "the dataset has no labelled tiles",
            value=uri,
            expected=_EXPECTED,
            remedy="correct the place of the dataset",
        )
    classes = sorted(by_class)
    rows = [FileRow(key, label) for label in classes for key in by_class[label]]
    check_classes(rows, _EXPECTED, "give the folder that holds the folders of the classes")
    return from_files(PurePosixPath(uri).name, classes, listing.store, rows)


def check_classes(rows: list[FileRow], expected: str, remedy: str) -> None:
    """Refuse tiles that no probe could be fitted to and judged on.

    Args:
        rows: The tiles; one at least.
        expected: Their layout, in words.
        remedy: What to do where all tiles are of one class.

    Raises:
        DatasetError: There is only one class, or a class with too few tiles to split.
    """
    counts = Counter(row.label for row in rows)
    if len(counts) < 2:
        raise DatasetError(
            "the dataset has one class only",
            value=next(iter(counts)),
            expected="two classes or more: " + expected,
            remedy=remedy,
        )
    small = {name: count for name, count in sorted(counts.items()) if count < MIN_TILES_PER_CLASS}
    if small:
        raise DatasetError(
            f"{len(small)} of {len(counts)} classes have too few tiles",
            value=", ".join(f"{name}: {count}" for name, count in small.items()),
            expected=f"{MIN_TILES_PER_CLASS} tiles or more in each class",
            remedy="add tiles to these classes, or leave the classes out",
        )


FOLDERS = Layout("folders", _EXPECTED, re.compile(r"[^/]+/.+\.(?:png|jpe?g|tiff?)", re.IGNORECASE), _read)
