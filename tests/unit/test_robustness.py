"""The robustness index and the telling of centers: against loops and on features that are made to know one thing."""

import numpy as np
import pytest
from numpy.typing import NDArray

from histoscale.errors import DatasetError
from histoscale.evaluate.robustness import (
    assess_robustness,
    balanced_rows,
    center_design,
    neighbour_kinds,
    robustness_index,
)

CLASSES, CENTERS, PATIENTS = 3, 2, 6  # patients of each center


def crossed(per_cell: int = 24) -> tuple[NDArray[np.int64], NDArray[np.str_], NDArray[np.str_]]:
    """Labels, centers and patients: every class at every center, from all its patients."""
    labels = np.repeat(np.arange(CLASSES), CENTERS * per_cell)
    centers = np.tile(np.repeat(np.arange(CENTERS), per_cell), CLASSES)
    patients = np.tile(np.arange(per_cell) % PATIENTS, CLASSES * CENTERS) + PATIENTS * centers
    names = np.array(["SECRET-NORTH", "SECRET-SOUTH"])[centers]
    return labels, names, np.array([f"SECRET-{number}" for number in patients])


def knowing(known: NDArray[np.int64], noise: float = 0.3, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    features = np.eye(8)[known] * 3.0 + rng.normal(size=(len(known), 8)) * noise
    return features.astype(np.float32)


def test_neighbours_are_counted_as_loops_count_them() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 4)).astype(np.float32)
    labels, centers, units = rng.integers(0, 3, 60), rng.integers(0, 2, 60), rng.integers(0, 9, 60)
    expected = []
    for row in range(60):
        scored = []
        for other in range(60):
            if units[other] != units[row]:
                lengths = float(np.linalg.norm(features[row])) * float(np.linalg.norm(features[other]))
                scored.append((float(features[row] @ features[other]) / lengths, other))
        near = [other for _, other in sorted(scored, reverse=True)[:7]]
        tissue = sum(labels[other] == labels[row] and centers[other] != centers[row] for other in near)
        center = sum(labels[other] != labels[row] and centers[other] == centers[row] for other in near)
        expected.append([tissue, center])
    found = neighbour_kinds(features, labels, centers, units, neighbours=7)
    assert found.tolist() == expected
    index, (low, high) = robustness_index(found, units)
    sums = np.array(expected).sum(axis=0)
    assert index == pytest.approx(sums[0] / sums.sum())
    assert low < index < high


def test_interval_of_the_index_covers_the_truth_at_its_level() -> None:
    covered = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        rates = np.clip(0.6 + 0.3 * rng.uniform(-1, 1, 40), 0, 1)
        units = np.repeat(np.arange(40), 8)
        tissue = rng.binomial(20, rates[units])
        low, high = robustness_index(np.stack([tissue, 20 - tissue], axis=1), units, seed)[1]
        covered += low <= 0.6 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_features_of_tissue_alone_score_one_and_cannot_tell_the_center() -> None:
    labels, centers, patients = crossed()
    design = center_design(labels, centers, patients, seeds=3)
    found = assess_robustness("pretrained", "both", knowing(labels), design)
    assert found.index == 1.0
    assert found.center_accuracy == pytest.approx(0.5, abs=0.12)
    assert found.center_chance == 0.5
    assert found.tiles == 144
    assert len(found.center_values) == 3


def test_features_of_the_center_alone_score_zero_and_tell_it() -> None:
    labels, centers, patients = crossed()
    design = center_design(labels, centers, patients, seeds=2)
    found = assess_robustness("pretrained", "both", knowing(design.centers), design)
    assert found.index < 0.05
    assert found.center_values == (1.0, 1.0)
    assert found.center_interval == (1.0, 1.0)


def test_features_of_noise_score_as_chance_does() -> None:
    labels, centers, patients = crossed(per_cell=60)
    design = center_design(labels, centers, patients, seeds=2)
    noise = np.random.default_rng(0).normal(size=(len(labels), 8)).astype(np.float32)
    found = assess_robustness("pretrained", "both", noise, design)
    assert found.index_chance == pytest.approx(1 / 3)  # one other center against two other classes
    # A patient's own tiles are no neighbours, which takes some of the same center away.
    assert found.index == pytest.approx(found.index_chance, abs=0.06)
    assert found.center_accuracy == pytest.approx(0.5, abs=0.12)


def test_patients_do_not_vouch_for_their_center() -> None:
    # Features know the patient and nothing else: on patients it has not seen, a probe cannot tell the center.
    labels, centers, patients = crossed(per_cell=60)
    numbers = np.unique(patients, return_inverse=True)[1]
    features = (np.random.default_rng(0).normal(size=(12, 8))[numbers] * 5.0).astype(np.float32)
    by_patient = center_design(labels, centers, patients, seeds=8)
    by_tile = center_design(labels, centers, None, seeds=8)
    assert assess_robustness("pretrained", "both", features, by_tile).center_accuracy > 0.8
    assert assess_robustness("pretrained", "both", features, by_patient).center_accuracy < 0.7


def test_design_is_a_balanced_grid_with_whole_patients_on_one_side() -> None:
    labels, centers, patients = crossed()
    keep = ~((labels == 0) & (centers == "SECRET-SOUTH")) | (np.arange(len(labels)) % 4 > 0)
    labels, centers, patients = labels[keep], centers[keep], patients[keep]
    design = center_design(labels, centers, patients, seeds=2)
    cells = np.zeros((CLASSES, CENTERS), dtype=int)
    np.add.at(cells, (design.labels, design.centers), 1)
    assert cells.tolist() == [[18, 18]] * 3
    np.testing.assert_array_equal(labels[design.rows], design.labels)
    for split in design.splits:
        some = patients[design.rows]
        assert not set(some[split.train]) & set(some[split.test])
        assert set(design.centers[split.test]) == {0, 1}


def test_the_grid_with_the_most_tiles_is_kept() -> None:
    # Class 2 stands at one center alone, class 3 at both with few tiles: with class 3 the grid would be smaller.
    labels = np.repeat([0, 0, 1, 1, 2, 3, 3], [40, 30, 30, 30, 50, 30, 3])
    centers = np.repeat([0, 1, 0, 1, 0, 0, 1], [40, 30, 30, 30, 50, 30, 3])
    rows = balanced_rows(labels, centers)
    assert np.unique(labels[rows], return_counts=True)[1].tolist() == [60, 60]
    assert set(labels[rows]) == {0, 1}
    assert np.bincount(centers[rows]).tolist() == [60, 60]
    assert not np.array_equal(balanced_rows(labels, centers, seed=1), rows)


def test_classes_that_stand_at_one_center_each_are_refused_without_names() -> None:
    labels, centers = np.repeat([0, 1], 20), np.repeat(["SECRET-NORTH", "SECRET-SOUTH"], 20)
    with pytest.raises(DatasetError, match=r"not crossed.*2 classes at 2 centers, 2 of 4 pairs filled") as caught:
        center_design(labels, centers, None, seeds=1)
    assert "SECRET" not in str(caught.value)


def test_a_center_of_one_patient_is_refused_without_names() -> None:
    labels, centers, patients = crossed()
    patients[centers == "SECRET-NORTH"] = "SECRET-0"
    with pytest.raises(DatasetError, match=r"too few groups .*'center 1: 1'") as caught:
        center_design(labels, centers, patients, seeds=1)
    assert "SECRET" not in str(caught.value)


def test_tiles_without_any_telling_neighbour_are_refused() -> None:
    with pytest.raises(DatasetError, match="no tile has a neighbour"):
        robustness_index(np.zeros((4, 2), dtype=np.int64), np.arange(4))
