"""MHIST (bmirds.github.io/MHIST): hyperplastic polyps against sessile serrated adenomas, 3,152 tiles of 224 px.

`annotations.csv` gives the majority of seven pathologists and the partition. Patients are not told.
"""

import re

from histoscale.evaluate.datasets.layout import (
    Layout,
    Listing,
    Published,
    codes,
    read_csv,
    refuse_absent_tiles,
    refuse_missing,
)
from histoscale.evaluate.datasets.tiles import TEST, TRAIN, FileRow, LabelledTiles, from_files

PUBLISHED = Published(parts={TRAIN: 2_175, TEST: 977}, classes={"HP": 2_162, "SSA": 990})

_TABLE = "annotations.csv"
_NAME, _LABEL, _PART = "Image Name", "Majority Vote Label", "Partition"


def _read(layout: Layout, listing: Listing, _: str) -> LabelledTiles:
    refuse_missing(layout, [_TABLE], listing.known)
    table = read_csv(layout, listing, _TABLE, (_NAME, _LABEL, _PART))
    labels = codes(layout, _TABLE, _LABEL, table[_LABEL], {"HP": "HP", "SSA": "SSA"})
    parts = codes(layout, _TABLE, _PART, table[_PART], {"train": TRAIN, "test": TEST})
    keys = [f"images/{name}" for name in table[_NAME]]
    refuse_absent_tiles(layout, keys, listing)
    rows = [FileRow(key, label, part=part) for key, label, part in sorted(zip(keys, labels, parts, strict=True))]
    return from_files(layout.name, ("HP", "SSA"), listing.store, rows)


MHIST = Layout(
    "mhist",
    f"{_TABLE} with the columns {_NAME}, {_LABEL} and {_PART}, and images/MHIST_*.png",
    re.compile(r"images/MHIST_[a-z]+\.png"),
    _read,
    {"": PUBLISHED},
)
