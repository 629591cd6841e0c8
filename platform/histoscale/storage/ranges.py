"""Byte ranges, many at once: `open_ranges` gives one interface to folders and buckets."""

from pathlib import Path

from histoscale.storage import open_store
from histoscale.storage.local import LocalStore
from histoscale.storage.ranges_core import RangeReader, RangeRequest, RangeStats
from histoscale.storage.ranges_local import LocalRanges
from histoscale.storage.ranges_s3 import S3Ranges
from histoscale.storage.store import ObjectChanged

__all__ = ["ObjectChanged", "RangeReader", "RangeRequest", "RangeStats", "open_ranges"]


def open_ranges(store_uri: str | Path, *, in_flight: int = 64) -> RangeReader:
    """The reader of ranges of the objects below a URI, whose keys no error shows.

    Args:
        store_uri: `s3://bucket/prefix`, a path or a `file://` URI, as `open_store` takes it.
        in_flight: Most reads at once, over all callers.

    Raises:
        StorageError: No store has such a URI, there are no credentials for it, or `in_flight` is less than 1.
    """
    store = open_store(store_uri, private=True)
    if isinstance(store, LocalStore):
        return LocalRanges(store, in_flight)
    bucket, _, prefix = store.uri.removeprefix("s3://").partition("/")
    return S3Ranges(bucket, prefix, in_flight)
