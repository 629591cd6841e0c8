"""TCGA-TILs (Zenodo 6604094): tumour-infiltrating lymphocytes in tiles of 100 px, 23 cancers of TCGA.

`images-tcga-tils-metadata.csv` gives partition, study, participant and label. The folder `pancancer` holds links to
the tiles of the other studies and is left out. A tile's group is its TCGA participant, its center the tissue source
site in the barcode. Only the number of all tiles could be confirmed, so that alone is checked.
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
from histoscale.evaluate.datasets.tiles import TEST, TRAIN, VAL, FileRow, LabelledTiles, from_files

CLASSES = ("til-negative", "til-positive")
PUBLISHED = Published(total=304_097)

_TABLE = "images-tcga-tils-metadata.csv"
_COLUMNS = ("partition", "study", "barcode", "label", "path")
_LINKS = "pancancer"
_PARTICIPANT = re.compile(r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})(?:-.*)?")


def _read(layout: Layout, listing: Listing, _: str) -> LabelledTiles:
    refuse_missing(layout, [_TABLE], listing.known)
    table = read_csv(layout, listing, _TABLE, _COLUMNS)
    parts = codes(layout, _TABLE, "partition", table["partition"], {part: part for part in (TRAIN, VAL, TEST)})
    labels = codes(layout, _TABLE, "label", table["label"], {label: label for label in CLASSES})
    rows, unnamed = [], 0
    columns = (table["study"], table["path"], table["barcode"], labels, parts)
    for study, key, barcode, label, part in zip(*columns, strict=True):
        if study == _LINKS:
            continue
        participant = _PARTICIPANT.fullmatch(barcode)
        if participant is None:
            unnamed += 1
        else:
            rows.append(FileRow(key, label, participant[1], participant[2], part))
    if unnamed:
        raise layout.refuse(f"{_TABLE} has barcodes that are not TCGA's", f"in {unnamed} rows")
    refuse_absent_tiles(layout, (row.key for row in rows), listing)
    rows.sort(key=lambda row: row.key)
    return from_files(layout.name, CLASSES, listing.store, rows)


TILS = Layout(
    "tcga-tils",
    f"{_TABLE} with the columns {', '.join(_COLUMNS)}, and images-tcga-tils/STUDY/PART/LABEL/*.png",
    re.compile(r"(?:TCGA-TILs/)?images-tcga-tils/[a-z]+/(?:train|val|test)/til-(?:negative|positive)/[^/]+\.png"),
    _read,
    {"": PUBLISHED},
    folder="TCGA-TILs",
)
