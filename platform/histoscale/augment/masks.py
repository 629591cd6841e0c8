"""Block masks of iBOT (DINOv2's rule), for all tiles at once and keyed by the sample id.

Shape suffixes: b tiles, g patches along a side, N = g * g.
"""

import numpy as np
from numpy.typing import NDArray

from histoscale.config.recipe import LossSection
from histoscale.seeding import key, uniforms

_MIN_BLOCK_PATCHES = 4  # DINOv2
_BLOCK_ASPECT = (0.3, 1.0 / 0.3)  # DINOv2
_ROUNDS = 32  # at most; a block takes about half of what is left, so the mask is full long before


def block_masks(sample_ids: NDArray[np.int64], seed: int, grid: int, loss: LossSection) -> NDArray[np.bool_]:
    """Patches to hide in each global crop; of each tile's two crops, exactly one is masked.

    So half of a micro-batch's global crops are masked, as in DINOv2, and which ones depends on the sample ids alone.
    A crop's share of masked patches is uniform in `loss.mask_ratio`, rounded down, with at least one patch. It is
    covered by overlapping blocks of at least 4 patches (or of all that is left, if less).

    Args:
        sample_ids: [b].
        seed: The recipe's.
        grid: g, patches along a side of a global crop.
        loss: The recipe's.

    Returns:
        bool [2b, g * g], crop-major.
    """
    tiles = len(sample_ids)
    draws = uniforms(key(seed, "mask"), sample_ids, 3 + 4 * _ROUNDS)
    low, high = loss.mask_ratio
    wanted_b = np.maximum(1, (grid * grid * (low + draws[:, 0] * (high - low))).astype(np.int64))
    masked_bgg = np.zeros((tiles, grid, grid), dtype=np.bool_)
    for block in np.split(draws[:, 3:], _ROUNDS, axis=1):
        left_b = wanted_b - masked_bgg.sum(axis=(1, 2))
        if not left_b.any():
            break
        block_bgg = _blocks(block, left_b, grid)
        new_b = (block_bgg & ~masked_bgg).sum(axis=(1, 2))
        masked_bgg |= block_bgg & (new_b <= left_b)[:, None, None]
    masked_bN = masked_bgg.reshape(tiles, -1)
    bare_b = ~masked_bN.any(axis=1)
    masked_bN[bare_b, (draws[bare_b, 1] * grid * grid).astype(np.int64)] = True
    first_b = draws[:, 2] < 0.5
    return np.concatenate([masked_bN & first_b[:, None], masked_bN & ~first_b[:, None]])


def _blocks(draws: NDArray[np.float64], left_b: NDArray[np.int64], grid: int) -> NDArray[np.bool_]:
    """One block for each tile, of at most about `left_b` patches: bool [b, g, g]; none where it does not fit."""
    smallest_b = np.minimum(_MIN_BLOCK_PATCHES, left_b)
    area_b = smallest_b + draws[:, 0] * (left_b - smallest_b)
    low, high = np.log(_BLOCK_ASPECT)
    stretch_b = np.exp(0.5 * (low + draws[:, 1] * (high - low)))
    height_b, width_b = np.rint(np.sqrt(area_b) * stretch_b), np.rint(np.sqrt(area_b) / stretch_b)
    top_b = np.floor(draws[:, 2] * (grid - height_b + 1))
    first_b = np.floor(draws[:, 3] * (grid - width_b + 1))
    line = np.arange(grid)
    rows_bg = (line >= top_b[:, None]) & (line < (top_b + height_b)[:, None]) & (height_b <= grid)[:, None]
    columns_bg = (line >= first_b[:, None]) & (line < (first_b + width_b)[:, None]) & (width_b <= grid)[:, None]
    block_bgg: NDArray[np.bool_] = rows_bg[:, :, None] & columns_bg[:, None, :]
    return block_bgg
