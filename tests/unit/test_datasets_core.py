"""How a layout is found, chosen and refused; tables of one's own; and files that are damaged or of another kind."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.unit import datasets_on_disk as disk

from histoscale.errors import DatasetError, StorageError
from histoscale.evaluate.datasets import LAYOUTS, open_dataset
from histoscale.evaluate.datasets.layout import list_place
from histoscale.evaluate.datasets.registry import recognise
from histoscale.evaluate.features import extract

WRITERS: dict[str, Callable[[Path], None]] = {
    "pcam": lambda folder: disk.write_pcam(folder, {"train": 2, "valid": 2, "test": 2}),
    "crc": disk.write_crc,
    "crc-nonorm": lambda folder: disk.write_crc(folder, "NCT-CRC-HE-100K-NONORM"),
    "camelyon17-wilds": disk.write_camelyon17,
    "mhist": disk.write_mhist,
    "tcga-tils": disk.write_tils,
    "midog": disk.write_midog,
    "dlbcl-morph": disk.write_dlbcl,
    "bach": disk.write_bach,
    "breakhis": disk.write_breakhis,
    "gleason-tma": disk.write_gleason,
}
TOP_FOLDERS = {"camelyon17-wilds": "camelyon17_v1.0", "tcga-tils": "TCGA-TILs", "dlbcl-morph": "DLBCL-Morph"}


def tiles_of_a_table(folder: Path, header: str, rows: list[str], name: str = "tiles.csv") -> Path:
    for label in ("a", "b"):
        for index in range(4):
            disk.picture(folder / "pictures" / f"{label}{index}.png", 10 * ord(label) + index)
    (folder / name).write_text("\n".join([header, *rows, ""]))
    return folder / name


def rows_of_a_table(more: str = "") -> list[str]:
    return [f"pictures/{label}{index}.png,{label}{more}" for index in range(4) for label in ("b", "a")]


def test_every_layout_has_a_writer_here() -> None:
    assert set(WRITERS) | {"folders"} == set(LAYOUTS)


@pytest.mark.parametrize("name", WRITERS)
def test_a_layout_is_found_by_its_files_alone(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    assert recognise(list_place(str(tmp_path))).name == name


@pytest.mark.parametrize("name", TOP_FOLDERS)
def test_the_folder_that_a_download_unpacks_to_may_be_given_or_hold_the_dataset(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / TOP_FOLDERS[name])
    layout = f"{name}:hans" if name == "dlbcl-morph" else name
    above, inside = disk.opened(tmp_path, layout), disk.opened(tmp_path / TOP_FOLDERS[name], layout)
    assert recognise(list_place(str(tmp_path))).name == name
    np.testing.assert_array_equal(disk.image_of(above, 0), disk.image_of(inside, 0))
    assert len(above) == len(inside) > 0


def test_two_layouts_in_one_place_are_refused_until_one_is_named(tmp_path: Path) -> None:
    disk.write_crc(tmp_path)
    disk.write_crc(tmp_path, "NCT-CRC-HE-100K-NONORM")
    with pytest.raises(DatasetError, match=r"layouts of several datasets \(got 'crc, crc-nonorm'"):
        open_dataset(str(tmp_path))
    assert disk.opened(tmp_path, "crc-nonorm").name == "crc-nonorm"


def test_an_unknown_layout_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"got 'mihst'.*nearest is mhist"):
        open_dataset(str(tmp_path), "mihst")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("breakhis", r"needs a choice \(expected breakhis:40x or breakhis:100x"),
        ("breakhis:20x", r"no such choice \(got 'breakhis:20x'"),
        ("dlbcl-morph", r"needs a choice \(expected dlbcl-morph:hans or"),
        ("crc:x", r"no such choice \(got 'crc:x'; expected crc\)"),
    ],
)
def test_choices_are_made_and_known(tmp_path: Path, layout: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        open_dataset(str(tmp_path), layout)


@pytest.mark.parametrize("name", WRITERS)
def test_a_place_that_lacks_everything_is_refused(tmp_path: Path, name: str) -> None:
    choice = {"breakhis": ":40x", "dlbcl-morph": ":hans"}.get(name, "")
    with pytest.raises(DatasetError, match=rf"{name}: the dataset is incomplete \(got 'no .*expected .*whole download"):
        open_dataset(str(tmp_path), name + choice)


@pytest.mark.parametrize("name", WRITERS)
def test_sources_pickle_and_give_the_same_content(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path)
    tiles = disk.opened(tmp_path, name + {"breakhis": ":40x", "dlbcl-morph": ":hans"}.get(name, ""))
    disk.image_of(tiles, 0)
    copy = pickle.loads(pickle.dumps(tiles))
    assert len(copy.source) == len(tiles.source) == len(tiles)
    assert all(copy.source.read(index)[0] == tiles.source.read(index)[0] for index in range(len(tiles)))
    assert list(tiles.labels) == sorted(tiles.labels)
    assert list(tiles.classes) == sorted(tiles.classes)


def test_hidden_files_are_no_tiles(tmp_path: Path) -> None:
    disk.write_bach(tmp_path)
    disk.picture(tmp_path / "ICIAR2018_BACH_Challenge" / "Photos" / "Benign" / "._B0.tif", 1)
    disk.picture(tmp_path / ".cache" / "Photos" / "Benign" / "B0.tif", 1)
    assert disk.opened(tmp_path, "bach").counts()["Benign"] == 2


def test_a_csv_gives_labels_groups_centers_and_parts(tmp_path: Path) -> None:
    rows = [
        f"pictures/{label}{index}.png,{label},patient {index},site {index % 2},{'test' if index == 3 else 'train'}"
        for index in range(4)
        for label in ("b", "a")
    ]
    tiles = open_dataset(str(tiles_of_a_table(tmp_path, "path,label,group,center,part", rows)))
    assert (tiles.name, tiles.classes, tiles.counts()) == ("tiles", ("a", "b"), {"a": 4, "b": 4})
    assert tiles.groups is not None
    assert tiles.centers is not None
    assert tiles.parts is not None
    assert tiles.groups.tolist() == [f"patient {index}" for index in range(4)] * 2
    assert tiles.centers.tolist() == [f"site {index % 2}" for index in range(4)] * 2
    assert tiles.parts.tolist() == ["train", "train", "train", "test"] * 2
    for index in range(4):
        np.testing.assert_array_equal(disk.image_of(tiles, index), disk.pixels(10 * ord("a") + index))


def test_a_parquet_table_and_a_csv_give_the_same_tiles(tmp_path: Path) -> None:
    csv = open_dataset(str(tiles_of_a_table(tmp_path, "path,label", rows_of_a_table())))
    columns = [row.split(",") for row in rows_of_a_table()]
    table = pa.table({"label": [row[1] for row in columns], "path": [row[0] for row in columns]})
    pq.write_table(table, tmp_path / "tiles.parquet")
    parquet = open_dataset(str(tmp_path / "tiles.parquet"), "table")
    assert extract(csv, {}).content_hash == extract(parquet, {}).content_hash
    assert parquet.groups is None
    assert parquet.parts is None


def test_numbers_in_a_parquet_table_are_names(tmp_path: Path) -> None:
    tiles_of_a_table(tmp_path, "", [])
    paths = [row.split(",")[0] for row in rows_of_a_table()]
    pq.write_table(pa.table({"path": paths, "label": [1, 0] * 4}), tmp_path / "tiles.parquet")
    assert open_dataset(str(tmp_path / "tiles.parquet")).classes == ("0", "1")


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("path", ["pictures/a0.png"], r"lacks columns \(got 'label'"),
        ("path,label,groups", rows_of_a_table(",x"), r"not known \(got 'groups \(nearest: group\)'"),
        ("path,label,label", rows_of_a_table(",x"), "a column twice"),
        ("path,label", [], "no rows"),
        ("path,label", ["pictures/a0.png,", ",a"], r"2 rows .*row 1: no label, row 2: no path"),
        ("path,label", ["pictures/a0.png"], "row 1: no label"),
        ("path,label,part", rows_of_a_table(",valid"), r"8 rows .*row 1: part is not train, val or test"),
        ("path,label", [*rows_of_a_table(), "pictures/planted.png,a"], r"1 of 9 tiles .*\(got 'row 9'"),
        ("path,label", rows_of_a_table()[1::2], r"one class only \(got 'a'.*Add tiles of another class"),
        ("path,label", rows_of_a_table()[1:], r"too few tiles \(got 'b: 3'"),
        ('path,label\n"', [], "no whole CSV"),
    ],
)
def test_tables_that_are_not_valid_are_refused_without_names(
    tmp_path: Path, header: str, rows: list[str], message: str
) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(str(tiles_of_a_table(tmp_path, header, rows)))
    assert "planted" not in str(caught.value)


def test_long_lists_of_faults_are_cut_short(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"row 10: no label and 2 more"):
        open_dataset(str(tiles_of_a_table(tmp_path, "path,label", ["pictures/a0.png,"] * 12)))


def test_a_table_is_a_file_of_a_known_kind(tmp_path: Path) -> None:
    (tmp_path / "tiles.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(DatasetError, match="no whole CSV or Parquet"):
        open_dataset(str(tmp_path / "tiles.parquet"))
    with pytest.raises(DatasetError, match=r"layout table is that of .*\(got '.*expected a file that ends"):
        open_dataset(str(tmp_path), "table")
    with pytest.raises(DatasetError, match=r"\(got 'table:x'"):
        open_dataset(str(tmp_path / "tiles.csv"), "table:x")
    with pytest.raises(StorageError, match="does not exist"):
        open_dataset(str(tmp_path / "none.csv"))


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"total": 7}, "in all: 6 tiles of 7"),
        ({"parts": {"train": 4, "test": 3}}, r"got 'test: 2 tiles of 3'"),
        ({"classes": {"HP": 2, "SSA": 3}}, r"got 'HP: 3 tiles of 2'"),
    ],
)
def test_a_size_that_is_not_the_published_one_is_refused(
    tmp_path: Path, published: dict[str, object], message: str
) -> None:
    disk.write_mhist(tmp_path)
    with pytest.raises(DatasetError, match=message):
        disk.opened(tmp_path, "mhist", **published)


def test_unreadable_tiles_of_other_sources_are_counted_as_those_of_folders(tmp_path: Path) -> None:
    disk.write_mhist(tmp_path)
    (tmp_path / "images" / "MHIST_aac.png").write_bytes(b"not an image")
    with pytest.raises(DatasetError, match=r"1 of 6 tiles cannot be read \(got 'SSA #1"):
        extract(disk.opened(tmp_path, "mhist"), {})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("Partition", "Part"), r"annotations.csv lacks columns \(got 'Partition'"),
        (lambda text: text.replace("HP", "planted", 1), r"Majority Vote Label other than HP or SSA \(got 'in 1 rows'"),
        (lambda text: text.replace(",test", ",tset"), r"Partition other than train or test \(got 'in 2 rows'"),
        (lambda text: text.replace("aaf.png,", "planted.png,"), r"1 tiles that its table names are not there"),
        (lambda text: text + "MHIST_aaf.png,HP\n", r"cut short \(got 'line 8'"),
        (lambda text: text + '"', "annotations.csv is no whole CSV"),
    ],
)
def test_a_damaged_table_of_a_dataset_is_refused(tmp_path: Path, damage: Callable[[str], str], message: str) -> None:
    disk.write_mhist(tmp_path)
    table = tmp_path / "annotations.csv"
    table.write_text(damage(table.read_text()))
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(str(tmp_path), "mhist")
    assert "planted" not in str(caught.value)
