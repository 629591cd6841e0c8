"""MIDOG++ (figshare 6615571): mitotic figures against cells that look like them, cut from 503 regions of tumours.

The tiles are cut from the published images by the published annotations: 224 px around each annotated cell, moved by a
seeded offset that keeps the cell whole and the tile inside its image. Left out are cells that are nearer than half a
tile to the border, and look-alikes whose tile, not yet moved, overlaps that of a mitotic figure. That gives 11,193 and
10,605 tiles, 21,798 in all; the Virchow2 paper counts 21,806, and how it cuts was not found. A tile's group is its
region, one per case; with `datasets_xvalidation.csv` beside the images its center is the scanner, and its part known.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoscale.evaluate.datasets.layout import (
    Layout,
    Listing,
    Published,
    codes,
    names_array,
    read_csv,
    refuse_absent_tiles,
    refuse_missing,
)
from histoscale.evaluate.datasets.tiles import TEST, TRAIN, LabelledTiles, Tile, arrange, decode_tile
from histoscale.seeding import key, uniforms
from histoscale.storage import Store

CLASSES = ("mitotic figure", "not mitotic figure")
SIDE_PX = 224
SEED = 0
PUBLISHED = Published(classes={"mitotic figure": 11_193, "not mitotic figure": 10_605})

_MITOSIS, _LOOK_ALIKE = 1, 2
_DATABASE, _TABLE = "databases/MIDOG++.json", "datasets_xvalidation.csv"
_CACHED_IMAGES = 2  # 120 MB each; tiles come in the order of their images

_Boxes = NDArray[np.float64]  # [N, 4], corners x0, y0, x1, y1 in px of the image


class CutTiles:
    """Squares of larger images, cut when they are read.

    Args:
        store: Where the images lie.
        keys: The images; they may hold patient data and belong in no message.
        corners: int64 [N, 3], position in `keys`, and x and y of the upper left corner of each tile, in px.
        side_px: Side of the tiles.
    """

    def __init__(self, store: Store, keys: tuple[str, ...], corners: NDArray[np.int64], side_px: int) -> None:
        self._store = store
        self._keys = keys
        self._corners = corners
        self._side_px = side_px
        self._lock = threading.Lock()
        self._images: OrderedDict[int, Tile | None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._corners)

    def read(self, index: int) -> tuple[bytes, Tile | None]:
        """The pixels of a tile, as bytes and as they are; damaged where its image is, or is too small."""
        image_index, x, y = self._corners[index].tolist()
        image = self._image(image_index)
        tile = None if image is None else image[y : y + self._side_px, x : x + self._side_px]
        if tile is None or tile.shape[:2] != (self._side_px, self._side_px):
            return b"", None
        return tile.tobytes(), tile

    def __reduce__(self) -> tuple[Any, ...]:
        return CutTiles, (self._store, self._keys, self._corners, self._side_px)

    def _image(self, index: int) -> Tile | None:
        with self._lock:
            if index not in self._images:
                self._images[index] = decode_tile(self._store.get(self._keys[index]))
                if len(self._images) > _CACHED_IMAGES:
                    self._images.popitem(last=False)
            return self._images[index]


@dataclass(frozen=True)
class _Cells:
    """The annotated cells of a database: ids int64 [N], images int64 [N], categories int64 [N], boxes [N, 4]."""

    ids: NDArray[np.int64]
    images: NDArray[np.int64]
    categories: NDArray[np.int64]
    boxes: _Boxes


def _read(layout: Layout, listing: Listing, _: str) -> LabelledTiles:
    refuse_missing(layout, [_DATABASE], listing.known)
    files, sizes, cells = _decode(layout, listing.store.get(_DATABASE))
    kept = kept_cells(cells.images, cells.categories, cells.boxes, sizes)
    images, ids = cells.images[kept], cells.ids[kept]
    names = sorted({files[image] for image in images.tolist()})
    keys = tuple(f"images/{name}" for name in names)
    refuse_absent_tiles(layout, keys, listing)
    of_image = {image: names.index(files[image]) for image in set(images.tolist())}
    corners = np.column_stack(
        [[of_image[image] for image in images.tolist()], corners_of(ids, images, cells.boxes[kept], sizes)]
    )
    order = np.lexsort((ids, corners[:, 0]))  # so that an image is decoded once per class
    scanners, parts = _about(layout, listing, images[order])
    return arrange(
        layout.name,
        CLASSES,
        (cells.categories[kept][order] != _MITOSIS).astype(np.int64),
        lambda of_class: CutTiles(listing.store, keys, corners[order][of_class].astype(np.int64), SIDE_PX),
        groups=names_array(str(image) for image in images[order].tolist()),
        centers=scanners,
        parts=parts,
    )


def kept_cells(
    images: NDArray[np.int64], categories: NDArray[np.int64], boxes: _Boxes, sizes: Mapping[int, tuple[int, int]]
) -> NDArray[np.bool_]:
    """Which cells are cut, bool [N]; see the module.

    Args:
        images: int64 [N], the image of each cell.
        categories: int64 [N], 1 for a mitotic figure, 2 for a look-alike.
        boxes: Of the cells.
        sizes: Width and height of each image, in px.
    """
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    limits = np.array([sizes[image] for image in images.tolist()], dtype=np.float64).reshape(-1, 2)
    kept = np.all((centers >= SIDE_PX / 2) & (centers <= limits - SIDE_PX / 2), axis=1)
    for image in np.unique(images):
        here = images == image
        mitoses = centers[here & (categories == _MITOSIS)]
        others = np.flatnonzero(here & (categories == _LOOK_ALIKE))
        apart = np.abs(centers[others, None] - mitoses[None]).max(axis=2) >= SIDE_PX
        kept[others] &= np.all(apart, axis=1)
    return np.asarray(kept, dtype=np.bool_)


def corners_of(
    ids: NDArray[np.int64], images: NDArray[np.int64], boxes: _Boxes, sizes: Mapping[int, tuple[int, int]]
) -> NDArray[np.int64]:
    """Upper left corners of the tiles of cells, int64 [N, 2], x and y in px: each a function of its cell alone."""
    first, last = np.ceil(boxes[:, 2:] - SIDE_PX), np.floor(boxes[:, :2])  # that hold the whole box
    drawn = first + np.floor(uniforms(key(SEED, "midog"), ids, 2) * (last - first + 1))
    limits = np.array([sizes[image] for image in images.tolist()], dtype=np.int64).reshape(-1, 2) - SIDE_PX
    return np.asarray(np.clip(drawn, 0, limits), dtype=np.int64)


def _decode(layout: Layout, data: bytes) -> tuple[dict[int, str], dict[int, tuple[int, int]], _Cells]:
    """File names and sizes of the images by their ids, and the cells. Boxes are corners, unlike COCO's."""
    try:
        content = json.loads(data)
        files = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        sizes = {int(image["id"]): (int(image["width"]), int(image["height"])) for image in content["images"]}
        rows = [(entry["id"], entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
        numbers = np.array(rows, dtype=np.int64).reshape(-1, 3)
        boxes = np.array([entry["bbox"] for entry in content["annotations"]], dtype=np.float64).reshape(-1, 4)
    except (ValueError, KeyError, TypeError):
        raise layout.refuse(f"{_DATABASE} is not the database of MIDOG++") from None
    if not set(numbers[:, 1].tolist()) <= set(files) or not np.isin(numbers[:, 2], (_MITOSIS, _LOOK_ALIKE)).all():
        raise layout.refuse(f"{_DATABASE} has cells of unknown images or categories")
    if not ((boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2:] - boxes[:, :2] <= SIDE_PX).all()):
        raise layout.refuse(f"{_DATABASE} has boxes that are not x0, y0, x1, y1 within {SIDE_PX} px")
    return files, sizes, _Cells(numbers[:, 0], numbers[:, 1], numbers[:, 2], boxes)


def _about(
    layout: Layout, listing: Listing, images: NDArray[np.int64]
) -> tuple[NDArray[np.str_] | None, NDArray[np.str_] | None]:
    """Scanner and part of each cell's image, str [N] both, where the table lies there."""
    if _TABLE not in listing.known:
        return None, None
    table = read_csv(layout, listing, _TABLE, ("Slide", "Dataset", "Scanner"), delimiter=";")
    parts = codes(layout, _TABLE, "Dataset", table["Dataset"], {"train": TRAIN, "test": TEST})
    # The table spells one scanner in two ways.
    scanners = [name.replace("Hamammatsu", "Hamamatsu") for name in table["Scanner"]]
    by_slide = dict(zip(table["Slide"], zip(scanners, parts, strict=True), strict=True))
    rows = [by_slide.get(str(image)) for image in images.tolist()]
    known = [row for row in rows if row is not None]
    if len(known) < len(rows):
        raise layout.refuse(f"{_TABLE} lacks slides", f"of {len(rows) - len(known)} cells")
    return names_array(scanner for scanner, _ in known), names_array(part for _, part in known)


MIDOG = Layout(
    "midog",
    f"{_DATABASE} and images/*.tiff; {_TABLE} too, where parts and scanners are wanted",
    re.compile(r"databases/MIDOG\+\+\.json"),
    _read,
    {"": PUBLISHED},
)
