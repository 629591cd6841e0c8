"""Objects in buckets and folders: `open_store` gives one interface to both."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from histoscale.errors import StorageError
from histoscale.storage.local import LocalStore
from histoscale.storage.s3 import S3Store
from histoscale.storage.store import ObjectInfo, Store, is_remote, join

__all__ = ["ObjectInfo", "Store", "is_remote", "join", "open_store"]


def open_store(uri: str | Path, *, private: bool = False) -> Store:
    """The store at `s3://bucket/prefix`, a path or a `file://` URI; nothing is read or written yet.

    Args:
        uri: Root of the store.
        private: Keys hold patient data: errors name the root only, and local files are for their owner only.

    Raises:
        StorageError: No store has such a URI.
    """
    text = os.fspath(uri)
    if is_remote(text):
        bucket, _, prefix = text[len("s3://") :].partition("/")
        return S3Store(bucket, prefix.strip("/"), private=private)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalStore(_checked_path(text, text), private=private)
    parts = urlsplit(text)
    if scheme.lower() != "file" or parts.netloc not in ("", "localhost"):
        raise StorageError(
            f"no store has the URI {scheme}://{'' if private else rest}",
            expected="s3://bucket/prefix, a path, or file:///path",
        )
    return LocalStore(_checked_path(unquote(parts.path), text), private=private)


def _checked_path(path: str, uri: str) -> Path:
    if not path or "\0" in path:
        raise StorageError("no store has an empty path", value=uri, expected="s3://bucket/prefix or a folder's path")
    return Path(path)
