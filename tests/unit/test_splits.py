"""How a dataset is divided: classes alike, groups whole, and what cannot be divided is refused with counts."""

import numpy as np
import pytest
from numpy.typing import NDArray

from histoscale.errors import DatasetError
from histoscale.evaluate.splits import TEST_SHARE, VAL_SHARE, Split, splits_of, units_of

CLASSES = ("gland", "stroma", "tumour")


def labelled(counts: list[int]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(counts)), counts)


def patients(labels: NDArray[np.int64], count: int, seed: int = 0) -> NDArray[np.str_]:
    drawn = np.random.default_rng(seed).integers(0, count, len(labels))
    return np.array([f"SECRET-{number}" for number in drawn])


def parts_of(split: Split, total: int) -> None:
    """Train and test fill the dataset; fit and val fill train."""
    assert sorted([*split.train, *split.test]) == list(range(total))
    assert sorted([*split.fit, *split.val]) == sorted(split.train)


def test_tiles_without_groups_are_divided_class_by_class_and_the_seed_decides() -> None:
    labels = labelled([4, 10, 100])
    first, second, third = splits_of(labels, CLASSES, 3)
    parts_of(first, 114)
    assert np.bincount(labels[first.test]).tolist() == [1, 3, 30]
    assert np.bincount(labels[first.val]).tolist() == [1, 1, 14]
    np.testing.assert_array_equal(splits_of(labels, CLASSES, 1)[0].test, first.test)
    assert len({tuple(split.test) for split in (first, second, third)}) == 3


def test_no_group_stands_on_two_sides_and_every_class_on_both() -> None:
    labels = labelled([60, 90, 300])
    groups = patients(labels, 40)
    splits = splits_of(labels, CLASSES, 5, groups)
    for split in splits:
        parts_of(split, 450)
        for one, other in ((split.train, split.test), (split.fit, split.val)):
            assert not set(groups[one]) & set(groups[other])
            assert set(labels[one]) == set(labels[other]) == {0, 1, 2}
        assert len(split.test) / 450 == pytest.approx(TEST_SHARE, abs=0.1)
        assert len(split.val) / len(split.train) == pytest.approx(VAL_SHARE, abs=0.1)
    assert len({tuple(split.test) for split in splits}) == 5
    again = splits_of(labels, CLASSES, 5, groups)
    assert all(np.array_equal(one.test, other.test) for one, other in zip(splits, again, strict=True))


def test_classes_of_two_patients_each_are_divided_and_their_strength_is_chosen_by_tiles() -> None:
    labels = labelled([20, 20, 20])
    groups = np.array([f"{label}-{number % 2}" for number, label in enumerate(labels)])
    (split,) = splits_of(labels, CLASSES, 1, groups)
    parts_of(split, 60)
    assert np.bincount(labels[split.test]).tolist() == [10, 10, 10]
    assert not set(groups[split.train]) & set(groups[split.test])
    assert np.bincount(labels[split.val]).tolist() == [2, 2, 2]


def test_the_one_training_tile_of_a_class_is_fitted_on() -> None:
    labels = labelled([2, 50])
    (split,) = splits_of(labels, CLASSES[:2], 1)
    assert np.bincount(labels[split.fit]).tolist() == [1, 28]
    assert set(labels[split.val]) == {1}
    (tiny,) = splits_of(labelled([2, 2]), CLASSES[:2], 1)
    np.testing.assert_array_equal(tiny.val, tiny.fit)  # nothing can be spared


def test_a_class_with_one_tile_is_refused_with_its_count() -> None:
    with pytest.raises(DatasetError, match=r"1 of 3 classes have too few tiles in the dataset .*'stroma: 1'"):
        splits_of(labelled([5, 1, 5]), CLASSES, 1)


def test_a_class_without_tiles_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"'tumour: 0'"):
        splits_of(labelled([5, 5]), CLASSES, 1)


def test_a_class_of_one_patient_is_refused_without_a_name() -> None:
    labels = labelled([20, 20, 20])
    groups = patients(labels, 8)
    groups[labels == 2] = "SECRET-0"
    with pytest.raises(DatasetError, match=r"too few groups .*'tumour: 1'") as caught:
        splits_of(labels, CLASSES, 1, groups)
    assert "SECRET" not in str(caught.value)


def test_groups_that_cannot_be_divided_are_refused_without_a_name() -> None:
    # Two patients with each pair of classes: wherever one of three stands, a class is whole on one side.
    labels = np.repeat([0, 1, 1, 2, 2, 0], 10)
    groups = np.repeat(["SECRET-a", "SECRET-a", "SECRET-b", "SECRET-b", "SECRET-c", "SECRET-c"], 10)
    with pytest.raises(DatasetError, match=r"cannot be divided .*3 groups for 3 classes") as caught:
        splits_of(labels, CLASSES, 1, groups)
    assert "SECRET" not in str(caught.value)


def test_the_parts_of_a_dataset_are_kept() -> None:
    labels = labelled([30, 30, 30])
    parts = np.tile(np.array(["train", "val", "test"]), 30)
    (split,) = splits_of(labels, CLASSES, 3, None, parts)
    for rows, name in ((split.train, "train"), (split.fit, "train"), (split.val, "val"), (split.test, "test")):
        np.testing.assert_array_equal(rows, np.flatnonzero(parts == name))


def test_without_a_validation_part_it_is_drawn_from_the_training_part() -> None:
    labels = labelled([30, 30, 30])
    parts = np.tile(np.array(["train", "train", "test"]), 30)
    (split,) = splits_of(labels, CLASSES, 3, None, parts)
    parts_of(split, 90)
    np.testing.assert_array_equal(split.test, np.flatnonzero(parts == "test"))
    assert np.bincount(labels[split.val]).tolist() == [4, 4, 4]


def test_without_a_test_part_the_validation_part_is_tested_on() -> None:
    labels = labelled([30, 30, 30])
    parts = np.tile(np.array(["train", "train", "val"]), 30)
    (split,) = splits_of(labels, CLASSES, 3, None, parts)
    parts_of(split, 90)
    np.testing.assert_array_equal(split.test, np.flatnonzero(parts == "val"))


@pytest.mark.parametrize("leak_into", ["train", "val"])
def test_a_group_in_two_parts_is_refused_with_counts_and_no_names(leak_into: str) -> None:
    labels = labelled([30, 30, 30])
    parts = np.tile(np.array(["train", "val", "test"]), 30)
    groups = np.array([f"SECRET-{part}-{number % 9}" for number, part in enumerate(parts)])
    splits_of(labels, CLASSES, 1, groups, parts)
    groups[np.flatnonzero(parts == leak_into)[0]] = groups[2]
    with pytest.raises(DatasetError, match=r"1 of 3 groups of the test part .*10 of 30 test tiles") as caught:
        splits_of(labels, CLASSES, 1, groups, parts)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(("part", "words"), [("train", "its training part"), ("test", "its test part")])
def test_a_class_that_a_part_lacks_is_refused(part: str, words: str) -> None:
    labels = labelled([30, 30, 30])
    parts = np.tile(np.array(["train", "val", "test"]), 30)
    parts[(labels == 1) & (parts == part)] = "val"
    with pytest.raises(DatasetError, match=rf"1 of 3 classes have too few tiles in {words} .*'stroma: 0'"):
        splits_of(labels, CLASSES, 1, None, parts)


def test_a_class_with_one_training_tile_is_refused() -> None:
    labels = labelled([30, 30, 30])
    parts = np.tile(np.array(["train", "val", "test"]), 30)
    parts[np.flatnonzero((labels == 1) & (parts == "train"))[1:]] = "val"
    with pytest.raises(DatasetError, match=r"2 tiles or more"):
        splits_of(labels, CLASSES, 1, None, parts)


def test_units_are_groups_or_the_tiles_themselves() -> None:
    assert units_of(np.array(["b", "a", "b"]), 3).tolist() == [1, 0, 1]
    assert units_of(None, 3).tolist() == [0, 1, 2]
