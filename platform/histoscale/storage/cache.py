"""Local copies of objects in a bounded folder: for readers that need whole files."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from histoscale.errors import StorageError
from histoscale.storage.local import diagnosed_files, file_etag
from histoscale.storage.store import ObjectInfo, Store, object_changed, object_missing

_OWN_FOLDER = re.compile(r"cache-[0-9]+-[0-9a-f]{16}")
_SUFFIX = re.compile(r"\.[A-Za-z]{2,8}")  # no digits: what follows a dot may be a record number
_OWNERS_FOLDER = 0o700


def local_name(index: int, key: str) -> str:
    """Name of a set's file in its folder: its place in the set and its suffix, nothing that may name a patient."""
    suffix = PurePosixPath(key).suffix
    return f"{index}{suffix if _SUFFIX.fullmatch(suffix) else ''}"


@dataclass
class _Set:
    """The files of one slot: `ready` once they are all there, `pins` the leases that hold them."""

    folder: Path
    size_bytes: int
    pins: int = 0
    ready: bool = False


class ObjectCache:
    """Local copies of sets of objects, of at most `max_bytes` in all; the least recently leased set makes room.

    Several threads may use a cache; every process has its own folder, which goes when the process ends. What a killed
    process left behind goes when the next one starts. Objects that are files of this machine are linked, not copied,
    and count nothing.

    Args:
        directory: Folder for the processes' folders, on a disk of this machine.
        max_bytes: Bound of this process.

    Raises:
        StorageError: The folder cannot be made.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sets: dict[tuple[str, str, tuple[ObjectInfo, ...]], _Set] = {}  # least recently leased first
        self._used_bytes = 0
        self._made = 0
        self._changed = threading.Condition()
        with diagnosed_files(f"the cache folder {directory}", private=False):
            self._folder, lock = _new_folder(directory)
        self._finalizer = weakref.finalize(self, _remove_folder, self._folder, lock, os.getpid())

    def fetch(self, store: Store, infos: Sequence[ObjectInfo], slot: str) -> Path:
        """Bring a set into the cache ahead of its lease; it may be evicted before.

        Args:
            store: Where the objects are.
            infos: The set, as listed; an object that changed since is refused.
            slot: Name of the set, such as the slide's id.

        Returns:
            The folder that holds `local_name(i, infos[i].key)` for every i.

        Raises:
            StorageError: An object cannot be read or changed, or the set has no room beside the leased ones.
        """
        with self.lease(store, infos, slot) as folder:
            return folder

    @contextlib.contextmanager
    def lease(self, store: Store, infos: Sequence[ObjectInfo], slot: str) -> Iterator[Path]:
        """As `fetch`, and the set stays for as long as the block runs."""
        name = (store.uri, slot, tuple(infos))
        size_bytes = sum(info.size_bytes for info in infos if store.local_path(info.key) is None)
        entry, is_new = self._pin(name, size_bytes)
        if is_new:
            try:
                _fill(entry.folder, store, infos)
            except BaseException:  # cleaned up and raised again
                self._drop(name)
                raise
            with self._changed:
                entry.ready = True
                self._changed.notify_all()
        try:
            yield entry.folder
        finally:
            with self._changed:
                entry.pins -= 1

    def close(self) -> None:
        """Remove the folder and every copy in it; what the end of the process does as well."""
        self._finalizer()

    def _pin(self, name: tuple[str, str, tuple[ObjectInfo, ...]], size_bytes: int) -> tuple[_Set, bool]:
        """The pinned set of a name, and whether it is for the caller to fill."""
        with self._changed:
            while (entry := self._sets.get(name)) is not None and not entry.ready:
                self._changed.wait()  # another thread fills it, or fails and drops it
            if entry is None:
                self._make_room(size_bytes)
                entry = _Set(self._folder / str(self._made), size_bytes)
                self._made += 1
                self._used_bytes += size_bytes
            else:
                del self._sets[name]
            self._sets[name] = entry
            entry.pins += 1
            return entry, not entry.ready

    def _make_room(self, size_bytes: int) -> None:
        if size_bytes > self._max_bytes:
            raise StorageError(
                "a set of objects is larger than the cache",
                value=f"{size_bytes} bytes",
                expected=f"at most {self._max_bytes} bytes",
                remedy="raise cluster.slide_cache_gb above the size of the largest slide",
            )
        leased_bytes = sum(entry.size_bytes for entry in self._sets.values() if entry.pins)
        if leased_bytes + size_bytes > self._max_bytes:
            raise StorageError(
                "the cache is full of files in use",
                value=f"{leased_bytes} bytes in use, {size_bytes} more wanted",
                expected=f"at most {self._max_bytes} bytes in all",
                remedy="raise cluster.slide_cache_gb, or lease fewer slides at once",
            )
        idle = [name for name, entry in self._sets.items() if not entry.pins]
        for name in idle:
            if self._used_bytes + size_bytes <= self._max_bytes:
                break
            self._remove(name)

    def _drop(self, name: tuple[str, str, tuple[ObjectInfo, ...]]) -> None:
        with self._changed:
            self._remove(name)
            self._changed.notify_all()

    def _remove(self, name: tuple[str, str, tuple[ObjectInfo, ...]]) -> None:
        entry = self._sets.pop(name)
        shutil.rmtree(entry.folder, ignore_errors=True)
        self._used_bytes -= entry.size_bytes


def _fill(folder: Path, store: Store, infos: Sequence[ObjectInfo]) -> None:
    with diagnosed_files(f"the cache folder {folder.parent}", private=True):
        folder.mkdir(_OWNERS_FOLDER)
        for index, info in enumerate(infos):
            path = folder / local_name(index, info.key)
            original = store.local_path(info.key)
            if original is None:
                store.download(info.key, path, info.etag)
            else:
                _link(path, original, store, info)


def _link(path: Path, original: Path, store: Store, info: ObjectInfo) -> None:
    with diagnosed_files(f"an object of {store.uri}", private=True):
        current = file_etag(original.stat()) if original.exists() else None
    if current is None:
        raise object_missing(info.key, store.uri, private=True)
    if current != info.etag:
        raise object_changed(info.key, store.uri, private=True)
    path.symlink_to(original)


def _new_folder(directory: Path) -> tuple[Path, int]:
    """A folder for this process and the descriptor that holds its lock, after the leftovers of dead processes went."""
    directory.mkdir(_OWNERS_FOLDER, parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for folder in directory.iterdir():
            if _OWN_FOLDER.fullmatch(folder.name) and _is_left_over(folder):
                shutil.rmtree(folder, ignore_errors=True)
        folder = directory / f"cache-{os.getpid()}-{secrets.token_hex(8)}"
        folder.mkdir(_OWNERS_FOLDER)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _is_left_over(folder: Path) -> bool:
    # A lock ends with its process; a pid says nothing in another container, and is given out again.
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(lock)


def _remove_folder(folder: Path, lock: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked process inherits the cache object, not the folder
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
