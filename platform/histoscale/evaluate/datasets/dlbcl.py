"""DLBCL-Morph: patches of diffuse large B-cell lymphoma, of the H&E stain, with labels of the patient to choose from.

The download's `clinical_data_cleaned.csv` has the labels; patients whose label is not known are left out. Which label
a paper predicts must be chosen, for there is none that the dataset is made for. A tile's group is its patient. Neither
the number of patches nor that of patients with patches could be confirmed; they are not checked.
"""

import re

from histoscale.evaluate.datasets.layout import Layout, Listing, Published, codes, read_csv, refuse_missing
from histoscale.evaluate.datasets.tiles import FileRow, LabelledTiles, from_files

_TABLE, _PATIENT = "clinical_data_cleaned.csv", "patient_id"
_KEY = re.compile(r"(?:DLBCL-Morph/)?Patches/(?:HE|H&E)/([^/]+)/[^/]+\.png")
_UNKNOWN = ""
_LABELS = {  # choice -> column, and what its 0 and 1 mean
    "hans": ("HANS", "non-GCB", "GCB"),
    "cd10": ("CD10 IHC", "negative", "positive"),
    "mum1": ("MUM1 IHC", "negative", "positive"),
    "outcome": ("Follow-up Status", "not deceased", "deceased"),
}


def _read(layout: Layout, listing: Listing, choice: str) -> LabelledTiles:
    refuse_missing(layout, [_TABLE], listing.known)
    column, *meanings = _LABELS[choice]
    table = read_csv(layout, listing, _TABLE, (_PATIENT, column))
    known = {"": _UNKNOWN, "nan": _UNKNOWN, "0": meanings[0], "0.0": meanings[0], "1": meanings[1], "1.0": meanings[1]}
    labels = dict(zip(table[_PATIENT], codes(layout, _TABLE, column, table[column], known), strict=True))
    rows = [
        FileRow(match[0], label, match[1])
        for match in listing.matches(_KEY)
        if (label := labels.get(match[1], _UNKNOWN)) != _UNKNOWN
    ]
    refuse_missing(
        layout,
        (f"patches of {label} patients" for label in meanings),
        {f"patches of {row.label} patients" for row in rows},
    )
    return from_files(f"{layout.name}-{choice}", sorted(meanings), listing.store, rows)


DLBCL = Layout(
    "dlbcl-morph",
    f"{_TABLE} with the column {_PATIENT} and that of the label, and Patches/HE/PATIENT/*.png",
    _KEY,
    _read,
    {choice: Published() for choice in _LABELS},
    default=None,
    folder="DLBCL-Morph",
)
