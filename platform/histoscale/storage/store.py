"""What every store of objects can do, and the URIs that name one."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from histoscale.errors import StorageError

_REMOTE = re.compile(r"s3://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing.

    Args:
        key: Name relative to the store's root, components joined by `/`.
        size_bytes: Length of the object.
        etag: Changes when the object does; compared as a whole, never parsed.
    """

    key: str
    size_bytes: int
    etag: str


class ObjectChanged(StorageError):
    """An object that is another one now, is gone, or is shorter than listed: reading again would not help."""


class Store(Protocol):
    """Objects under one root; every key and prefix is relative to it, and every failure is a StorageError.

    A prefix names a folder: `list("a")` and `list("a/")` are the same and never yield `ab/c`.
    A store can be used by several threads at once, and can be pickled.
    """

    @property
    def uri(self) -> str:
        """Root of the store, as `open_store` takes it, without a trailing slash."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object below a folder, however deep, sorted by key; nothing where there is no such folder."""
        ...

    def get(self, key: str) -> bytes:
        """The whole object."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes `start` to `start + length`, fewer where the object ends; a start at or past the end is refused."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object; no reader ever sees a part of it."""
        ...

    def put_parts(self, key: str, parts: Sequence[memoryview]) -> None:
        """As `put`, of data of any size that lie in several places; they must not change meanwhile."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one; of several writers at once, one gets True.

        That is so in a folder and on servers whose conditional writes are atomic, as those of AWS are. OpenStack Swift
        looks before it writes: there, writers that overlap can all get True, and the last of them stays. And False may
        follow one's own write whose answer was lost on the way. Who must know the winner puts its name in the data,
        waits for longer than a request takes, and reads it back.
        """
        ...

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        ...

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object below a folder; the root itself is refused."""
        ...

    def download(self, key: str, path: Path, etag: str | None = None) -> None:
        """Copy an object to a file of mode 0600 that appears whole or not at all.

        Args:
            key: The object.
            path: The file, in a folder that exists.
            etag: Refuse an object whose ETag is another one by now.
        """
        ...

    def upload(self, path: Path, key: str) -> None:
        """Copy a file of any size to an object."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The file that is the object; None where the store is not a folder of this machine."""
        ...


def join(uri: str | Path, *parts: str) -> str:
    """A URI below another one: `join("s3://b/p", "a", "c.json") -> "s3://b/p/a/c.json"`."""
    return "/".join([str(uri).rstrip("/"), *(part.strip("/") for part in parts)])


def is_remote(uri: str | Path) -> bool:
    """Whether a URI names a bucket rather than a folder of this machine."""
    return _REMOTE.match(str(uri)) is not None


def check_key(key: str, root: str, *, private: bool) -> str:
    """The key, if it can only name an object below the root.

    Raises:
        StorageError: It is empty, or has a component `.` or `..`, which HTTP clients and file systems resolve.
    """
    if not key or "\0" in key or any(component in (".", "..") for component in key.split("/")):
        raise StorageError(
            f"a key under {root} names no object below that root",
            value=None if private else key,
            expected="a key without empty name, NUL or the components '.' and '..'",
            remedy="rename the object",
        )
    return key


def check_range(start: int, length: int, root: str) -> None:
    """Refuse a range that no object can have.

    Raises:
        StorageError: The start or the length is negative.
    """
    if start < 0 or length < 0:
        raise StorageError(
            f"a read from {root} asks for an impossible range",
            value=f"start {start}, length {length}",
            expected="a start and a length of zero or more",
        )


def name_object(key: str, root: str, *, private: bool) -> str:
    """How an error names an object: by its key, or without it where keys may hold patient data."""
    return f"an object of {root}" if private else f"object {key!r} of {root}"


def refuse_root(prefix: str, root: str) -> None:
    """Refuse to empty a whole root.

    Raises:
        StorageError: The prefix is empty.
    """
    if not prefix.strip("/"):
        raise StorageError(
            f"refused to delete everything under {root}",
            expected="the folder below the root that is to go",
            remedy="delete the root by hand if that is what you want",
        )


def range_past_end(key: str, root: str, *, private: bool) -> ObjectChanged:
    """The error for a range that starts where the object has ended."""
    return ObjectChanged(
        f"{name_object(key, root, private=private)} ends before the range that was asked for",
        remedy="the object is shorter than it was, or torn; check it, and build what refers to it again",
    )


def object_changed(key: str, root: str, *, private: bool) -> ObjectChanged:
    """The error for an object that is not the one whose ETag was noted."""
    return ObjectChanged(
        f"{name_object(key, root, private=private)} changed since it was listed",
        expected="the ETag of the listing",
        remedy="build the index again, or restore the object",
    )


def object_missing(key: str, root: str, *, private: bool) -> ObjectChanged:
    """The error for a key without an object."""
    return ObjectChanged(
        f"{name_object(key, root, private=private)} does not exist",
        remedy="check the URI, and whether the object was moved or removed",
    )
