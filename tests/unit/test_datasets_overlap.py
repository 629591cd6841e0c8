"""What a test set shares with the slides of an index: by participant, by slide, by keyed patient; never by name."""

from pathlib import Path

import numpy as np
import pytest

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets import LabelledTiles
from histoscale.evaluate.datasets.tiles import FileTiles
from histoscale.evaluate.overlap import TrainingNames, find_overlap, names_of, overlapping_groups, training_names
from histoscale.slides.identity import index_key, patient_id
from histoscale.slides.index import make_index, write_index
from histoscale.slides.records import SlideLocation, SlideRecord
from histoscale.slides.snapshot import protected
from histoscale.storage import ObjectInfo, Store, open_store

SLIDES = (
    "breast/TCGA-A1-A0SK-01Z-00-DX1.A44D70FA-4D96-43F4-9DD7-A61535786297.svs",
    "camelyon17/patient_004_node_4.tif",
    "camelyon16/tumor_001.tif",
    "north/2.svs",
    "north/planted-name/scan.svs",
)
PATIENT = "P-0017"


def index_of(folder: Path) -> Store:
    store = open_store(folder)
    key = index_key(protected(store))
    records = [
        SlideRecord(
            f"{number:032x}",
            "aperio",
            70,
            50,
            0.5,
            "vendor",
            9,
            (1.0,),
            np.ones((5, 7), dtype=np.bool_),
            10.0,
            patient=patient_id(key, PATIENT) if number == 4 else None,
        )
        for number in range(len(SLIDES))
    ]
    locations = {
        record.slide_id: SlideLocation("/slides", (ObjectInfo(path, 9, "e"),), None)
        for record, path in zip(records, SLIDES, strict=True)
    }
    write_index(store, make_index(records, []), locations)
    return store


def tiles_of(groups: list[str] | None) -> LabelledTiles:
    count = len(groups or "ab")
    source = FileTiles(open_store("/nowhere"), ("k",) * count)
    names = None if groups is None else np.array(groups, dtype=np.str_)
    return LabelledTiles("mine", ("a",), source, np.zeros(count, dtype=np.int64), names)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        (SLIDES[0], {"tcga-a1-a0sk-01z-00-dx1.a44d70fa-4d96-43f4-9dd7-a61535786297", "tcga-a1-a0sk"}),
        ("TCGA-A1-A0SK", {"tcga-a1-a0sk"}),
        ("TCGA-A1-A0SK/slide.ome.tiff", {"slide", "tcga-a1-a0sk"}),
        ("XTCGA-A1-A0SK", {"xtcga-a1-a0sk"}),
        ("TCGA-A1-A0SKX", {"tcga-a1-a0skx"}),
        (SLIDES[1], {"patient_004_node_4", "patient_004"}),
        ("patient_004", {"patient_004"}),
        ("camelyon_train_tumor_001", {"tumor_001"}),
        (SLIDES[2], {"tumor_001"}),
        ("north/2.svs", set()),
        ("123456.svs", {"123456"}),
        ("14-22549", {"14-22549"}),
        ("", set()),
    ],
)
def test_names_are_those_by_which_public_datasets_call_a_slide(name: str, names: set[str]) -> None:
    assert names_of(name) == names


def test_shared_groups_are_counted_and_known_by_keyed_ids_alone(tmp_path: Path) -> None:
    store = index_of(tmp_path)
    training = training_names(store)
    groups = [
        "TCGA-A1-A0SK",
        "TCGA-A1-A0SJ",
        "patient_004",
        "camelyon_test_tumor_001",
        "P-0017",
        "2",
        "P-0017",
        "other",
    ]
    overlap = find_overlap(training, tiles_of(groups))
    assert overlapping_groups(training, groups) == ("P-0017", "TCGA-A1-A0SK", "camelyon_test_tumor_001", "patient_004")
    assert overlap.tiles.tolist() == [True, False, True, True, True, False, True, False]
    key = index_key(protected(store))
    assert overlap.shared == tuple(
        sorted(patient_id(key, name) for name in ("P-0017", "TCGA-A1-A0SK", "patient_004", "camelyon_test_tumor_001"))
    )
    assert str(overlap) == "4 of 7 groups are of training slides or patients, 5 of 8 tiles"


def test_names_show_in_no_text(tmp_path: Path) -> None:
    training = training_names(index_of(tmp_path))
    overlap = find_overlap(training, tiles_of(["TCGA-A1-A0SK", "other"]))
    for text in (repr(training), repr(overlap), str(overlap)):
        assert not any(name in text.lower() for name in ("tcga", "tumor", "planted", "scan", "patient_0"))


def test_a_dataset_without_groups_is_refused() -> None:
    nothing = TrainingNames(frozenset(), frozenset(), b"key")
    with pytest.raises(DatasetError, match=r"overlap .* cannot be told \(got 'mine'.*column group"):
        find_overlap(nothing, tiles_of(None))


def test_no_overlap_is_an_empty_one() -> None:
    overlap = find_overlap(TrainingNames(frozenset({"x"}), frozenset(), b"key"), tiles_of(["a", "b", "a"]))
    assert (overlap.groups, overlap.shared, overlap.tiles.tolist()) == (2, (), [False] * 3)
