"""Each published dataset in its own layout: labels, groups, centers, parts and pixels, and what is refused."""

import gc
import gzip
import pickle
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from tests.unit import datasets_on_disk as disk

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets import LAYOUTS, LabelledTiles, open_dataset
from histoscale.evaluate.datasets.hdf5 import Hdf5File, read_array
from histoscale.evaluate.features import extract
from histoscale.storage.local import LocalStore

PCAM = {"train": 6, "valid": 3, "test": 4}


def column(tiles: LabelledTiles, name: str) -> list[str]:
    values = getattr(tiles, name)
    assert values is not None
    return [str(value) for value in values]


def test_published_sizes_are_those_of_the_publications_and_are_checked(tmp_path: Path) -> None:
    sizes = {name: layout.published for name, layout in LAYOUTS.items()}
    assert sizes["pcam"][""].parts == {"train": 262_144, "val": 32_768, "test": 32_768}
    assert sizes["crc"][""].parts == sizes["crc-nonorm"][""].parts == {"train": 100_000, "test": 7_180}
    assert sizes["mhist"][""].parts == {"train": 2_175, "test": 977}
    assert sizes["mhist"][""].classes == {"HP": 2_162, "SSA": 990}
    assert sizes["camelyon17-wilds"][""].total == 455_954
    assert sum(sizes["camelyon17-wilds"][""].parts.values()) == 455_954
    assert sizes["tcga-tils"][""].total == 304_097
    assert sum(sizes["midog"][""].classes.values()) == 21_798
    assert set(sizes["bach"][""].classes.values()) == {100}
    assert sum(size.total or 0 for size in sizes["breakhis"].values()) == 7_909
    disk.write_pcam(tmp_path, PCAM)
    with pytest.raises(DatasetError, match=r"train: 6 tiles of 262144, val: 3 tiles of 32768, test: 4 tiles of 32768"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("gzipped", [False, True])
def test_pcam_is_read_by_rows_plain_or_gzipped(tmp_path: Path, gzipped: bool) -> None:
    disk.write_pcam(tmp_path, PCAM, gzipped=gzipped)
    tiles = disk.opened(tmp_path, name="pcam", parts={"train": 6, "val": 3, "test": 4})
    rows = [(split, index) for split, count in enumerate(PCAM.values()) for index in range(count)]
    ordered = sorted(rows, key=lambda row: row[1] % 2)
    assert (tiles.name, tiles.counts()) == ("pcam", {"no tumor": 7, "tumor": 6})
    assert column(tiles, "parts") == [("train", "val", "test")[split] for split, _ in ordered]
    assert column(tiles, "groups") == [f"camelyon_{tuple(PCAM)[split]}_{index // 2:03d}" for split, index in ordered]
    for number, (split, index) in enumerate(ordered):
        np.testing.assert_array_equal(disk.image_of(tiles, number), disk.pixels(1000 * split + index, 96, 96))


def test_pcam_read_by_several_threads_has_the_hash_of_its_pixels_whatever_its_packing(tmp_path: Path) -> None:
    disk.write_pcam(tmp_path / "a", PCAM)
    disk.write_pcam(tmp_path / "b", PCAM, gzipped=True, meta=False)
    plain, packed = disk.opened(tmp_path / "a", "pcam"), disk.opened(tmp_path / "b", "pcam")
    assert packed.groups is None
    assert extract(plain, {}, batch_tiles=4).content_hash == extract(packed, {}).content_hash
    disk.write_pcam(tmp_path / "c", PCAM)
    with h5py.File(tmp_path / "c" / "camelyonpatch_level_2_split_test_x.h5", "a") as file:
        file["x"][1, 5, 5, 0] ^= 1
    assert extract(disk.opened(tmp_path / "c", "pcam"), {}).content_hash != extract(packed, {}).content_hash


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("gone", r"no camelyonpatch_level_2_split_valid_y.h5'"),
        ("meta gone", r"no camelyonpatch_level_2_split_test_meta.csv"),
        ("meta short", "table of train has not one row for each label"),
        ("labels", "labels of train are not 0 and 1"),
        ("short", "images of train are not one of 96 px for each label"),
        ("no hdf5", "no whole HDF5 file"),
        ("other array", "no whole HDF5 file"),
        ("float", "no whole HDF5 file"),
        ("gzip", "no whole HDF5 file"),
        ("gzipped meta", "meta.csv.gz is no whole CSV"),
    ],
)
def test_pcam_that_is_incomplete_or_damaged_is_refused(tmp_path: Path, damage: str, message: str) -> None:
    disk.write_pcam(tmp_path, PCAM)
    stem = str(tmp_path / "camelyonpatch_level_2_split_")
    if damage == "gone":
        Path(f"{stem}valid_y.h5").unlink()
    elif damage == "meta gone":
        Path(f"{stem}test_meta.csv").unlink()
    elif damage == "meta short":
        table = Path(f"{stem}train_meta.csv")
        table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    elif damage in ("labels", "short"):
        with h5py.File(f"{stem}train_y.h5", "w") as file:
            file["y"] = np.full((6, 1, 1, 1), 2) if damage == "labels" else np.zeros((5, 1, 1, 1), dtype=np.uint8)
    elif damage == "no hdf5":
        Path(f"{stem}test_y.h5").write_bytes(b"\x89HDF not")
    elif damage in ("other array", "float"):
        with h5py.File(f"{stem}test_x.h5", "w") as file:
            file["x" if damage == "float" else "images"] = np.zeros((4, 96, 96, 3))
    elif damage == "gzip":
        Path(f"{stem}test_y.h5").rename(f"{stem}test_y.h5.gz")
    else:
        table = Path(f"{stem}train_meta.csv")
        Path(f"{stem}train_meta.csv.gz").write_bytes(gzip.compress(table.read_bytes())[:-9])
        table.unlink()
    with pytest.raises(DatasetError, match=message):
        disk.opened(tmp_path, "pcam")


@pytest.mark.parametrize("gzipped", [False, True])
def test_an_hdf5_file_of_a_bucket_is_copied_once_and_the_copy_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gzipped: bool
) -> None:
    class Bucket(LocalStore):
        def local_path(self, key: str) -> Path | None:
            return None

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    disk.write_pcam(tmp_path, {"test": 3}, gzipped=gzipped)
    key = "camelyonpatch_level_2_split_test_x.h5" + (".gz" if gzipped else "")
    file = Hdf5File(Bucket(tmp_path), key)
    assert not any((tmp_path / "scratch").iterdir()), "nothing is copied before it is read"
    for _ in range(2):
        np.testing.assert_array_equal(read_array(file, "x")[2], disk.pixels(2, 96, 96))
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    del file
    gc.collect()
    assert not any((tmp_path / "scratch").iterdir())


def test_a_file_of_pcam_that_goes_while_it_is_read_makes_damaged_tiles(tmp_path: Path) -> None:
    disk.write_pcam(tmp_path, PCAM)
    elsewhere: LabelledTiles = pickle.loads(pickle.dumps(disk.opened(tmp_path, "pcam")))
    (tmp_path / "camelyonpatch_level_2_split_train_x.h5").unlink()
    with pytest.raises(DatasetError, match=r"6 of 13 tiles cannot be read \(got 'no tumor #0, no tumor #1"):
        extract(elsewhere, {})


@pytest.mark.parametrize("folder", ["NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM"])
def test_crc_trains_on_one_folder_and_tests_on_the_other(tmp_path: Path, folder: str) -> None:
    disk.write_crc(tmp_path, folder)
    name = {"NCT-CRC-HE-100K": "crc", "NCT-CRC-HE-100K-NONORM": "crc-nonorm"}[folder]
    tiles = disk.opened(tmp_path, name=name, parts={"train": 18, "test": 9})
    assert (tiles.name, tiles.classes) == (name, disk.CRC_CLASSES)
    by_part: dict[str, list[int]] = {"train": [], "test": []}
    for index, part in enumerate(column(tiles, "parts")):
        by_part[part].append(int(tiles.labels[index]))
        wanted = [10 * int(tiles.labels[index]) + number for number in ((9,) if part == "test" else (0, 1))]
        assert any(np.array_equal(disk.image_of(tiles, index), disk.pixels(number)) for number in wanted)
    assert by_part == {"train": sorted([*range(9), *range(9)]), "test": list(range(9))}
    assert tiles.groups is None


def test_crc_without_a_class_or_the_test_folder_is_refused_with_what_is_missing(tmp_path: Path) -> None:
    disk.write_crc(tmp_path)
    (tmp_path / "CRC-VAL-HE-7K" / "BACK" / "BACK-TCGA-9.tif").unlink()
    with pytest.raises(DatasetError, match=r"crc: .*incomplete \(got 'no CRC-VAL-HE-7K/BACK'"):
        disk.opened(tmp_path, name="crc")


def test_mhist_has_the_majority_and_the_partition(tmp_path: Path) -> None:
    disk.write_mhist(tmp_path)
    tiles = disk.opened(tmp_path, name="mhist", parts={"train": 4, "test": 2}, classes={"HP": 3, "SSA": 3})
    assert tiles.classes == ("HP", "SSA")
    assert column(tiles, "parts") == ["test", "train", "train", "test", "train", "train"]  # by name: b d f, a c e
    for index, number in enumerate((4, 2, 0, 5, 3, 1)):
        np.testing.assert_array_equal(disk.image_of(tiles, index), disk.pixels(number))


def test_camelyon17_has_the_official_division_centers_and_patients(tmp_path: Path) -> None:
    disk.write_camelyon17(tmp_path)
    tiles = disk.opened(tmp_path, name="camelyon17-wilds", total=10)
    assert tiles.counts() == {"no tumor": 5, "tumor": 5}
    assert column(tiles, "centers") == ["0", "1", "2", "3", "4"] * 2
    assert column(tiles, "groups") == [f"patient_{4 + center:03d}" for center in range(5)] * 2
    # Tile 1, of hospital 0 and with tumour, is held back; hospital 1 validates and hospital 2 tests.
    assert column(tiles, "parts") == ["train", "val", "test", "train", "train", "val", "val", "test", "train", "train"]
    np.testing.assert_array_equal(disk.image_of(tiles, 7), disk.pixels(5))


def test_camelyon17_without_its_table_or_a_tile_is_refused(tmp_path: Path) -> None:
    disk.write_camelyon17(tmp_path)
    next((tmp_path / "patches" / "patient_004_node_1").iterdir()).unlink()
    with pytest.raises(DatasetError, match="1 tiles that its table names are not there"):
        open_dataset(str(tmp_path))
    (tmp_path / "metadata.csv").unlink()
    with pytest.raises(DatasetError, match=r"no metadata\.csv"):
        open_dataset(str(tmp_path))


def test_tils_have_participants_and_their_links_are_not_counted_twice(tmp_path: Path) -> None:
    disk.write_tils(tmp_path)
    tiles = disk.opened(tmp_path, name="tcga-tils", total=6)
    assert tiles.counts() == {"til-negative": 3, "til-positive": 3}
    # Sorted by the keys of their files, in which the part comes before the participant.
    wanted = [f"TCGA-{site}-A5J{number}" for site in ("OR", "A1") for number in (2, 0, 1)]
    assert column(tiles, "groups") == wanted
    parts = dict(zip(column(tiles, "groups"), column(tiles, "parts"), strict=True))
    assert parts["TCGA-OR-A5J0"] == "train"
    assert parts["TCGA-A1-A5J2"] == "test"
    assert set(column(tiles, "centers")) == {"OR", "A1"}


def test_tils_with_barcodes_of_another_kind_are_refused_without_them(tmp_path: Path) -> None:
    disk.write_tils(tmp_path)
    table = tmp_path / "images-tcga-tils-metadata.csv"
    table.write_text(table.read_text().replace("train,acc,TCGA-OR-A5J0", "train,acc,planted"))
    with pytest.raises(DatasetError, match=r"barcodes that are not TCGA's \(got 'in 1 rows'") as caught:
        disk.opened(tmp_path, "tcga-tils")
    assert "planted" not in str(caught.value)
