"""The catalogue of a snapshot: one fixed-width row per slide in a memory map, and its masks in O(1).

An archive of three million slides has a catalogue of 350 MB, which all processes of a node share.
"""

import bisect
import hashlib
import io
import mmap
import os
import tempfile
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import SlideIndexError
from histoscale.sampling.rows import ROW_DTYPE, sealed
from histoscale.slides.layout import SlideLayout
from histoscale.slides.records import SlideLocation, unpack_mask
from histoscale.slides.slide import MppOrigin, SlideInfo
from histoscale.slides.snapshot import (
    CATALOGUE,
    LOCATIONS_BLOB,
    PROTECTED,
    RECORDS,
    Snapshot,
    protected,
    read_snapshot,
)
from histoscale.slides.tables import torn
from histoscale.storage import ObjectInfo, Store, open_store
from histoscale.storage.local import diagnosed_files

DUPLICATE, MPP_CONFLICT = 1, 2
"""Bits of `flags`: probably a copy or a rescan of another slide; two origins give different um/px; the slide has no
layout and is read from a copy."""

ORIGINS: tuple[MppOrigin, ...] = ("vendor", "tiff", "sidecar")
ORIGIN_SHIFT = 8
"""The bits of `flags` from here on are the place of the scale's origin in `ORIGINS`."""

_DOWNLOAD_BYTES = 64 * 2**20
"""A blob up to this size is taken whole."""


class _Blob(Protocol):
    def read(self, start: int, length: int) -> bytes:
        """Exactly `length` bytes, or fewer where the blob ends."""


class Catalogue:
    """The slides of a snapshot by row. Pickled, it is opened again where it arrives.

    Args:
        index_uri: The index.
        snapshot: The header of the snapshot.
        cache: Node-local folder for what is copied of a remote index.

    Attributes:
        rows: `ROW_DTYPE`, [slides]; read-only.
        columns: Names of the strata columns.
        values: Values of each column by code.
        snapshot_id: The snapshot.
    """

    def __init__(self, index_uri: str, snapshot: Snapshot, cache: Path) -> None:
        self.index_uri = index_uri
        self.snapshot = snapshot
        self.columns, self.values = snapshot.columns, snapshot.values
        self.snapshot_id = snapshot.snapshot_id
        self._cache = cache
        self._store = open_store(index_uri)
        self.rows = _map_rows(self._local(snapshot.file(CATALOGUE)), snapshot.slides)

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.index_uri, self.snapshot, self._cache)

    def slide_id(self, row: int) -> str:
        """The slide id of a row: 32 hexadecimal digits."""
        return _id_bytes(self.rows, row).hex()

    def row_of(self, slide_id: str) -> int:
        """The row of a slide.

        Raises:
            SlideIndexError: The snapshot has no such slide.
        """
        row = self._find(slide_id)
        if row is None:
            raise SlideIndexError(
                f"slide {slide_id}: not in the index",
                expected=f"a slide of snapshot {self.snapshot_id}",
                remedy="resume with the index that the run began with",
            )
        return row

    def has(self, slide_id: str) -> bool:
        """Whether the snapshot has a slide."""
        return self._find(slide_id) is not None

    def _find(self, slide_id: str) -> int | None:
        try:
            wanted = bytes.fromhex(slide_id)
        except ValueError:
            return None
        row = bisect.bisect_left(range(len(self.rows)), wanted, key=lambda row: _id_bytes(self.rows, row))
        return row if row < len(self.rows) and _id_bytes(self.rows, row) == wanted else None

    def mask(self, row: int) -> NDArray[np.bool_]:
        """Tissue of a slide, bool [mask_rows, mask_columns].

        Raises:
            SlideIndexError: The record is damaged.
        """
        entry = self.rows[row]
        try:
            return unpack_mask(self._record(row)[1], int(entry["mask_rows"]), int(entry["mask_columns"]))
        except ValueError:
            raise torn(f"{RECORDS} holds no mask where the catalogue says so") from None

    def layout(self, row: int) -> bytes:
        """Where the tiles of a slide lie, as `SlideLayout.to_bytes()` made it; empty where it is read from a copy.

        Raises:
            SlideIndexError: The record is damaged.
        """
        return self._record(row)[0]

    def _record(self, row: int) -> tuple[bytes, bytes]:
        entry = self.rows[row]
        if sealed(self.rows[row : row + 1])[0] != entry["check"]:
            raise torn(f"a row of {CATALOGUE} is damaged")
        data = self._records.read(int(entry["record_at"]), int(entry["record_bytes"]))
        if len(data) != entry["record_bytes"] or zlib.crc32(data) != entry["record_check"]:
            raise torn(f"{RECORDS} is not what the catalogue says")
        return split_record(data)

    @cached_property
    def _records(self) -> _Blob:
        info = self.snapshot.file(RECORDS)
        if self._store.local_path(info.key) is None and info.size_bytes > _DOWNLOAD_BYTES:
            return _Ranges(self._store, info)
        return _Map(self._local(info))

    def _local(self, info: ObjectInfo) -> Path:
        """A local file of an object: itself in a folder, else a copy that is made once per node."""
        path = self._store.local_path(info.key)
        if path is None:
            path = self._cache / hashlib.sha256(f"{self.index_uri}\0{info.key}".encode()).hexdigest()
            # An object of a snapshot never changes, so that a copy of the right size is the object.
            if not path.exists() or path.stat().st_size != info.size_bytes:
                with diagnosed_files(f"the cache folder {self._cache}", private=False):
                    self._cache.mkdir(0o700, parents=True, exist_ok=True)
                self._store.download(info.key, path)
        if not path.is_file() or path.stat().st_size != info.size_bytes:
            raise torn(f"{info.key} is missing or has not the size that its snapshot says")
        return path


class Locations:
    """Where the slides of a catalogue lie, by row: protected, for readers alone. Nothing of it goes to a local disk.

    Args:
        catalogue: The catalogue.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        store = protected(open_store(catalogue.index_uri))
        name = f"{PROTECTED}/{LOCATIONS_BLOB}"
        size_bytes = catalogue.snapshot.files.get(name, 0)
        info = ObjectInfo(f"{catalogue.snapshot.folder}/{LOCATIONS_BLOB}", size_bytes, "")
        ranged = store.local_path(info.key) is not None or size_bytes > _DOWNLOAD_BYTES
        self._blob: _Blob = _Ranges(store, info) if ranged else _Bytes(store.get(info.key))

    def location(self, row: int) -> SlideLocation:
        """Where a slide lies.

        Raises:
            SlideIndexError: The blob of locations is damaged.
            StorageError: It cannot be read.
        """
        entry = self._catalogue.rows[row]
        try:
            return SlideLocation.from_bytes(self._blob.read(int(entry["location_at"]), int(entry["location_bytes"])))
        except ValueError:
            raise torn(f"{LOCATIONS_BLOB} holds no location where the catalogue says so") from None


def open_catalogue(index_uri: str, snapshot_id: str | None = None, *, cache: Path | None = None) -> Catalogue:
    """The catalogue of an index.

    Args:
        index_uri: The index: a folder or an s3:// prefix.
        snapshot_id: A snapshot of its history; the current one by default.
        cache: Node-local folder for what is copied of a remote index.

    Raises:
        SlideIndexError: No index, no such snapshot, or a damaged one.
        StorageError: The index cannot be read.
    """
    folder = cache or Path(tempfile.gettempdir()) / f"histoscale-catalogue-{os.getuid()}"
    return Catalogue(index_uri, read_snapshot(open_store(index_uri), snapshot_id), folder)


def slide_info(entry: np.void, layout: SlideLayout) -> SlideInfo:
    """Geometry and optics of a slide, from its row of the catalogue and its layout."""
    return SlideInfo(
        width_px0=int(entry["width_px0"]),
        height_px0=int(entry["height_px0"]),
        mpp=float(entry["mpp"]),
        mpp_origin=ORIGINS[int(entry["flags"]) >> ORIGIN_SHIFT],
        vendor=layout.vendor,
        level_downsamples=tuple(level.downsample for level in layout.levels),
    )


def join_record(layout: bytes, packed_mask: bytes) -> bytes:
    """The record of a slide: its layout and its packed mask."""
    return len(layout).to_bytes(4, "little") + layout + packed_mask


def split_record(data: bytes) -> tuple[bytes, bytes]:
    """Layout and packed mask of a record.

    Raises:
        SlideIndexError: Not a record.
    """
    length = int.from_bytes(data[:4], "little")
    if len(data) < 4 + length:
        raise torn(f"{RECORDS} holds no record where the catalogue says so")
    return data[4 : 4 + length], data[4 + length :]


def _id_bytes(rows: NDArray[np.void], row: int) -> bytes:
    # numpy takes zero bytes at the end for padding.
    return bytes(rows["slide_id"][row]).ljust(16, b"\0")


def _map_rows(path: Path, count: int) -> NDArray[np.void]:
    # The header is compared, not parsed: numpy's own reader takes it for Python text, and fails in many ways on others.
    head = catalogue_head(count)
    with path.open("rb") as file:
        found = file.read(len(head))
    if found != head or path.stat().st_size != len(head) + count * ROW_DTYPE.itemsize:
        raise torn(f"{CATALOGUE} is not the catalogue of its snapshot")
    return np.memmap(path, ROW_DTYPE, "r", len(head), (count,)) if count else np.zeros(0, ROW_DTYPE)


def catalogue_head(count: int) -> bytes:
    """The header of the .npy file of so many rows."""
    head = io.BytesIO()
    shape = {"descr": np.lib.format.dtype_to_descr(ROW_DTYPE), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(head, shape)
    return head.getvalue()


class _Map:
    """A local blob."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, start: int, length: int) -> bytes:
        return self._map[start : start + length]


class _Bytes:
    """A blob in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, start: int, length: int) -> bytes:
        return self._data[start : start + length]


class _Ranges:
    """A blob of a store, read by ranges."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store = store
        self._info = info

    def read(self, start: int, length: int) -> bytes:
        return self._store.get_range(self._info.key, start, length)
