"""HEST-Benchmark (MahmoodLab/hest-bench): the expression of genes at the spot that a tile shows, task by task.

Each task is a folder: `patches/*.h5` with tiles of 224 px and their barcodes, `adata/*.h5ad` with counts per barcode
and gene, `splits/{train,test}_K.csv` with the samples of fold K, and `var_50genes.json` with the genes to predict.
Sizes could not be confirmed and are not checked; that each fold, sample, barcode and gene is there is.
"""

import csv
import io
import json
import re
from dataclasses import dataclass

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets.hdf5 import Hdf5File, Hdf5Tiles, array_shape
from histoscale.evaluate.datasets.layout import Listing, list_place
from histoscale.evaluate.datasets.tiles import Names, TileSource
from histoscale.storage import join

GENES = "var_50genes.json"

_EXPECTED = f"a task's folder with {GENES}, splits/train_K.csv, splits/test_K.csv, patches/*.h5 and adata/*.h5ad"
_SPLIT = re.compile(r"splits/(train|test)_(\d+)\.csv")
_COLUMNS = ("sample_id", "patches_path", "expr_path")
# Two versions of the benchmark name the arrays differently.
_IMAGES, _BARCODES = ("img", "imgs"), ("barcode", "barcodes")

_Samples = dict[str, tuple[str, str]]  # sample -> its files of tiles and of counts
_Division = tuple[list[str], list[str]]  # samples that train, and that test


@dataclass(frozen=True)
class Fold:
    """One division of the tiles: positions of those that train and test, int64 both, sorted."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class ExpressionTiles:
    """The tiles of a task, sample by sample, and what is to be predicted from them.

    Attributes:
        name: Of the task.
        genes: Names of the genes.
        source: The tiles.
        values: float32 [N, genes], log(1 + count) of each gene at each tile's spot.
        samples: str [N], the slide of each tile.
        folds: The divisions, in order.
    """

    name: str
    genes: tuple[str, ...]
    source: TileSource
    values: NDArray[np.float32]
    samples: Names
    folds: tuple[Fold, ...]

    def __len__(self) -> int:
        return len(self.values)


def open_hest(uri: str, task: str) -> ExpressionTiles:
    """One task of the benchmark.

    Args:
        uri: The folder that holds the folders of the tasks.
        task: Name of the task's folder, such as "IDC".

    Raises:
        DatasetError: The task is incomplete, damaged, or divides a sample.
        StorageError: It cannot be listed or read.
    """
    listing, genes, samples, divisions = _contents(uri, task)
    files, values, counts = [], [], []
    for patches, expression in samples.values():
        file = Hdf5File(listing.store, patches)
        barcodes = _barcodes(file)
        values.append(_expression(task, Hdf5File(listing.store, expression), barcodes, genes))
        counts.append(len(barcodes))
        files.append(file)
    names = np.repeat(np.array(list(samples), dtype=np.str_), counts)
    places = np.stack([np.repeat(np.arange(len(counts)), counts), np.concatenate([*map(np.arange, counts)])], axis=1)
    folds = tuple(
        Fold(np.flatnonzero(np.isin(names, train)), np.flatnonzero(np.isin(names, test))) for train, test in divisions
    )
    array = _array_name(task, files, counts)
    return ExpressionTiles(task, genes, Hdf5Tiles(tuple(files), array, places), np.concatenate(values), names, folds)


def check_hest(uri: str, task: str) -> None:
    """Refuse a task of which something is missing, without reading tiles or counts.

    Raises:
        DatasetError: The task is incomplete, or divides a sample.
        StorageError: It cannot be listed or read.
    """
    _contents(uri, task)


def _contents(uri: str, task: str) -> tuple[Listing, tuple[str, ...], _Samples, list[_Division]]:
    listing = list_place(join(uri, task))
    if GENES not in listing.known:
        raise _refusal(task, "the dataset is incomplete", f"no {GENES}")
    genes = _genes(task, listing.store.get(GENES))
    samples, divisions = _divisions(task, listing)
    absent = sum(key not in listing.known for paths in samples.values() for key in paths)
    if absent:
        raise _refusal(task, f"{absent} files that its splits name are not there")
    return listing, genes, samples, divisions


def _genes(task: str, data: bytes) -> tuple[str, ...]:
    try:
        genes = json.loads(data)["genes"]
    except (ValueError, KeyError, TypeError):
        genes = None
    if not isinstance(genes, list) or not genes or not all(isinstance(gene, str) for gene in genes):
        raise _refusal(task, f'{GENES} is not {{"genes": [names]}}')
    return tuple(genes)


def _divisions(task: str, listing: Listing) -> tuple[_Samples, list[_Division]]:
    """The two files of each sample, in sorted order, and the samples that train and test in each fold."""
    numbers = {(match[1], int(match[2])) for match in listing.matches(_SPLIT)}
    count = 1 + max((number for _, number in numbers), default=0)
    missing = [
        f"no splits/{kind}_{k}.csv" for k in range(count) for kind in ("train", "test") if (kind, k) not in numbers
    ]
    if missing:
        raise _refusal(task, "the dataset is incomplete", ", ".join(missing))
    samples: _Samples = {}
    divisions = []
    for number in range(count):
        sides = []
        for kind in ("train", "test"):
            rows = _split(task, f"splits/{kind}_{number}.csv", listing)
            samples |= rows
            sides.append(list(rows))
        if set(sides[0]) & set(sides[1]):
            raise _refusal(task, f"fold {number} trains and tests on the same sample")
        divisions.append((sides[0], sides[1]))
    return dict(sorted(samples.items())), divisions


def _split(task: str, key: str, listing: Listing) -> _Samples:
    try:
        rows = list(csv.DictReader(io.StringIO(listing.store.get(key).decode("utf-8-sig")), strict=True))
    except (UnicodeDecodeError, csv.Error):
        rows = []
    found = [tuple(row.get(name) or "" for name in _COLUMNS) for row in rows]
    if not found or not all(all(row) for row in found):
        raise _refusal(task, f"{key} has not the columns {', '.join(_COLUMNS)} in every row")
    return {sample: (patches, expression) for sample, patches, expression in found}


def _barcodes(file: Hdf5File) -> list[str]:
    """Barcode of each tile of a sample."""
    with file.opened() as opened:
        return _texts(opened[_first(opened, _BARCODES)])


def _array_name(task: str, files: list[Hdf5File], counts: list[int]) -> str:
    """Name of the array of tiles, which is the same in all files, with a row for each barcode."""
    names = []
    for file, count in zip(files, counts, strict=True):
        with file.opened() as opened:
            names.append(_first(opened, _IMAGES))
        shape = array_shape(file, names[-1])
        if shape[0] != count or len(shape) != 4 or shape[3] != 3:
            raise _refusal(task, "a sample has not one RGB tile for each barcode", f"{shape} for {count} barcodes")
    if len(set(names)) > 1:
        raise _refusal(task, "samples are of two versions of the benchmark", ", ".join(sorted(set(names))))
    return names[0]


def _expression(task: str, file: Hdf5File, barcodes: list[str], genes: tuple[str, ...]) -> NDArray[np.float32]:
    """log(1 + count) of genes at spots, float32 [barcodes, genes]."""
    with file.opened() as opened:
        spots = {name: row for row, name in enumerate(_index(opened["obs"]))}
        columns = {name: column for column, name in enumerate(_index(opened["var"]))}
        counts = _matrix(opened["X"])
    lacking = sum(gene not in columns for gene in genes), sum(barcode not in spots for barcode in barcodes)
    if any(lacking):
        raise _refusal(task, "a sample lacks counts", f"of {lacking[0]} genes and {lacking[1]} barcodes")
    if counts.shape != (len(spots), len(columns)):
        raise _refusal(task, "a sample's counts are not one for each barcode and gene", f"{counts.shape}")
    wanted = counts[[spots[barcode] for barcode in barcodes]][:, [columns[gene] for gene in genes]]
    return np.asarray(np.log1p(wanted.toarray().astype(np.float64)), dtype=np.float32)


def _matrix(stored: h5py.Dataset | h5py.Group) -> sparse.csr_matrix:
    """The matrix that AnnData stores as an array, or by rows or columns."""
    if isinstance(stored, h5py.Dataset):
        return sparse.csr_matrix(stored[()])
    parts = tuple(stored[name][()] for name in ("data", "indices", "indptr"))
    kinds = {"csr_matrix": sparse.csr_matrix, "csc_matrix": sparse.csc_matrix}
    return kinds[stored.attrs["encoding-type"]](parts, shape=tuple(stored.attrs["shape"])).tocsr()


def _index(frame: h5py.Group) -> list[str]:
    """The row names of a data frame of AnnData."""
    return _texts(frame[frame.attrs["_index"]])


def _texts(array: h5py.Dataset) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(array[()]).reshape(-1)]


def _first(opened: h5py.File, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in opened), names[0])


def _refusal(task: str, what: str, value: str | None = None) -> DatasetError:
    return DatasetError(f"hest {task}: {what}", value=value, expected=_EXPECTED, remedy="download the task again")
