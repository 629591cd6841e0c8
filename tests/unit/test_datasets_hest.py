"""A task of HEST in the layout of its download: tiles and counts joined by barcode, folds by sample."""

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse
from tests.unit import datasets_on_disk as disk

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets.hest import check_hest, open_hest

GENES = ("GENE2", "GENE0")
STORED = ("GENE0", "GENE1", "GENE2")
SAMPLES = {"TENX1": 3, "TENX2": 2, "TENX3": 4}


def counts_of(number: int, count: int) -> NDArray[np.float32]:
    return np.random.default_rng(number).poisson(1.0, (count + 1, len(STORED))).astype(np.float32)


def write_matrix(file: h5py.File, counts: NDArray[np.float32], kind: str) -> None:
    if kind == "dense":
        file["X"] = counts
        return
    matrix = sparse.csr_matrix(counts) if kind == "csr_matrix" else sparse.csc_matrix(counts)
    group = file.create_group("X")
    group.attrs["encoding-type"] = kind
    group.attrs["shape"] = counts.shape
    for name in ("data", "indices", "indptr"):
        group[name] = getattr(matrix, name)


def write_hest(folder: Path, kind: str = "csr_matrix", images: str = "img", barcodes: str = "barcode") -> None:
    """Three samples; spots stand in the reverse order of tiles, and one has no tile."""
    for place in ("patches", "adata", "splits"):
        (folder / place).mkdir(parents=True)
    (folder / "var_50genes.json").write_text(json.dumps({"genes": list(GENES)}))
    for number, (sample, count) in enumerate(SAMPLES.items()):
        names = np.array([f"spot{index}".encode() for index in range(count)])
        with h5py.File(folder / "patches" / f"{sample}.h5", "w") as file:
            file[images] = np.stack([disk.pixels(10 * number + index, 16, 16) for index in range(count)])
            file[barcodes] = names.reshape(-1, 1)
        with h5py.File(folder / "adata" / f"{sample}.h5ad", "w") as file:
            for frame, index in (("obs", [b"bare", *names[::-1]]), ("var", [gene.encode() for gene in STORED])):
                file.create_group(frame).attrs["_index"] = "names"
                file[frame]["names"] = np.array(index)
            write_matrix(file, counts_of(number, count), kind)
    for fold, test in enumerate(SAMPLES):
        for side, samples in (("train", [name for name in SAMPLES if name != test]), ("test", [test])):
            rows = [f"{name},patches/{name}.h5,adata/{name}.h5ad" for name in samples]
            text = "\n".join(["sample_id,patches_path,expr_path", *rows, ""])
            (folder / "splits" / f"{side}_{fold}.csv").write_text(text)


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_matrix", "dense"])
@pytest.mark.parametrize(("images", "barcodes"), [("img", "barcode"), ("imgs", "barcodes")])
def test_tiles_and_logarithms_of_counts_are_joined_by_barcode(
    tmp_path: Path, kind: str, images: str, barcodes: str
) -> None:
    write_hest(tmp_path / "IDC", kind, images, barcodes)
    tiles = open_hest(str(tmp_path), "IDC")
    assert (tiles.name, tiles.genes, len(tiles)) == ("IDC", GENES, 9)
    assert tiles.samples.tolist() == [name for name, count in SAMPLES.items() for _ in range(count)]
    assert tiles.values.dtype == np.float32
    at = 0
    for number, count in enumerate(SAMPLES.values()):
        for index in range(count):
            row = counts_of(number, count)[count - index]
            np.testing.assert_allclose(tiles.values[at], np.log(1 + row[[2, 0]]), rtol=1e-6)
            tile = tiles.source.read(at)[1]
            np.testing.assert_array_equal(tile, disk.pixels(10 * number + index, 16, 16))
            at += 1


def test_folds_divide_samples_as_the_splits_say(tmp_path: Path) -> None:
    write_hest(tmp_path / "IDC")
    tiles = open_hest(str(tmp_path), "IDC")
    assert len(tiles.folds) == 3
    for fold, test in zip(tiles.folds, SAMPLES, strict=True):
        assert set(tiles.samples[fold.test].tolist()) == {test}
        assert sorted([*fold.train, *fold.test]) == list(range(9))


def rewrite(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def drop_gene(folder: Path) -> None:
    with h5py.File(folder / "adata" / "TENX2.h5ad", "a") as file:
        file["var/names"][...] = np.array([b"GENE0", b"GENE1", b"GENE9"])


def drop_spot(folder: Path) -> None:
    with h5py.File(folder / "adata" / "TENX2.h5ad", "a") as file:
        file["X"].attrs["shape"] = (3, 3)
        file["obs/names"][...] = np.array([b"bare", b"spot9", b"spot0"])


def other_shape(folder: Path) -> None:
    with h5py.File(folder / "adata" / "TENX2.h5ad", "a") as file:
        del file["X"]
        file["X"] = np.zeros((3, 4))


def too_few_tiles(folder: Path) -> None:
    with h5py.File(folder / "patches" / "TENX3.h5", "a") as file:
        del file["img"]
        file["img"] = np.zeros((3, 16, 16, 3), dtype=np.uint8)


def two_versions(folder: Path) -> None:
    with h5py.File(folder / "patches" / "TENX3.h5", "a") as file:
        file.move("img", "imgs")


def no_barcodes(folder: Path) -> None:
    with h5py.File(folder / "patches" / "TENX3.h5", "a") as file:
        del file["barcode"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "var_50genes.json").unlink(), r"incomplete \(got 'no var_50genes.json'"),
        (lambda folder: rewrite(folder, "var_50genes.json", "[]"), 'is not {"genes": '),
        (lambda folder: rewrite(folder, "var_50genes.json", '{"genes": [1]}'), 'is not {"genes": '),
        (lambda folder: (folder / "splits" / "test_1.csv").unlink(), r"got 'no splits/test_1.csv'"),
        (lambda folder: rewrite(folder, "splits/test_0.csv", "sample\nTENX1\n"), "has not the columns sample_id"),
        (lambda folder: rewrite(folder, "splits/test_0.csv", '"'), "has not the columns sample_id"),
        (
            lambda folder: (folder / "splits" / "train_0.csv").write_text(
                (folder / "splits" / "test_0.csv").read_text()
            ),
            "fold 0 trains and tests on the same sample",
        ),
        (lambda folder: (folder / "adata" / "TENX2.h5ad").unlink(), "1 files that its splits name are not there"),
        (drop_gene, "of 1 genes and 0 barcodes"),
        (drop_spot, "of 0 genes and 1 barcodes"),
        (other_shape, "not one for each barcode and gene"),
        (too_few_tiles, r"not one RGB tile for each barcode \(got .*for 4 barcodes"),
        (two_versions, "two versions of the benchmark"),
        (no_barcodes, "no whole HDF5 file"),
    ],
)
def test_a_task_that_is_incomplete_or_damaged_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    write_hest(tmp_path / "IDC")
    damage(tmp_path / "IDC")
    with pytest.raises(DatasetError, match=message):
        open_hest(str(tmp_path), "IDC")


def test_a_whole_task_passes_the_check_that_reads_no_counts(tmp_path: Path) -> None:
    write_hest(tmp_path / "IDC")
    check_hest(str(tmp_path), "IDC")
    (tmp_path / "IDC" / "adata" / "TENX2.h5ad").write_bytes(b"not HDF5")
    check_hest(str(tmp_path), "IDC")
    with pytest.raises(DatasetError, match="no whole HDF5 file"):
        open_hest(str(tmp_path), "IDC")
    (tmp_path / "IDC" / "adata" / "TENX2.h5ad").unlink()
    with pytest.raises(DatasetError, match="1 files that its splits name"):
        check_hest(str(tmp_path), "IDC")
