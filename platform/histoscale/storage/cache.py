"""Local copies of objects in a bounded folder that all processes of a node share: for readers that need whole files.

Everything is held by `flock`, which ends with the process that holds it, however it ends:

* `.lock`: held for the moment in which a set is looked up, given room, made visible or evicted.
* `users`: held shared by each open cache. Who can have it alone is the only user, and deletes what it finds.
* each set's folder: held exclusively by who fills it, shared by whom it is leased to. A set that nobody holds may go.
"""

import contextlib
import fcntl
import hmac
import json
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path, PurePosixPath

from histoscale.errors import StorageError
from histoscale.storage.local import diagnosed_files, file_etag
from histoscale.storage.store import ObjectInfo, Store, object_changed, object_missing

ROOM_WAIT_S = 600.0
"""How long readers that hold no other set wait for room: each of the others will be done with its own by then."""

_SETS, _KEY, _GUARD, _USERS = "copies", "key", ".lock", "users"
_SET = re.compile(r"[0-9a-f]{32}-([0-9]+)")  # a keyed hash, and the bytes that are copied
_WHOLE, _PARTIAL = "files", "partial"
_SUFFIX = re.compile(r"\.[A-Za-z]{2,8}")  # no digits: what follows a dot may be a record number
_OWNERS_FOLDER, _OWNERS_FILE = 0o700, 0o600
_KEY_BYTES = 32
_POLL_S = 0.1


class CacheFull(StorageError):
    """The sets that are leased leave no room for another."""


def local_name(index: int, key: str) -> str:
    """Name of a set's file in its folder: its place in the set and its suffix, nothing that may name a patient."""
    suffix = PurePosixPath(key).suffix
    return f"{index}{suffix if _SUFFIX.fullmatch(suffix) else ''}"


class ObjectCache:
    """Local copies of sets of objects, of at most `max_bytes` in all; the least recently leased set makes room.

    All processes and threads that open a cache in one folder share its copies: one of them downloads a set while the
    others wait. The copies go when the last user closes its cache or ends; what killed processes left goes when the
    next one opens a cache there and nobody else uses it. Objects that are files of this machine are linked, not
    copied, and count nothing.

    Args:
        directory: Folder of the cache, on a disk of this machine.
        max_bytes: Bound of the folder, whoever fills it.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._directory = directory
        self._sets = directory / _SETS
        with self._diagnosed():
            directory.mkdir(_OWNERS_FOLDER, parents=True, exist_ok=True)
            with self._guarded():
                users, self._key = _enter(directory)
        self._finalizer = weakref.finalize(self, _leave, self._sets, users, os.getpid())

    def fetch(self, store: Store, infos: Sequence[ObjectInfo], slot: str) -> Path:
        """Bring a set into the cache ahead of its lease; it may be evicted before.

        Args:
            store: Where the objects are.
            infos: The set, as listed; an object that changed since is refused.
            slot: Name of the set, such as the slide's id.

        Returns:
            The folder that holds `local_name(i, infos[i].key)` for every i.

        Raises:
            CacheFull: The set has no room beside the leased ones.
            StorageError: An object cannot be read or changed, or the set is larger than the cache.
        """
        with self.lease(store, infos, slot) as folder:
            return folder

    @contextlib.contextmanager
    def lease(self, store: Store, infos: Sequence[ObjectInfo], slot: str, *, wait_s: float = 0.0) -> Iterator[Path]:
        """As `fetch`, and the set stays for as long as the block runs.

        Args:
            store: Where the objects are.
            infos: The set, as listed.
            slot: Name of the set.
            wait_s: How long to wait for room; only who holds no other set may wait, or all could wait for each other.
        """
        size_bytes = sum(info.size_bytes for info in infos if store.local_path(info.key) is None)
        name = json.dumps([store.uri, slot, [astuple(info) for info in infos]]).encode()
        folder = self._sets / f"{hmac.digest(self._key, name, 'sha256').hex()[:32]}-{size_bytes}"
        lock = self._pin(folder, size_bytes, store, infos, time.monotonic() + wait_s)
        try:
            # A link may be older than the last change of its file; a copy is what it was.
            for info in infos:
                if (original := store.local_path(info.key)) is not None:
                    _check_unchanged(original, store, info)
            yield folder / _WHOLE
        finally:
            os.close(lock)

    def close(self) -> None:
        """Stop using the folder; the last user removes every copy. The end of the process does as much."""
        self._finalizer()

    def _pin(self, folder: Path, size_bytes: int, store: Store, infos: Sequence[ObjectInfo], deadline_s: float) -> int:
        """The descriptor that holds a whole set, until it is closed."""
        while True:
            try:
                with self._diagnosed(), self._guarded():
                    lock, is_held = self._claim(folder, size_bytes)
            except CacheFull:
                if time.monotonic() >= deadline_s:
                    raise
                time.sleep(_POLL_S)
                continue
            if is_held and (folder / _WHOLE).exists():
                return lock
            if is_held:
                return self._filled(folder, lock, store, infos)
            fcntl.flock(lock, fcntl.LOCK_SH)  # until the one that fills it is done, or failed
            os.close(lock)

    def _claim(self, folder: Path, size_bytes: int) -> tuple[int, bool]:
        """A descriptor of a set's folder, and whether it holds the set: shared if it is whole, else for filling it."""
        if folder.exists():
            lock = _open_folder(folder)
            if (folder / _WHOLE).exists():
                fcntl.flock(lock, fcntl.LOCK_SH)
                os.utime(lock, ns=(time.time_ns(),) * 2)
                return lock, True
            if not _take_alone(lock):
                return lock, False
            os.close(lock)
            shutil.rmtree(folder)  # the one that filled it was killed
        self._make_room(size_bytes)
        folder.mkdir(_OWNERS_FOLDER)
        lock = _open_folder(folder)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock, True

    def _filled(self, folder: Path, lock: int, store: Store, infos: Sequence[ObjectInfo]) -> int:
        try:
            _fill(folder / _PARTIAL, store, infos)
            with self._diagnosed(), self._guarded():
                (folder / _PARTIAL).rename(folder / _WHOLE)
                # A lock that becomes another is let go for a moment, in which nobody may evict the set.
                fcntl.flock(lock, fcntl.LOCK_SH)
                os.utime(lock, ns=(time.time_ns(),) * 2)
        except BaseException:  # cleaned up and raised again
            with self._guarded():
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            raise
        return lock

    def _make_room(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise StorageError(
                "a set of objects is larger than the cache",
                value=f"{size_bytes} bytes",
                expected=f"at most {self._max_bytes} bytes",
                remedy="raise cluster.slide_cache_gb above the size of the largest slide",
            )
        if not size_bytes:
            return
        leased_bytes = idle_bytes = 0
        idle = []
        for folder in self._sets.iterdir():
            match = _SET.fullmatch(folder.name)
            if match is None or not (its_bytes := int(match[1])):
                continue
            if _is_held(folder):
                leased_bytes += its_bytes
            else:
                idle_bytes += its_bytes
                idle.append((folder.stat().st_mtime_ns, its_bytes, folder))
        if leased_bytes + size_bytes > self._max_bytes:
            raise CacheFull(
                "the cache is full of files in use",
                value=f"{leased_bytes} bytes in use, {size_bytes} more wanted",
                expected=f"at most {self._max_bytes} bytes in all",
                remedy="raise cluster.slide_cache_gb, or lease fewer slides at once",
            )
        for _, its_bytes, folder in sorted(idle):
            if leased_bytes + idle_bytes + size_bytes <= self._max_bytes:
                break
            shutil.rmtree(folder)
            idle_bytes -= its_bytes

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        guard = os.open(self._directory / _GUARD, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _OWNERS_FILE)
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            yield
        finally:
            os.close(guard)

    def _diagnosed(self) -> contextlib.AbstractContextManager[None]:
        return diagnosed_files(f"the cache folder {self._directory}", private=False)


def _fill(folder: Path, store: Store, infos: Sequence[ObjectInfo]) -> None:
    with diagnosed_files(f"the cache folder {folder.parents[2]}", private=True):
        folder.mkdir(_OWNERS_FOLDER)
        for index, info in enumerate(infos):
            path = folder / local_name(index, info.key)
            original = store.local_path(info.key)
            if original is None:
                store.download(info.key, path, info.etag)
            else:
                _check_unchanged(original, store, info)
                path.symlink_to(original)


def _check_unchanged(original: Path, store: Store, info: ObjectInfo) -> None:
    with diagnosed_files(f"an object of {store.uri}", private=True):
        current = file_etag(original.stat()) if original.exists() else None
    if current is None:
        raise object_missing(info.key, store.uri, private=True)
    if current != info.etag:
        raise object_changed(info.key, store.uri, private=True)


def _enter(directory: Path) -> tuple[int, bytes]:
    """The descriptor that makes a user of this process, and the key of the names; leftovers go if nobody else is."""
    users = os.open(directory / _USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _OWNERS_FILE)
    sets = directory / _SETS
    try:
        if _take_alone(users):
            shutil.rmtree(sets, ignore_errors=True)
        fcntl.flock(users, fcntl.LOCK_SH)  # waits for a last user that is removing the copies
        sets.mkdir(_OWNERS_FOLDER, exist_ok=True)
        path = sets / _KEY
        if not path.exists():
            path.touch(_OWNERS_FILE)
            path.write_bytes(secrets.token_bytes(_KEY_BYTES))
        return users, path.read_bytes()
    except OSError:  # cleaned up and raised again
        os.close(users)
        raise


def _leave(sets: Path, users: int, pid: int) -> None:
    if os.getpid() != pid:  # a forked process inherits the cache object, not the use of the folder
        return
    # Without the guard, which this thread may hold when garbage is collected: who enters waits for `users` instead.
    if _take_alone(users):
        shutil.rmtree(sets, ignore_errors=True)
    os.close(users)


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _is_held(folder: Path) -> bool:
    lock = _open_folder(folder)
    try:
        return not _take_alone(lock)
    finally:
        os.close(lock)


def _take_alone(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
