"""PatchCamelyon (Zenodo 2546921): tumour in the middle of a tile of a lymph node, 327,680 tiles of 96 px, in HDF5.

The files may be gzipped as they come. Where the tables of metadata lie beside them, a tile's group is its slide.
"""

import re

import numpy as np
from numpy.typing import NDArray

from histoscale.evaluate.datasets.hdf5 import GZIPPED, Hdf5File, Hdf5Tiles, array_shape, read_array
from histoscale.evaluate.datasets.layout import Layout, Listing, Published, names_array, read_csv, refuse_missing
from histoscale.evaluate.datasets.tiles import TEST, TRAIN, VAL, LabelledTiles, arrange

CLASSES = ("no tumor", "tumor")
SIDE_PX = 96
PUBLISHED = Published(parts={TRAIN: 262_144, VAL: 32_768, TEST: 32_768})

_SPLITS = {"train": TRAIN, "valid": VAL, "test": TEST}
_GROUP = "wsi"


def _read(layout: Layout, listing: Listing, _: str) -> LabelledTiles:
    # A file that was unpacked beside its archive is taken as it is.
    here = {key.removesuffix(GZIPPED): key for key in sorted(listing.keys, reverse=True)}
    refuse_missing(layout, [_name(split, kind) for split in _SPLITS for kind in ("x.h5", "y.h5")], here)
    tables = [_name(split, "meta.csv") for split in _SPLITS]
    has_groups = any(name in here for name in tables)
    if has_groups:
        refuse_missing(layout, tables, here)
    files, labels, groups = [], [], []
    for split in _SPLITS:
        images = Hdf5File(listing.store, here[_name(split, "x.h5")])
        of_split = _labels(layout, Hdf5File(listing.store, here[_name(split, "y.h5")]), split)
        if array_shape(images, "x") != (len(of_split), SIDE_PX, SIDE_PX, 3):
            raise layout.refuse(f"the images of {split} are not one of {SIDE_PX} px for each label")
        if has_groups:
            slides = read_csv(layout, listing, here[_name(split, "meta.csv")], [_GROUP])[_GROUP]
            if len(slides) != len(of_split):
                raise layout.refuse(f"the table of {split} has not one row for each label")
            groups += slides
        files.append(images)
        labels.append(of_split)
    counts = [len(of_split) for of_split in labels]
    places = np.stack([np.repeat(np.arange(len(counts)), counts), np.concatenate([*map(np.arange, counts)])], axis=1)
    return arrange(
        layout.name,
        CLASSES,
        np.concatenate(labels),
        lambda order: Hdf5Tiles(tuple(files), "x", places[order].astype(np.int64)),
        groups=names_array(groups) if has_groups else None,
        parts=np.repeat(names_array(_SPLITS.values()), counts),
    )


def _labels(layout: Layout, file: Hdf5File, split: str) -> NDArray[np.int64]:
    """Labels of a split, int64 [n]: its array is uint8 [n, 1, 1, 1]."""
    labels = read_array(file, "y").astype(np.int64).reshape(-1)
    if not np.isin(labels, (0, 1)).all():
        raise layout.refuse(f"the labels of {split} are not 0 and 1")
    return labels


def _name(split: str, kind: str) -> str:
    return f"camelyonpatch_level_2_split_{split}_{kind}"


PCAM = Layout(
    "pcam",
    "camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5, gzipped or not; *_meta.csv for all three or none",
    re.compile(r"camelyonpatch_level_2_split_(?:train|valid|test)_[xy]\.h5(?:\.gz)?"),
    _read,
    {"": PUBLISHED},
)
