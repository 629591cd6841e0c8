"""Gleason grades in tissue microarrays (Harvard Dataverse OCYCMP, Arvaniti 2018): patches of 750 px.

The download is of whole cores with masks; `create_patches.py` of github.com/eiriniar/gleason_CNN cuts the patches that
are read here, which is why their number is not checked. Array ZT76 validates, ZT80 tests (the first pathologist's
labels) and the others train, as published. A tile's group is its core.
"""

import re

from histoscale.evaluate.datasets.layout import Layout, Listing, refuse_missing
from histoscale.evaluate.datasets.tiles import TEST, TRAIN, VAL, FileRow, LabelledTiles, from_files

CLASSES = ("benign", "gleason 3", "gleason 4", "gleason 5")

_TRAIN_FOLDER, _TEST_FOLDER = "train_validation_patches_750", "test_patches_750/patho_1"
_PARTS = {"ZT111": TRAIN, "ZT199": TRAIN, "ZT204": TRAIN, "ZT76": VAL, "ZT80": TEST}
_KEY = re.compile(
    rf"(?:{_TRAIN_FOLDER}/(?=ZT(?:111|199|204|76)_)|{_TEST_FOLDER}/(?=ZT80_))"
    r"((ZT\d+)_[^/]+)/\1_patch_\d+_class_([0-3])\.jpg"
)


def _read(layout: Layout, listing: Listing, _: str) -> LabelledTiles:
    rows, arrays = [], set()
    for match in listing.matches(_KEY):
        arrays.add(match[2])
        rows.append(FileRow(match[0], CLASSES[int(match[3])], match[1], part=_PARTS[match[2]]))
    folders = {array: _TEST_FOLDER if part == TEST else _TRAIN_FOLDER for array, part in _PARTS.items()}
    refuse_missing(
        layout,
        (f"{folder}/{array}_*" for array, folder in folders.items()),
        {f"{folders[array]}/{array}_*" for array in arrays},
    )
    return from_files(layout.name, CLASSES, listing.store, rows)


GLEASON = Layout(
    "gleason-tma",
    f"{_TRAIN_FOLDER}/CORE/*.jpg of the arrays ZT111, ZT199, ZT204 and ZT76, and {_TEST_FOLDER}/CORE/*.jpg of ZT80",
    _KEY,
    _read,
)
