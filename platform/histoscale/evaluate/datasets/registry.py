"""Every layout by its name, and `open_dataset`, which finds the one that a place has."""

from collections.abc import Mapping
from difflib import get_close_matches

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets.breast import BACH, BREAKHIS
from histoscale.evaluate.datasets.camelyon17 import CAMELYON17
from histoscale.evaluate.datasets.crc import CRC, CRC_NONORM
from histoscale.evaluate.datasets.dlbcl import DLBCL
from histoscale.evaluate.datasets.folders import FOLDERS
from histoscale.evaluate.datasets.gleason import GLEASON
from histoscale.evaluate.datasets.layout import Layout, Listing, list_place
from histoscale.evaluate.datasets.mhist import MHIST
from histoscale.evaluate.datasets.midog import MIDOG
from histoscale.evaluate.datasets.pcam import PCAM
from histoscale.evaluate.datasets.table import TABLE_SUFFIXES, open_table
from histoscale.evaluate.datasets.tiles import LabelledTiles
from histoscale.evaluate.datasets.tils import TILS

AUTO, TABLE = "auto", "table"

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (PCAM, CRC, CRC_NONORM, CAMELYON17, MHIST, TILS, MIDOG, DLBCL, BACH, BREAKHIS, GLEASON, FOLDERS)
}
"""Layouts of places, by name. A table is a file, and so not among them."""


def open_dataset(uri: str, layout: str = AUTO, layouts: Mapping[str, Layout] = LAYOUTS) -> LabelledTiles:
    """List the labelled tiles of a dataset.

    Args:
        uri: A folder or an `s3://` prefix, or a CSV or Parquet file that names tiles beside it.
        layout: Name of its layout, with the choice where there is one, such as "breakhis:200x"; "table" for a file;
            "auto" finds it.
        layouts: Those that are known.

    Raises:
        DatasetError: No such layout, a place of which the layout cannot be told, or a dataset that is incomplete, of
            another layout or not of its published size; of one's own tiles, only one class or too few of a class.
        StorageError: The place cannot be listed or read.
    """
    name, separator, choice = layout.partition(":")
    if name not in (AUTO, TABLE, *layouts):
        raise DatasetError(
            "no dataset has this layout",
            value=layout,
            expected=f"{AUTO}, {TABLE}, {', '.join(layouts)}",
            remedy=f"the nearest is {get_close_matches(name, [AUTO, TABLE, *layouts], n=1, cutoff=0.0)[0]}",
        )
    is_table = uri.lower().endswith(TABLE_SUFFIXES)
    if name == TABLE or (name == AUTO and is_table):
        if not is_table or separator:
            raise DatasetError(
                "the layout table is that of a CSV or Parquet file",
                value=layout if is_table else uri,
                expected=f"a file that ends in {' or '.join(TABLE_SUFFIXES)}, and no choice",
                remedy="name the file",
            )
        return open_table(uri)
    listing = list_place(uri)
    if name == AUTO and not listing.keys:
        raise DatasetError(
            "the place of the dataset does not exist, or is empty",
            value=uri,
            expected="a folder or an s3:// prefix with a dataset in it",
            remedy="correct the place; every node of the cluster must see it",
        )
    found = recognise(listing, layouts) if name == AUTO else layouts[name]
    return found.open(listing, choice if separator else None)


def recognise(listing: Listing, layouts: Mapping[str, Layout] = LAYOUTS) -> Layout:
    """The layout of a place: that of one dataset whose mark it has, else a folder per class.

    Raises:
        DatasetError: It has the marks of several.
    """
    own = [layout for layout in layouts.values() if layout.name != FOLDERS.name]
    marked = [layout for layout in own if next(listing.matches(layout.mark), None)]
    if len(marked) > 1:
        raise DatasetError(
            "the place has the layouts of several datasets",
            value=", ".join(layout.name for layout in marked),
            expected="one of them",
            remedy="name the layout that is wanted",
        )
    return marked[0] if marked else FOLDERS
