"""Regions lie inside the slide, do not overlap, and hold the tissue that was asked for."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from histoscale.sampling.places import grid, integral, places, serves, tissue_cells

REGION_PX = 32


@dataclass(frozen=True)
class FakeSlide:
    slide_id: str = "0" * 32
    width_px0: int = 1000
    height_px0: int = 700
    mpp: float = 0.5
    mask: NDArray[np.bool_] = field(default_factory=lambda: np.ones((44, 63), bool))
    mask_px0: float = 16.0


def test_a_slide_serves_coarser_scales_and_finer_ones_up_to_the_limit() -> None:
    assert serves(0.25, 2.0, 1.0)
    assert serves(0.2525, 0.25, 1.1)
    assert serves(0.275, 0.25, 1.1)
    assert not serves(0.2525, 0.25, 1.0)
    assert not serves(0.5, 0.25, 1.1)


@pytest.mark.parametrize("mpp", [0.47, 0.5, 1.0, 2.0])
def test_regions_lie_inside_the_slide_and_do_not_overlap(mpp: float) -> None:
    slide = FakeSlide()
    side_px0 = REGION_PX * mpp / slide.mpp
    corners = places(slide, mpp, REGION_PX, 0.5)
    columns, rows = int(slide.width_px0 // np.ceil(side_px0)), int(slide.height_px0 // np.ceil(side_px0))
    assert corners.shape == (columns * rows, 2)
    assert corners.min() >= 0.0
    assert (corners + side_px0 <= [slide.width_px0, slide.height_px0]).all()
    for axis in (0, 1):
        assert np.diff(np.unique(corners[:, axis])).min() >= side_px0


def test_the_slack_is_split_evenly() -> None:
    squares = grid(1000, 700, 64.0)
    assert (squares.columns, squares.rows) == (15, 10)
    assert (squares.left_px0, squares.top_px0) == (20, 30)


@pytest.mark.parametrize("mask_px0", [16.0, 12.3, 50.0])
def test_tissue_share_equals_a_brute_force_count_over_level_0_pixels(mask_px0: float) -> None:
    rng = np.random.default_rng(0)
    width, height, side_px0 = 333, 250, 41.5
    mask = rng.random((int(height / mask_px0) + 1, int(width / mask_px0) + 1)) < 0.6
    squares = grid(width, height, side_px0)
    sub = 10  # samples per level-0 pixel and axis
    steps = (np.arange(int(side_px0 * sub)) + 0.5) / sub
    for min_tissue in (0.3, 0.55, 0.8):
        cells = tissue_cells(squares, integral(mask), mask_px0, min_tissue)
        for cell, kept in enumerate(cells):
            x0, y0 = squares.corners_px0(np.array([cell], np.int32))[0]
            columns = ((x0 + steps) / mask_px0).astype(int)
            rows = ((y0 + steps) / mask_px0).astype(int)
            share = mask[np.ix_(rows, columns)].mean()
            if abs(share - min_tissue) > 0.01:
                assert kept == (share >= min_tissue)


def test_a_region_wholly_of_tissue_at_the_border_is_kept_at_a_threshold_of_one() -> None:
    slide = FakeSlide(width_px0=64, height_px0=64, mask=np.ones((4, 4), bool))
    assert places(slide, 0.5, REGION_PX, 1.0).tolist() == [[0, 0], [32, 0], [0, 32], [32, 32]]


def test_what_lies_beyond_the_mask_is_no_tissue() -> None:
    slide = FakeSlide(width_px0=64, height_px0=32, mask=np.ones((2, 2), bool))
    assert places(slide, 0.5, REGION_PX, 0.5).tolist() == [[0, 0]]


def test_a_slide_smaller_than_a_region_has_no_place() -> None:
    slide = FakeSlide(width_px0=31, height_px0=500)
    assert places(slide, 0.5, REGION_PX, 0.0).shape == (0, 2)
