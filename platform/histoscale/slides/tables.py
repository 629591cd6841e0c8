"""Parquet tables in a store: written whole, read in batches of a few columns, by ranges where the store is remote."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from histoscale.errors import SlideIndexError
from histoscale.storage import ObjectInfo, Store

_ROW_GROUP = 1024
_BATCH = 1024
_READ_AHEAD_BYTES = 1 << 20


def write_table(path: Path, table: pa.Table) -> None:
    """Write a local Parquet file with checksums of its pages."""
    pq.write_table(table, path, compression="zstd", row_group_size=_ROW_GROUP, write_page_checksum=True)


def table_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file with checksums of its pages."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP, write_page_checksum=True)
    return sink.getvalue()


def read_batches(
    store: Store, info: ObjectInfo, schema: pa.Schema, columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches of at most 1024 rows of a Parquet object, in order; of a bucket's, only the wanted columns are read.

    Args:
        store: The store.
        info: The object.
        schema: What the table must hold.
        columns: Names of the wanted columns; all by default.

    Raises:
        SlideIndexError: The object is no whole Parquet file, or has other columns.
    """
    local = store.local_path(info.key)
    source = (
        local if local is not None else pa.PythonFile(io.BufferedReader(_ObjectFile(store, info), _READ_AHEAD_BYTES))
    )
    try:
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            if file.schema_arrow.names != schema.names:
                raise torn(f"{info.key} has other columns than this version writes")
            wanted = list(columns) if columns is not None else schema.names
            yield from file.iter_batches(_BATCH, columns=wanted, use_threads=False)
    except (pa.ArrowException, OSError):
        # The cause may hold a path, and the map of locations is read here as well.
        raise torn(f"{info.key} is not Parquet") from None


def read_rows(
    store: Store, info: ObjectInfo, schema: pa.Schema, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet object; see `read_batches`."""
    for batch in read_batches(store, info, schema, columns):
        yield from batch.to_pylist()


def torn(what: str) -> SlideIndexError:
    """The error for an index whose objects are not whole."""
    return SlideIndexError(
        f"the index is damaged: {what}",
        expected="what jobs/index.py wrote",
        remedy="run jobs/index.py again with this place as --out",
    )


class _ObjectFile(io.RawIOBase):
    """An object as a file that is read by ranges."""

    def __init__(self, store: Store, info: ObjectInfo) -> None:
        self._store = store
        self._info = info
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.size_bytes}[whence]
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - a writable buffer, which the type checker has no name for
        length = min(len(buffer), self._info.size_bytes - self._at)
        if length <= 0:
            return 0
        data = self._store.get_range(self._info.key, self._at, length)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
