"""iBOT's block masks: against loops over tiles and blocks, and by their statistics."""

import math

import numpy as np
import pytest

from histoscale.augment import block_masks
from histoscale.config.recipe import LossSection
from histoscale.seeding import key, uniforms

LOSS = LossSection()


def both(masks: np.ndarray) -> np.ndarray:
    """The mask of each tile, whichever of its two crops has it."""
    first, second = np.split(masks, 2)
    return first | second


def mask_by_loops(sample_id: int, seed: int, grid: int, loss: LossSection) -> set[tuple[int, int]]:
    draws = uniforms(key(seed, "mask"), np.array([sample_id]), 3 + 4 * 32)[0].tolist()
    low, high = loss.mask_ratio
    wanted = max(1, int(grid * grid * (low + draws[0] * (high - low))))
    masked: set[tuple[int, int]] = set()
    for block in range(32):
        area_draw, aspect_draw, row_draw, column_draw = draws[3 + 4 * block : 7 + 4 * block]
        left = wanted - len(masked)
        area = min(4, left) + area_draw * (left - min(4, left))
        aspect = math.exp(math.log(0.3) + aspect_draw * (math.log(1 / 0.3) - math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height > grid or width > grid:
            continue
        top, first = int(row_draw * (grid - height + 1)), int(column_draw * (grid - width + 1))
        cells = {(row, column) for row in range(top, top + height) for column in range(first, first + width)}
        if len(cells - masked) <= left:
            masked |= cells
    if not masked:
        place = int(draws[1] * grid * grid)
        masked = {(place // grid, place % grid)}
    return masked


@pytest.mark.parametrize("grid", [1, 2, 4, 16])
def test_masks_are_those_of_loops_over_tiles_and_blocks(grid: int) -> None:
    ids = np.arange(60, dtype=np.int64) * 7919
    masks = both(block_masks(ids, 5, grid, LOSS)).reshape(-1, grid, grid)
    for sample_id, mask in zip(ids.tolist(), masks, strict=True):
        assert {(int(row), int(column)) for row, column in np.argwhere(mask)} == mask_by_loops(sample_id, 5, grid, LOSS)


@pytest.mark.parametrize("grid", [1, 2, 4, 7, 16])
def test_exactly_one_crop_of_each_tile_is_masked(grid: int) -> None:
    masks = block_masks(np.arange(500), 0, grid, LOSS)
    assert masks.shape == (1000, grid * grid)
    first, second = np.split(masks.any(axis=1), 2)
    assert bool((first ^ second).all())
    assert 0.43 < first.mean() < 0.57


def test_share_of_masked_patches_is_uniform_in_its_range() -> None:
    share = both(block_masks(np.arange(4000), 1, 16, LOSS)).mean(axis=1)
    assert share.max() <= 0.5
    assert share.min() >= 0.09
    histogram = np.histogram(share, bins=4, range=(0.1, 0.5))[0] / len(share)
    assert np.abs(histogram - 0.25).max() < 0.04
    fixed = both(block_masks(np.arange(200), 1, 16, LossSection(mask_ratio=(0.25, 0.25)))).sum(axis=1)
    assert fixed.max() <= 64
    assert fixed.mean() > 63.0


def test_masks_are_blocks_not_dust() -> None:
    masks = both(block_masks(np.arange(300), 2, 16, LossSection(mask_ratio=(0.3, 0.3)))).reshape(-1, 16, 16)
    beside = masks[:, :, 1:] & masks[:, :, :-1]
    # Scattered patches of the same share would have a masked neighbour to the right in 30 % of the cases.
    assert beside.sum() / masks[:, :, :-1].sum() > 0.6


def test_a_mask_depends_on_seed_and_sample_alone() -> None:
    ids = np.array([4, 900, 17, 2**40], dtype=np.int64)
    together = block_masks(ids, 3, 8, LOSS).reshape(2, 4, -1)
    for place in range(4):
        alone = block_masks(ids[place : place + 1], 3, 8, LOSS).reshape(2, 1, -1)
        assert np.array_equal(together[:, place], alone[:, 0])
    assert not np.array_equal(together, block_masks(ids, 4, 8, LOSS).reshape(2, 4, -1))


def test_every_mask_is_full_to_a_patch_or_two() -> None:
    ids = np.arange(2000)
    masks = both(block_masks(ids, 6, 16, LOSS)).sum(axis=1)
    draws = uniforms(key(6, "mask"), ids, 3 + 4 * 32)[:, 0]
    missing = (256 * (0.1 + 0.4 * draws)).astype(np.int64) - masks
    assert missing.min() >= 0
    assert missing.max() <= 2
    assert missing.mean() < 0.05
