"""A folder as a store: atomic writes, listings like a bucket's, and the operating system's errors as diagnoses."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from histoscale.errors import StorageError
from histoscale.storage.store import (
    ObjectInfo,
    check_key,
    check_range,
    name_object,
    object_changed,
    object_missing,
    range_past_end,
    refuse_root,
)

_UNFINISHED = re.compile(r"\.histoscale-[0-9a-f]{16}\.part")
_SHARED_FILE, _OWNERS_FILE = 0o666, 0o600
_SHARED_FOLDER, _OWNERS_FOLDER = 0o777, 0o700
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalStore:
    """The files under a folder; see `Store` for what the methods promise.

    Symbolic links are followed, to files and to folders, except back into a folder that holds them.
    An object's ETag is its time of change and its size.

    Args:
        root: The folder; it need not exist before the first write.
        private: Errors show no key, and what is written is readable by its owner only.
    """

    def __init__(self, root: Path, *, private: bool = False) -> None:
        self._root = Path(os.path.abspath(root))
        self._private = private

    @property
    def uri(self) -> str:
        """Absolute path of the root."""
        return str(self._root)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every file below a folder, sorted by key; a link that leads nowhere is left out."""
        prefix = prefix.strip("/")
        folder = self._path(prefix) if prefix else self._root
        if prefix and not self._is_folder(folder):
            return
        with diagnosed_files(f"the folder {self._root}", private=self._private):
            yield from _walk(folder, f"{prefix}/" if prefix else "", ())

    def get(self, key: str) -> bytes:
        """The whole file."""
        with self._diagnosed(key):
            return self._path(key).read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Part of a file."""
        check_range(start, length, self.uri)
        with self._diagnosed(key), self._path(key).open("rb", buffering=0) as file:
            if start >= os.fstat(file.fileno()).st_size:
                raise range_past_end(key, self.uri, private=self._private)
            file.seek(start)
            return _read(file, length)

    def put(self, key: str, data: bytes) -> None:
        """Write to a temporary file, flush it to the disk and rename it."""
        self.put_parts(key, [memoryview(data)])

    def put_parts(self, key: str, parts: Sequence[memoryview]) -> None:
        """As `put`, one part after the other."""
        path = self._path(key)
        with self._diagnosed(key):
            self._make_parents(path)
            with atomic_file(path, self._file_mode) as file:
                for part in parts:
                    file.write(part)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless the file exists; on a file system without hard links, a crash can leave a part of it."""
        path = self._path(key)
        with self._diagnosed(key):
            self._make_parents(path)
            temporary = _temporary_beside(path)
            try:
                with _new_file(temporary, self._file_mode) as file:
                    file.write(data)
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in _NO_HARD_LINKS:
                        raise
                    return self._put_exclusively(path, data)
                _sync_folder(path.parent)
                return True
            finally:
                temporary.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        """Whether there is a file, or a link to one."""
        with self._diagnosed(key):
            return self._path(key).is_file()

    def delete(self, key: str) -> None:
        """Remove a file; the folder stays."""
        with self._diagnosed(key):
            self._path(key).unlink(missing_ok=True)

    def delete_prefix(self, prefix: str) -> None:
        """Remove a folder and all below it; links are removed, what they lead to is not."""
        refuse_root(prefix, self.uri)
        folder = self._path(prefix.strip("/"))
        with self._diagnosed(prefix), contextlib.suppress(FileNotFoundError):
            if folder.is_symlink():
                folder.unlink()
            elif folder.is_dir():
                shutil.rmtree(folder)

    def download(self, key: str, path: Path, etag: str | None = None) -> None:
        """Copy a file; refused if it changes before or during the copy."""
        source_path = self._path(key)
        with self._diagnosed(key):
            source = source_path.open("rb")
        with source:
            before = file_etag(os.fstat(source.fileno()))
            if etag is not None and before != etag:
                raise object_changed(key, self.uri, private=self._private)
            with (
                diagnosed_files(f"a copy in {path.parent}", private=self._private),
                atomic_file(path, _OWNERS_FILE) as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
                after = os.fstat(source.fileno())
                if file_etag(after) != before or target.tell() != after.st_size:
                    raise object_changed(key, self.uri, private=self._private)

    def upload(self, path: Path, key: str) -> None:
        """Copy a file into the folder."""
        target_path = self._path(key)
        with diagnosed_files(f"the file to upload, in {path.parent},", private=self._private):
            source = path.open("rb")
        with source, self._diagnosed(key):
            self._make_parents(target_path)
            with atomic_file(target_path, self._file_mode) as target:
                shutil.copyfileobj(source, target, 1 << 20)

    def local_path(self, key: str) -> Path | None:
        """Path of the file."""
        return self._path(key)

    @property
    def _file_mode(self) -> int:
        return _OWNERS_FILE if self._private else _SHARED_FILE

    def _path(self, key: str) -> Path:
        check_key(key, self.uri, private=self._private)
        if "" in key.split("/"):
            raise StorageError(
                f"a key under {self.uri} has an empty component",
                value=None if self._private else key,
                expected="folders and a name joined by single slashes",
            )
        return self._root / key

    def _make_parents(self, path: Path) -> None:
        missing = []
        folder = path.parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            folder.mkdir(_OWNERS_FOLDER if self._private else _SHARED_FOLDER, exist_ok=True)

    def _put_exclusively(self, path: Path, data: bytes) -> bool:
        try:
            with _new_file(path, self._file_mode) as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def _is_folder(self, path: Path) -> bool:
        with diagnosed_files(f"the folder {self._root}", private=self._private):
            return path.is_dir()

    @contextlib.contextmanager
    def _diagnosed(self, key: str) -> Iterator[None]:
        with diagnosed_files(name_object(key, self.uri, private=self._private), private=self._private):
            try:
                yield
            except FileNotFoundError as error:
                cause = None if self._private else error
                raise object_missing(key, self.uri, private=self._private) from cause


def file_etag(status: os.stat_result) -> str:
    """What stands for an ETag of a file."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


@contextlib.contextmanager
def atomic_file(path: Path, mode: int) -> Iterator[IO[bytes]]:
    """A new file that takes its place, flushed to the disk, when the block ends, and vanishes when the block fails."""
    temporary = _temporary_beside(path)
    try:
        with _new_file(temporary, mode) as file:
            yield file
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:  # cleaned up and raised again
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def diagnosed_files(subject: str, *, private: bool) -> Iterator[None]:
    """Turn the operating system's errors into diagnoses that begin with `subject`.

    Raises:
        StorageError: In place of any OSError; without its cause when private, for the cause holds the file's name.
    """
    try:
        yield
    except OSError as error:
        raise _diagnosis(error, subject) from (None if private else error)


def _diagnosis(error: OSError, subject: str) -> StorageError:
    match error.errno:
        case errno.ENOENT:
            return StorageError(f"{subject} does not exist", remedy="check the path")
        case errno.ENOSPC | errno.EDQUOT:
            return StorageError(f"{subject} cannot be written: the disk or quota is full", remedy="make room there")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return StorageError(
                f"{subject} cannot be used: {_reason(error)}",
                remedy="give the user that runs this job access, or choose another folder",
            )
        case errno.ENOTDIR | errno.EISDIR | errno.EEXIST:
            return StorageError(
                f"{subject} cannot be used: {_reason(error)}",
                expected="folders where the URI and the key have slashes, and a file at the end",
            )
        case errno.ENAMETOOLONG:
            return StorageError(f"{subject} cannot be written: its name is too long for this file system")
    return StorageError(f"{subject} cannot be used: {_reason(error)}", remedy="check the disk and the mount")


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()


def _walk(folder: Path, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
    """Files below a folder; `ancestors` are the device and inode numbers of the folders around it."""
    try:
        own = folder.stat()
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    identity = (own.st_dev, own.st_ino)
    if identity in ancestors:
        return
    named = []
    for entry in entries:
        status = _status(entry)
        if status is not None and stat.S_ISDIR(status.st_mode):
            # A bucket sorts whole keys, so a folder sorts as its name and the slash after it.
            named.append((f"{entry.name}/", status))
        elif status is not None and stat.S_ISREG(status.st_mode) and not _UNFINISHED.fullmatch(entry.name):
            named.append((entry.name, status))
    for name, status in sorted(named, key=lambda pair: pair[0]):
        if name.endswith("/"):
            yield from _walk(folder / name, f"{prefix}{name}", (*ancestors, identity))
        else:
            yield ObjectInfo(f"{prefix}{name}", status.st_size, file_etag(status))


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Status of what an entry leads to; None where it leads nowhere or was removed meanwhile."""
    try:
        return entry.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        raise


def _read(file: IO[bytes], length: int) -> bytes:
    pieces = []
    while length > 0 and (piece := file.read(length)):
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f".histoscale-{secrets.token_hex(8)}.part")


@contextlib.contextmanager
def _new_file(path: Path, mode: int) -> Iterator[IO[bytes]]:
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
