"""BACH (Zenodo 3632035) and BreaKHis: pictures of breast tissue, larger than a tile.

BACH: the 400 microscopy images of the challenge's training set, 100 per class; patients are not told. BreaKHis: eight
tumour types at four magnifications, of which one is chosen. Its groups are numbers of cases: the letters that tell the
blocks of a case are dropped, so that no two blocks are parted.
"""

import re

from histoscale.evaluate.datasets.layout import Layout, Listing, Published, refuse_missing
from histoscale.evaluate.datasets.tiles import FileRow, LabelledTiles, from_files

BACH_CLASSES = ("Benign", "InSitu", "Invasive", "Normal")
BACH_PUBLISHED = Published(classes=dict.fromkeys(BACH_CLASSES, 100))

BREAKHIS_CLASSES = {
    "A": "adenosis",
    "DC": "ductal_carcinoma",
    "F": "fibroadenoma",
    "LC": "lobular_carcinoma",
    "MC": "mucinous_carcinoma",
    "PC": "papillary_carcinoma",
    "PT": "phyllodes_tumor",
    "TA": "tubular_adenoma",
}
BREAKHIS_PUBLISHED = {
    "40x": Published(total=1_995),
    "100x": Published(total=2_081),
    "200x": Published(total=2_013),
    "400x": Published(total=1_820),
}

_BACH_KEY = re.compile(rf"(?:ICIAR2018_BACH_Challenge/)?Photos/({'|'.join(BACH_CLASSES)})/[^/]+\.tif")
# SOB_B_TA-14-4659-40-001.png: biopsy, class, type, year, slide, magnification, number.
_BREAKHIS_KEY = re.compile(
    r"(?:BreaKHis_v1/)?histology_slides/breast/(?:benign|malignant)/SOB/[a-z_]+/[^/]+/(\d+)X/"
    rf"SOB_[BM]_({'|'.join(BREAKHIS_CLASSES)})-(\d+-\d+)[A-Z]*-\d+-\d+\.png"
)


def _read_bach(layout: Layout, listing: Listing, _: str) -> LabelledTiles:
    rows = [FileRow(match[0], match[1]) for match in listing.matches(_BACH_KEY)]
    refuse_missing(layout, (f"Photos/{label}" for label in BACH_CLASSES), {f"Photos/{row.label}" for row in rows})
    return from_files(layout.name, BACH_CLASSES, listing.store, rows)


def _read_breakhis(layout: Layout, listing: Listing, magnification: str) -> LabelledTiles:
    rows = [
        FileRow(match[0], BREAKHIS_CLASSES[match[2]], match[3])
        for match in listing.matches(_BREAKHIS_KEY)
        if f"{match[1]}x" == magnification
    ]
    classes = tuple(BREAKHIS_CLASSES.values())
    refuse_missing(
        layout,
        (f"{label} at {magnification}" for label in classes),
        {f"{row.label} at {magnification}" for row in rows},
    )
    return from_files(f"{layout.name}-{magnification}", classes, listing.store, rows)


BACH = Layout(
    "bach",
    "ICIAR2018_BACH_Challenge/Photos/CLASS/*.tif with the classes " + ", ".join(BACH_CLASSES),
    _BACH_KEY,
    _read_bach,
    {"": BACH_PUBLISHED},
)
BREAKHIS = Layout(
    "breakhis",
    "BreaKHis_v1/histology_slides/breast/CLASS/SOB/TYPE/CASE/MAGNIFICATION/SOB_*.png with all eight types",
    _BREAKHIS_KEY,
    _read_breakhis,
    BREAKHIS_PUBLISHED,
    default=None,
)
