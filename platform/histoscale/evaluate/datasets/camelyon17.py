"""Camelyon17-WILDS 1.0 (wilds.stanford.edu): tumour in the middle of a tile of a lymph node, at five hospitals.

The official division: hospital 2 tests, hospital 1 validates, and the others train. WILDS also holds back some tiles
of the training hospitals to validate on ("id_val"); they are of the part "val" as well, and told from the others by
their center. A tile's group is its patient.
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

VAL_CENTER, TEST_CENTER = "1", "2"
PUBLISHED = Published(total=455_954, parts={TRAIN: 302_436, VAL: 33_560 + 34_904, TEST: 85_054})

_TABLE = "metadata.csv"
_COLUMNS = ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split")
_LABELS = {"0": "no tumor", "1": "tumor"}


def _read(layout: Layout, listing: Listing, _: str) -> LabelledTiles:
    refuse_missing(layout, [_TABLE], listing.known)
    table = read_csv(layout, listing, _TABLE, _COLUMNS)
    labels = codes(layout, _TABLE, "tumor", table["tumor"], _LABELS)
    centers = codes(layout, _TABLE, "center", table["center"], {str(number): str(number) for number in range(5)})
    splits = codes(layout, _TABLE, "split", table["split"], {"0": TRAIN, "1": VAL})
    columns = (table["patient"], table["node"], table["x_coord"], table["y_coord"])
    rows = []
    for patient, node, x, y, label, center, split in zip(*columns, labels, centers, splits, strict=True):
        slide = f"patient_{patient}_node_{node}"
        key = f"patches/{slide}/patch_{slide}_x_{x}_y_{y}.png"
        # The table divides each hospital; the official division is by hospitals first.
        part = {VAL_CENTER: VAL, TEST_CENTER: TEST}.get(center, split)
        rows.append(FileRow(key, label, f"patient_{patient}", center, part))
    refuse_absent_tiles(layout, (row.key for row in rows), listing)
    rows.sort(key=lambda row: row.key)
    return from_files(layout.name, tuple(_LABELS.values()), listing.store, rows)


CAMELYON17 = Layout(
    "camelyon17-wilds",
    f"{_TABLE} with the columns {', '.join(_COLUMNS)}, and patches/patient_*_node_*/patch_*.png",
    re.compile(r"(?:camelyon17_v1\.0/)?patches/patient_\d+_node_\d+/patch_patient_[^/]+\.png"),
    _read,
    {"": PUBLISHED},
    folder="camelyon17_v1.0",
)
