"""What reading byte ranges means, whatever the store: requests, results, counts and refusals."""

import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from histoscale.errors import StorageError
from histoscale.storage.store import ObjectChanged, check_key, check_range

_MAX_OFFSET = 2**63 - 1  # what the operating system and HTTP servers count to


@dataclass(frozen=True, slots=True)
class RangeRequest:
    """Bytes `start` to `start + length` of one version of one object; its repr hides the key.

    Args:
        key: Name relative to the reader's root.
        start: First byte.
        length: Number of bytes; a request for none gets none, without a look at the object.
        etag: ETag of the listing; a read under another one is refused.
    """

    key: str = field(repr=False)
    start: int
    length: int
    etag: str


@dataclass(frozen=True, slots=True)
class RangeStats:
    """What a reader did so far.

    Attributes:
        requests: Reads that were sent to the store, those that failed included.
        bytes: Bytes of the reads that succeeded.
        retries: Reads that were sent again after a fault.
    """

    requests: int
    bytes: int
    retries: int


class RangeReader(Protocol):
    """Many ranges at once from one store; several threads may use a reader.

    It travels between processes by its URI, and belongs to the process that opened or unpickled it.
    """

    def submit(self, requests: Sequence[RangeRequest]) -> "Future[list[bytes]]":
        """Start to read; returns at once.

        Returns:
            The bytes of each request, in order and each exactly as long as asked, or the first error: ObjectChanged
            where the content decides it, StorageError where retries were used up or the store refuses. Cancelled when
            the reader is closed.

        Raises:
            StorageError: The reader is closed, or belongs to the process that this one was forked from.
        """
        ...

    def fetch(self, requests: Sequence[RangeRequest]) -> list[bytes]:
        """As `submit`, and waits for the result."""
        ...

    @property
    def stats(self) -> RangeStats:
        """What was done so far."""
        ...

    def close(self) -> None:
        """Cancel what is under way and free what is open; closing twice is allowed."""
        ...


def replaced(root: str) -> ObjectChanged:
    """The error for an object that has another ETag than the one of the request."""
    return ObjectChanged(
        f"an object of {root} changed since it was listed",
        expected="the ETag of the listing",
        remedy="build the index again, or restore the object",
    )


def gone(root: str) -> ObjectChanged:
    """The error for an object that does not exist any more."""
    return ObjectChanged(
        f"an object of {root} is gone since it was listed",
        remedy="build the index again, or restore the object",
    )


def too_short(root: str) -> ObjectChanged:
    """The error for a range that ends after the object."""
    return ObjectChanged(
        f"an object of {root} ends before the range that was asked for",
        remedy="the object is shorter than it was, or torn; check it, and build what refers to it again",
    )


def check_request(request: RangeRequest, root: str) -> None:
    """Refuse what no object can have.

    Raises:
        StorageError: The key names nothing below the root, or the range is impossible.
        ObjectChanged: The ETag is none that a listing gives, or the range ends after any object.
    """
    check_key(request.key, root, private=True)
    check_range(request.start, request.length, root)
    if not request.etag.isprintable() or not request.etag.isascii() or '"' in request.etag:
        raise replaced(root)
    if request.start + request.length > _MAX_OFFSET:
        raise too_short(root)


def check_usable(root: str, opener_pid: int, *, closed: bool) -> None:
    """Refuse a reader that cannot work any more.

    Raises:
        StorageError: It is closed, or this process was forked from the one that opened it: its threads are not here.
    """
    if closed:
        raise StorageError(f"the reader of {root} is closed", remedy="open another one")
    if opener_pid != os.getpid():
        raise StorageError(
            f"the reader of {root} belongs to the process that this one was forked from",
            remedy="start processes by spawning, as Ray does, and open a reader in each of them",
        )


def check_in_flight(in_flight: int) -> int:
    """The number of reads at once, if it is one.

    Raises:
        StorageError: It is less than 1.
    """
    if in_flight < 1:
        raise StorageError("a reader needs room for a read", value=f"in_flight {in_flight}", expected="1 or more")
    return in_flight
