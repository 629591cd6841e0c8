"""The benchmark of tissue detection: its arithmetic, its baselines and its refusal."""

from pathlib import Path

import numpy as np
import pytest

from histoscale.bench.tissue import above_otsu, hsv_range, precision_and_recall, saturated, tissue
from histoscale.errors import DatasetError


def test_every_category_weighs_the_same_and_half_of_all_is_tissue() -> None:
    accepted = {"H&E": [1.0, 1.0, 1.0], "fat": [0.0, 1.0], "glass": [0.0, 0.0], "pen": [0.5]}
    precision, recall = precision_and_recall(accepted)
    assert recall == pytest.approx(0.75)
    assert precision == pytest.approx(0.75 / (0.75 + 0.25))


def test_the_baselines_see_hue_and_saturation_as_opencv_counts_them() -> None:
    colours = {
        "eosin": (220, 150, 190),
        "DAB": (150, 105, 75),
        "glass": (240, 240, 240),
        "dark": (80, 40, 70),
        "green": (60, 160, 130),
    }
    rgb = np.array([list(colours.values())], np.uint8)
    assert dict(zip(colours, hsv_range(rgb)[0].tolist(), strict=True)) == {
        "eosin": True,
        "DAB": False,
        "glass": False,
        "dark": False,
        "green": False,
    }
    assert saturated(rgb)[0].tolist() == [True, True, False, True, True]


def test_otsu_divides_two_levels() -> None:
    rgb = np.full((20, 20, 3), 240, np.uint8)
    rgb[:5] = (200, 100, 150)
    assert np.array_equal(above_otsu(rgb), np.arange(20)[:, None].repeat(20, 1) < 5)


def test_absent_images_are_told(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no labelled images"):
        next(tissue(tmp_path / "none"))
