"""What an unfinished indexing has examined: small Parquet objects, so that a killed run goes on where it was."""

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from histoscale.slides.records import EXAMINED_SCHEMA
from histoscale.slides.snapshot import PENDING
from histoscale.slides.tables import read_batches, table_bytes
from histoscale.storage import ObjectInfo, Store

PENDING_SCHEMA = EXAMINED_SCHEMA.append(pa.field("reason", pa.string())).append(pa.field("version", pa.int64()))
"""An examined slide, or (`reason` not null) why it is not taken, and by which examination."""

MAX_ROWS = 256
MAX_AGE_S = 20.0
"""A row is on the storage after so many more, or at the first row after so long."""


class Spill:
    """Writes rows as they come.

    Args:
        store: The index.
        written: Called with each batch that was written.

    Attributes:
        keys: Of the objects that were written.
    """

    def __init__(self, store: Store, written: Callable[[pa.RecordBatch], None]) -> None:
        self._store = store
        self._written = written
        self.keys: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._since_s = time.monotonic()

    def add(self, row: dict[str, Any]) -> None:
        """Take a row of `PENDING_SCHEMA`."""
        self._rows.append(row)
        if len(self._rows) >= MAX_ROWS or time.monotonic() - self._since_s >= MAX_AGE_S:
            self.flush()

    def flush(self) -> None:
        """Write what is left."""
        if self._rows:
            batch = pa.RecordBatch.from_pylist(self._rows, schema=PENDING_SCHEMA)
            key = f"{PENDING}/{time.time_ns():020d}-{secrets.token_hex(4)}.parquet"
            self._store.put(key, table_bytes(pa.Table.from_batches([batch])))
            self.keys.append(key)
            self._written(batch)
            self._rows = []
        self._since_s = time.monotonic()


def pending_parts(store: Store) -> list[ObjectInfo]:
    """The objects that unfinished runs have left."""
    return list(store.list(PENDING))


def read_pending(store: Store, part: ObjectInfo) -> Iterator[pa.RecordBatch]:
    """The batches of one of them.

    Raises:
        SlideIndexError: It is damaged.
    """
    return read_batches(store, part, PENDING_SCHEMA)
