"""Regions lie inside the slide, do not overlap, and hold the tissue that was asked for."""

import numpy as np
import pytest
from numpy.typing import NDArray

from histoscale.sampling.places import Frames, coarsest_scan_mpp, find_places, grid, integral, tissue_cells

SIZE_PX0 = (1000, 700)
FULL = np.ones((44, 63), bool)


def corners_px0(
    mask: NDArray[np.bool_],
    size_px0: tuple[int, int],
    side_px0: float,
    min_tissue: float = 0.5,
    size: float = 1.0,
) -> NDArray[np.float64]:
    """Corners of all places with 16 level-0 px per mask px: [P, 2]."""
    found = find_places(mask, size_px0, side_px0, 16.0, min_tissue)
    count = len(found.cells)
    frames = Frames.of([found.squares] * max(count, 1)).take(np.arange(count))
    return np.stack(frames.corners_px0(found.cells, np.full(count, size)), axis=1)


def test_a_slide_serves_coarser_scales_and_finer_ones_up_to_the_limit() -> None:
    assert coarsest_scan_mpp(2.0, 1.0) >= 0.25
    assert coarsest_scan_mpp(0.25, 1.1) >= 0.275
    assert coarsest_scan_mpp(0.25, 1.0) < 0.2525
    assert coarsest_scan_mpp(0.25, 1.1) < 0.2751


@pytest.mark.parametrize("side_px0", [30.08, 32.0, 64.0, 128.3])
def test_regions_lie_inside_the_slide_and_do_not_overlap(side_px0: float) -> None:
    corners = corners_px0(FULL, SIZE_PX0, side_px0)
    columns, rows = int(SIZE_PX0[0] // np.ceil(side_px0)), int(SIZE_PX0[1] // np.ceil(side_px0))
    assert corners.shape == (columns * rows, 2)
    assert corners.min() >= 0.0
    assert (corners + side_px0 <= SIZE_PX0).all()
    for axis in (0, 1):
        assert np.diff(np.unique(corners[:, axis])).min() >= side_px0


def test_the_slack_is_split_evenly() -> None:
    squares = grid(1000, 700, 64.0)
    assert (squares.columns, squares.rows) == (15, 10)
    assert (squares.left_px0, squares.top_px0) == (20, 30)


def test_a_smaller_region_lies_in_the_middle_of_its_square_on_whole_pixels() -> None:
    whole, smaller = corners_px0(FULL, SIZE_PX0, 64.0), corners_px0(FULL, SIZE_PX0, 64.0, size=0.9)
    np.testing.assert_array_equal(smaller - whole, np.full(whole.shape, 3.0))  # 6.4 px of slack, floored on one side


def test_moved_regions_stay_inside_the_slide_on_whole_pixels() -> None:
    frames = Frames.of([grid(1000, 700, 64.5)] * 3)
    corners = np.array([20.0, 500.0, 918.0]), np.array([30.0, 300.0, 600.0])
    shifts = np.array([[-0.5, -0.5], [0.25, -0.25], [0.5, 0.5]])
    x_px0, y_px0 = frames.moved_px0(*corners, np.full(3, 1.0), shifts)
    assert x_px0.tolist() == [0.0, 516.0, 935.0]
    assert y_px0.tolist() == [0.0, 284.0, 632.0]


@pytest.mark.parametrize("mask_px0", [16.0, 12.3, 50.0])
def test_tissue_share_equals_a_brute_force_count_over_level_0_pixels(mask_px0: float) -> None:
    rng = np.random.default_rng(0)
    width, height, side_px0 = 333, 250, 41.5
    mask = rng.random((int(height / mask_px0) + 1, int(width / mask_px0) + 1)) < 0.6
    squares = grid(width, height, side_px0)
    sub = 10  # samples per level-0 pixel and axis
    steps = (np.arange(int(side_px0 * sub)) + 0.5) / sub
    frames = Frames.of([squares] * (squares.columns * squares.rows))
    corners = np.stack(frames.corners_px0(np.arange(len(frames.columns)), np.ones(len(frames.columns))), axis=1)
    for min_tissue in (0.3, 0.55, 0.8):
        cells = tissue_cells(squares, integral(mask), mask_px0, min_tissue)
        for (x0, y0), kept in zip(corners, cells, strict=True):
            columns = ((x0 + steps) / mask_px0).astype(int)
            rows = ((y0 + steps) / mask_px0).astype(int)
            share = mask[np.ix_(rows, columns)].mean()
            if abs(share - min_tissue) > 0.01:
                assert kept == (share >= min_tissue)


def test_a_region_wholly_of_tissue_at_the_border_is_kept_at_a_threshold_of_one() -> None:
    corners = corners_px0(np.ones((4, 4), bool), (64, 64), 32.0, min_tissue=1.0)
    assert corners.tolist() == [[0, 0], [32, 0], [0, 32], [32, 32]]


def test_what_lies_beyond_the_mask_is_no_tissue() -> None:
    assert corners_px0(np.ones((2, 2), bool), (64, 32), 32.0).tolist() == [[0, 0]]


def test_a_slide_smaller_than_a_region_has_no_place() -> None:
    assert corners_px0(FULL, (31, 500), 32.0, min_tissue=0.0).shape == (0, 2)
