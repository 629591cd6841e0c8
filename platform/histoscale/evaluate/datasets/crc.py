"""NCT-CRC-HE-100K, the same without colour normalisation, and CRC-VAL-HE-7K (Zenodo 1214456): nine tissues.

100,000 tiles of 224 px at 0.5 um/px train; the 7,180 of CRC-VAL-HE-7K, of other patients, test. Patients are not told.
"""

import re
from functools import partial

from histoscale.evaluate.datasets.layout import Layout, Listing, Published, refuse_missing
from histoscale.evaluate.datasets.tiles import TEST, TRAIN, FileRow, LabelledTiles, from_files

CLASSES = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
TEST_FOLDER = "CRC-VAL-HE-7K"
PUBLISHED = Published(parts={TRAIN: 100_000, TEST: 7_180})


def _read(layout: Layout, listing: Listing, _: str, *, train_folder: str) -> LabelledTiles:
    parts = {train_folder: TRAIN, TEST_FOLDER: TEST}
    pattern = re.compile(rf"({'|'.join(parts)})/({'|'.join(CLASSES)})/[^/]+\.tif")
    found = [(match[1], FileRow(match[0], match[2], part=parts[match[1]])) for match in listing.matches(pattern)]
    wanted = [f"{folder}/{label}" for folder in parts for label in CLASSES]
    refuse_missing(layout, wanted, {f"{folder}/{row.label}" for folder, row in found})
    return from_files(layout.name, CLASSES, listing.store, [row for _, row in found])


def _layout(train_folder: str) -> Layout:
    return Layout(
        _NAMES[train_folder],
        f"{train_folder}/CLASS/*.tif and {TEST_FOLDER}/CLASS/*.tif, each with the classes {', '.join(CLASSES)}",
        re.compile(rf"{train_folder}/({'|'.join(CLASSES)})/[^/]+\.tif"),
        partial(_read, train_folder=train_folder),
        {"": PUBLISHED},
    )


_NAMES = {"NCT-CRC-HE-100K": "crc", "NCT-CRC-HE-100K-NONORM": "crc-nonorm"}
CRC, CRC_NONORM = (_layout(folder) for folder in _NAMES)
