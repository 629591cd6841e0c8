"""What a model must beat: plain colour statistics of a tile.

Stain and tissue type go together in many datasets, so that colour alone separates classes; an embedding is worth
something where it does better.
"""

from collections.abc import Sequence

import numpy as np

from histoscale.evaluate.datasets import Tile
from histoscale.evaluate.features import FloatArray


def colour_statistics(tiles: Sequence[Tile]) -> FloatArray:
    """Mean and standard deviation of each channel in [0, 1]: float32 [B, 6]."""
    return np.stack([_of_tile(tile) for tile in tiles])


def _of_tile(tile: Tile) -> FloatArray:
    pixels_P3 = tile.reshape(-1, 3) / 255.0
    return np.concatenate([pixels_P3.mean(axis=0), pixels_P3.std(axis=0)]).astype(np.float32)
