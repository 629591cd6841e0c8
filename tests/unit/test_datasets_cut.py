"""MIDOG++, DLBCL-Morph, BACH, BreaKHis and the Gleason patches: which tiles are taken, and what is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.unit import datasets_on_disk as disk

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets.midog import CLASSES, SIDE_PX, CutTiles, corners_of, kept_cells
from histoscale.storage.local import LocalStore


def test_midog_cuts_whole_cells_that_lie_inside_and_apart(tmp_path: Path) -> None:
    disk.write_midog(tmp_path)
    tiles = disk.opened(tmp_path, name="midog", classes={"mitotic figure": 2, "not mitotic figure": 2})
    assert tiles.classes == CLASSES
    assert tiles.groups is not None
    assert tiles.centers is not None
    assert tiles.parts is not None
    assert tiles.groups.tolist() == ["2", "7", "2", "7"]  # cells 1 and 6, then 3 and 5
    assert tiles.centers.tolist() == ["Hamamatsu XR", "GT"] * 2
    assert tiles.parts.tolist() == ["train", "test"] * 2
    boxes = {number: (x, y) for number, _, _, x, y in disk.MIDOG_CELLS}
    for index, (cell, image) in enumerate(((1, 2), (6, 7), (3, 2), (5, 7))):
        tile, whole = disk.image_of(tiles, index), disk.pixels(image, 400, 600)
        x, y = boxes[cell]
        places = [
            (left, top)
            for left in range(max(x + 50 - SIDE_PX, 0), min(x, 600 - SIDE_PX) + 1)
            for top in range(max(y + 50 - SIDE_PX, 0), min(y, 400 - SIDE_PX) + 1)
            if np.array_equal(whole[top, left : left + 3], tile[0, :3])
        ]
        assert len(places) == 1, "the tile lies inside its image and holds the whole cell"
        left, top = places[0]
        np.testing.assert_array_equal(tile, whole[top : top + SIDE_PX, left : left + SIDE_PX])


def test_which_cells_are_kept_is_as_if_every_pair_were_looked_at() -> None:
    rng = np.random.default_rng(0)
    count = 300
    images, categories = rng.integers(1, 4, count), rng.integers(1, 3, count)
    corners = rng.integers(0, 1950, (count, 2)).astype(np.float64)
    boxes = np.concatenate([corners, corners + 50], axis=1)
    sizes = {1: (2000, 2000), 2: (1500, 2000), 3: (2000, 1000)}
    kept = kept_cells(images, categories, boxes, sizes)
    for index in range(count):
        x, y = corners[index] + 25
        width, height = sizes[int(images[index])]
        inside = 112 <= x <= width - 112 and 112 <= y <= height - 112
        meets = any(
            images[other] == images[index]
            and categories[other] == 1
            and abs(corners[other] - corners[index]).max() < SIDE_PX
            for other in range(count)
        )
        assert kept[index] == (inside and not (categories[index] == 2 and meets))


def test_a_cells_tile_is_a_function_of_the_cell_alone_and_its_place_is_spread_out() -> None:
    ids = np.arange(1, 2001)
    boxes = np.tile([1000.5, 1000.0, 1050.5, 1050.0], (2000, 1))
    sizes = {1: (3000, 3000)}
    corners = corners_of(ids, np.ones(2000, dtype=np.int64), boxes, sizes)
    some = corners_of(ids[70:90], np.ones(20, dtype=np.int64), boxes[70:90], sizes)
    np.testing.assert_array_equal(some, corners[70:90])
    for axis, (first, last) in enumerate(((827, 1000), (826, 1000))):  # that hold the box, on whole pixels
        assert (corners[:, axis].min(), corners[:, axis].max()) == (first, last)
        deviation = (last - first) / np.sqrt(12 * 2000)
        assert corners[:, axis].mean() == pytest.approx((first + last) / 2, abs=4 * deviation)


def test_images_are_decoded_again_when_others_have_taken_their_place() -> None:
    class Counting(LocalStore):
        def get(self, key: str) -> bytes:
            fetched.append(key)
            data = io.BytesIO()
            Image.fromarray(disk.pixels(int(key), 9, 9)).save(data, "PNG")
            return data.getvalue()

    fetched: list[str] = []
    tiles = CutTiles(Counting(Path("/nowhere")), ("0", "1", "2"), np.array([[0, 1, 2], [1, 0, 0], [2, 4, 4]]), 5)
    for index in (0, 1, 0, 2, 1, 0):
        tile = tiles.read(index)[1]
        image, x, y = ((0, 1, 2), (1, 0, 0), (2, 4, 4))[index]
        np.testing.assert_array_equal(tile, disk.pixels(image, 9, 9)[y : y + 5, x : x + 5])
    assert fetched == ["0", "1", "2", "0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("images"), "not the database of MIDOG"),
        (lambda content: content["annotations"][0].update(image_id=99), "unknown images or categories"),
        (lambda content: content["annotations"][0].update(category_id=3), "unknown images or categories"),
        (lambda content: content["annotations"][0].update(bbox=[150, 150, 50, 50]), "not x0, y0, x1, y1"),
        (lambda content: content["annotations"][0].update(bbox=[1, 1, 500, 50]), "not x0, y0, x1, y1"),
    ],
)
def test_a_midog_database_of_another_form_is_refused(
    tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    disk.write_midog(tmp_path)
    path = tmp_path / "databases" / "MIDOG++.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        disk.opened(tmp_path, "midog")


def test_midog_without_images_or_slides_of_its_table_is_refused(tmp_path: Path) -> None:
    disk.write_midog(tmp_path)
    table = tmp_path / "datasets_xvalidation.csv"
    table.write_text(table.read_text().replace("\n7;", "\n8;"))
    with pytest.raises(DatasetError, match=r"lacks slides \(got 'of 2 cells'"):
        disk.opened(tmp_path, "midog")
    table.unlink()
    tiles = disk.opened(tmp_path, "midog")
    assert (tiles.parts, tiles.centers) == (None, None)
    disk.picture(tmp_path / "images" / "007.tiff", 7, 300, 600)  # too small for the cells
    assert [tiles.source.read(index)[1] is None for index in range(4)] == [False, True, False, False]
    (tmp_path / "images" / "007.tiff").write_bytes(b"not an image")
    damaged = disk.opened(tmp_path, "midog")
    assert [damaged.source.read(index)[1] is None for index in range(4)] == [False, True, False, True]
    (tmp_path / "images" / "007.tiff").unlink()
    with pytest.raises(DatasetError, match="1 tiles that its table names are not there"):
        disk.opened(tmp_path, "midog")


@pytest.mark.parametrize(
    ("choice", "classes", "labels"),
    [
        ("hans", ("GCB", "non-GCB"), {"13901": "GCB", "13902": "non-GCB"}),
        ("cd10", ("negative", "positive"), {"13901": "positive", "13902": "negative"}),
        ("mum1", ("negative", "positive"), {"13901": "negative", "13902": "positive"}),
        (
            "outcome",
            ("deceased", "not deceased"),
            {"13901": "not deceased", "13902": "deceased", "13903": "not deceased"},
        ),
    ],
)
def test_dlbcl_has_the_label_that_is_chosen_and_leaves_out_who_has_none(
    tmp_path: Path, choice: str, classes: tuple[str, ...], labels: dict[str, str]
) -> None:
    disk.write_dlbcl(tmp_path)
    tiles = disk.opened(tmp_path, f"dlbcl-morph:{choice}")
    assert (tiles.name, tiles.classes) == (f"dlbcl-morph-{choice}", classes)
    assert tiles.groups is not None
    found = [(str(group), classes[label]) for group, label in zip(tiles.groups, tiles.labels, strict=True)]
    assert sorted(found) == sorted([*labels.items(), *labels.items()])


def test_dlbcl_with_unknown_labels_or_one_class_is_refused(tmp_path: Path) -> None:
    disk.write_dlbcl(tmp_path)
    table = tmp_path / "clinical_data_cleaned.csv"
    text = table.read_text()
    table.write_text(text.replace("13902,0.0", "13902,1.0"))
    with pytest.raises(DatasetError, match="no patches of non-GCB patients"):
        disk.opened(tmp_path, "dlbcl-morph:hans")
    table.write_text(text.replace("13902,0.0", "13902,ngc"))
    with pytest.raises(DatasetError, match="HANS other than"):
        disk.opened(tmp_path, "dlbcl-morph:hans")


def test_bach_has_four_classes(tmp_path: Path) -> None:
    disk.write_bach(tmp_path)
    tiles = disk.opened(tmp_path, name="bach", classes=dict.fromkeys(("Benign", "InSitu", "Invasive", "Normal"), 2))
    for index in range(8):
        np.testing.assert_array_equal(disk.image_of(tiles, index), disk.pixels(10 * (index // 2) + index % 2))


@pytest.mark.parametrize("zoom", [40, 100, 200, 400])
def test_breakhis_has_one_magnification_and_blocks_of_a_case_share_a_group(tmp_path: Path, zoom: int) -> None:
    disk.write_breakhis(tmp_path)
    tiles = disk.opened(tmp_path, f"breakhis:{zoom}x", total=8)
    assert tiles.name == f"breakhis-{zoom}x"
    assert tiles.groups is not None
    groups = dict(zip(tiles.classes, tiles.groups.tolist(), strict=True))  # one tile per class
    assert groups["adenosis"] == groups["tubular_adenoma"] == "14-22549"
    assert len(set(groups.values())) == 7
    np.testing.assert_array_equal(
        disk.image_of(tiles, tiles.classes.index("mucinous_carcinoma")), disk.pixels(6000 + zoom)
    )


def test_breakhis_without_a_type_is_refused(tmp_path: Path) -> None:
    disk.write_breakhis(tmp_path)
    next((tmp_path / "BreaKHis_v1").rglob("*_PT-14-*-200-001.png")).unlink()
    disk.opened(tmp_path, "breakhis:40x")
    with pytest.raises(DatasetError, match="no phyllodes_tumor at 200x"):
        disk.opened(tmp_path, "breakhis:200x")


def test_gleason_patches_have_the_arrays_parts_and_the_first_pathologists_labels(tmp_path: Path) -> None:
    disk.write_gleason(tmp_path)
    tiles = disk.opened(tmp_path, name="gleason-tma")
    assert tiles.counts() == {"benign": 5, "gleason 3": 0, "gleason 4": 0, "gleason 5": 5}
    assert tiles.groups is not None
    assert tiles.parts is not None
    parts = {group.split("_")[0]: part for group, part in zip(tiles.groups.tolist(), tiles.parts.tolist(), strict=True)}
    assert parts == {"ZT111": "train", "ZT199": "train", "ZT204": "train", "ZT76": "val", "ZT80": "test"}


def test_gleason_patches_without_an_array_are_refused(tmp_path: Path) -> None:
    disk.write_gleason(tmp_path)
    for path in (tmp_path / "train_validation_patches_750" / "ZT76_4_A_1_3").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match=r"no train_validation_patches_750/ZT76_\*"):
        disk.opened(tmp_path, "gleason-tma")
