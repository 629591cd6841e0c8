"""Byte ranges of files: pread from descriptors that stay open for a while."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from histoscale.storage.local import LocalStore, diagnosed_files, file_etag
from histoscale.storage.ranges_core import (
    RangeRequest,
    RangeStats,
    check_in_flight,
    check_request,
    check_usable,
    gone,
    replaced,
    too_short,
)

_THREADS = 8  # more wait for the same disk
_OPEN_FILES = 64


class LocalRanges:
    """The ranges of a folder's files; see `RangeReader` for what the methods promise.

    Args:
        store: The folder.
        in_flight: Most submitted batches that are read at once; on one machine, more than eight gain nothing.
    """

    def __init__(self, store: LocalStore, in_flight: int) -> None:
        self._store = store
        self._in_flight = check_in_flight(in_flight)
        self._pool = ThreadPoolExecutor(min(in_flight, _THREADS), thread_name_prefix="ranges")
        self._files = _OpenFiles()
        self._opener_pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._requests = 0
        self._bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalRanges, (self._store, self._in_flight)

    def submit(self, requests: Sequence[RangeRequest]) -> "Future[list[bytes]]":
        """Start to read a batch, in a thread."""
        check_usable(self._store.uri, self._opener_pid, closed=self._closed)
        return self._pool.submit(self._read_batch, tuple(requests))

    def fetch(self, requests: Sequence[RangeRequest]) -> list[bytes]:
        """Read a batch in this thread: with the pages in memory, that costs less than the way to another one."""
        check_usable(self._store.uri, self._opener_pid, closed=self._closed)
        return self._read_batch(requests)

    @property
    def stats(self) -> RangeStats:
        """What was done so far; files need no retries."""
        with self._lock:
            return RangeStats(self._requests, self._bytes, retries=0)

    def close(self) -> None:
        """Cancel the batches that wait, and close the files once the others are read."""
        if not self._closed and self._opener_pid == os.getpid():
            self._closed = True
            self._pool.shutdown(cancel_futures=True)
            self._files.close()

    def _read_batch(self, requests: Sequence[RangeRequest]) -> list[bytes]:
        versions: dict[tuple[str, str], list[int]] = {}
        for place, request in enumerate(requests):
            check_request(request, self._store.uri)
            versions.setdefault((request.key, request.etag), []).append(place)
        pieces = [b""] * len(requests)
        for (key, etag), places in versions.items():
            wanted = [requests[place] for place in places]
            for place, piece in zip(places, self._read_file(key, etag, wanted), strict=True):
                pieces[place] = piece
        with self._lock:
            self._requests += len(requests)
            self._bytes += sum(map(len, pieces))
        return pieces

    def _read_file(self, key: str, etag: str, requests: Sequence[RangeRequest]) -> list[bytes]:
        root = self._store.uri
        path = cast(Path, self._store.local_path(key))
        with diagnosed_files(f"an object of {root}", private=True):
            try:
                with self._files.borrow(path) as descriptor:
                    # The version is asked before and after, for a file may be overwritten in between.
                    if file_etag(os.fstat(descriptor)) != etag:
                        raise replaced(root)
                    for request in requests:
                        # A disk serves requests faster that it knows of together; in memory this costs a microsecond.
                        os.posix_fadvise(descriptor, request.start, request.length, os.POSIX_FADV_WILLNEED)
                    pieces = [_read(descriptor, request, root) for request in requests]
                    if file_etag(os.fstat(descriptor)) != etag:
                        raise replaced(root)
                    return pieces
            except FileNotFoundError:
                raise gone(root) from None


def _read(descriptor: int, request: RangeRequest, root: str) -> bytes:
    piece = os.pread(descriptor, request.length, request.start)
    while len(piece) < request.length:
        more = os.pread(descriptor, request.length - len(piece), request.start + len(piece))
        if not more:
            raise too_short(root)
        piece += more
    return piece


@dataclass
class _OpenFile:
    """A descriptor, the file that it leads to, and how many borrow it."""

    descriptor: int
    identity: tuple[int, int]
    borrowers: int = 0


class _OpenFiles:
    """Descriptors by path; of those that nobody borrows, the most recently borrowed stay open."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()  # least recently borrowed first
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def borrow(self, path: Path) -> Iterator[int]:
        """A descriptor of the file that has this path now; it stays open for as long as the block runs."""
        current = _identity(os.stat(path))
        with self._lock:
            file = self._files.pop(path, None)
            if file is not None and file.identity != current:
                _close_idle(file)
                file = None
            if file is None:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                file = _OpenFile(descriptor, _identity(os.fstat(descriptor)))
            file.borrowers += 1
            self._files[path] = file
        try:
            yield file.descriptor
        finally:
            with self._lock:
                file.borrowers -= 1
                if self._files.get(path) is not file:
                    _close_idle(file)
                self._evict()

    def close(self) -> None:
        """Close every descriptor, those that are borrowed when they come back."""
        with self._lock:
            for file in self._files.values():
                _close_idle(file)
            self._files.clear()

    def _evict(self) -> None:
        idle = [path for path, file in self._files.items() if not file.borrowers]
        for path in idle[: max(0, len(self._files) - _OPEN_FILES)]:
            os.close(self._files.pop(path).descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _close_idle(file: _OpenFile) -> None:
    if not file.borrowers:
        os.close(file.descriptor)
