"""From regions to the crops of one micro-batch, on the regions' device.

Shape suffixes: b tiles, n local crops of a tile, R side of a region, G and L sides of global and local crops.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histoscale.augment.colour import COLOUR_DRAWS, apply_colour, draw_colour, normalise
from histoscale.augment.geometry import GEOMETRY_DRAWS, crop_maps, cut
from histoscale.config.recipe import Recipe
from histoscale.seeding import key, uniforms


@dataclass(frozen=True)
class Views:
    """Normalised crops, crop-major: all tiles' first crop, then all tiles' second, and so on.

    Attributes:
        global_crops: float32 [2b, 3, G, G].
        local_crops: float32 [n*b, 3, L, L], or None without local crops.
    """

    global_crops: Tensor
    local_crops: Tensor | None


@torch.no_grad()
def augment(tiles: Tensor, sample_ids: NDArray[np.int64], recipe: Recipe) -> Views:
    """Cut and colour all crops of a micro-batch; a tile's crops depend on the seed and its sample id alone.

    Args:
        tiles: uint8 [b, R, R, 3].
        sample_ids: [b].
        recipe: Its seed, crops and augmentation.

    Returns:
        The crops, on the tiles' device.
    """
    regions = tiles.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
    strengths, crops = recipe.augment, recipe.crops
    first, second, local = strengths.blur_p

    def view(crop: int, side_px: int, blur_p: float, solarize_p: float) -> Tensor:
        places = uniforms(key(recipe.seed, "augment", "place", crop), sample_ids, GEOMETRY_DRAWS)
        shades = uniforms(key(recipe.seed, "augment", "colour", crop), sample_ids, COLOUR_DRAWS)
        images = cut(regions, crop_maps(places, side_px, regions.shape[-1], crops), side_px, crops)
        return normalise(apply_colour(images, draw_colour(shades, strengths, blur_p, solarize_p, images.device)))

    global_views = [
        view(0, crops.global_px, first, 0.0),
        view(1, crops.global_px, second, strengths.solarize_p),  # DINOv2 solarises the second global crop only
    ]
    local_views = [view(2 + crop, crops.local_px, local, 0.0) for crop in range(crops.local_count)]
    return Views(torch.cat(global_views), torch.cat(local_views) if local_views else None)
