"""Tiles in HDF5 files: read one at a time, on this machine."""

import contextlib
import gzip
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets.tiles import Tile
from histoscale.storage import Store
from histoscale.storage.local import diagnosed_files

GZIPPED = ".gz"


class Hdf5File:
    """An HDF5 file of a dataset, gzipped where its name ends in `.gz`; one thread at a time reads it.

    A plain file of this machine is read where it lies. Any other is copied to a folder of its own below TMPDIR when it
    is first read, as large as it is unpacked; the copy goes with this object, or with the process.

    Args:
        store: Where it lies.
        key: The file.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        self._lock = threading.Lock()
        self._file: h5py.File | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[h5py.File]:
        """The open file, for as long as the block runs, which no other thread enters.

        Raises:
            DatasetError: It is no whole HDF5 file, or what the block reads of it is damaged or not there.
            StorageError: It cannot be read or copied.
        """
        with self._lock:
            try:
                if self._file is None:
                    self._file = h5py.File(self._path(), "r")
                yield self._file
            except (OSError, KeyError, RuntimeError):  # what HDF5 raises depends on where the damage is
                raise _damaged(self._store) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return Hdf5File, (self._store, self._key)

    def _path(self) -> Path:
        is_gzipped = self._key.endswith(GZIPPED)
        path = self._store.local_path(self._key)
        if path is not None and not is_gzipped:
            if not path.is_file():
                raise _damaged(self._store)
            return path
        with diagnosed_files("the folder of temporary files", private=True):
            self._folder = tempfile.TemporaryDirectory(prefix="histoscale-dataset-")
            if path is None:
                path = Path(self._folder.name, "packed")
                self._store.download(self._key, path)
            if not is_gzipped:
                return path
            unpacked = Path(self._folder.name, "unpacked")
            try:
                with gzip.open(path) as source, unpacked.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            except (gzip.BadGzipFile, EOFError, zlib.error):
                raise _damaged(self._store) from None
        return unpacked


class Hdf5Tiles:
    """Tiles that are rows of arrays in HDF5 files.

    Args:
        files: The files.
        array: Name of the array in each of them: uint8 [n, h, w, 3], RGB.
        places: int64 [N, 2], position in `files` and row of each tile.
    """

    def __init__(self, files: tuple[Hdf5File, ...], array: str, places: NDArray[np.int64]) -> None:
        self._files = files
        self._array = array
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> tuple[bytes, Tile | None]:
        """The pixels of a tile, as bytes and as they are; a row that cannot be read is a damaged tile."""
        file, row = self._places[index].tolist()
        try:
            with self._files[file].opened() as opened:
                tile = np.asarray(opened[self._array][row], dtype=np.uint8)
        except DatasetError:
            return b"", None
        return tile.tobytes(), tile


def read_array(file: Hdf5File, name: str) -> NDArray[Any]:
    """A whole array of a file.

    Raises:
        DatasetError: There is none, or it is damaged.
        StorageError: The file cannot be read or copied.
    """
    with file.opened() as opened:
        return np.asarray(opened[name][()])


def array_shape(file: Hdf5File, name: str) -> tuple[int, ...]:
    """Shape of an array of a file, where it is one of uint8.

    Raises:
        DatasetError: There is no such array.
        StorageError: The file cannot be read or copied.
    """
    with file.opened() as opened:
        array = opened[name]
        if not isinstance(array, h5py.Dataset) or array.dtype != np.uint8:
            raise KeyError(name)
        return tuple(array.shape)


def _damaged(store: Store) -> DatasetError:
    return DatasetError(
        f"a file of {store.uri} is no whole HDF5 file of this dataset",
        expected="the file as it is published",
        remedy="download it again",
    )
