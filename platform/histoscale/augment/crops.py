"""From regions to the crops of one micro-batch, on the regions' device.

Shape suffixes: b tiles, n local crops of a tile, R side of a region, G and L sides of global and local crops.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histoscale.augment.colour import COLOUR_DRAWS, Colour, apply_colour, draw_colour, normalise
from histoscale.augment.geometry import GEOMETRY_DRAWS, cut, draw_places, planes_of, window_sizes
from histoscale.augment.stain import STAIN_DRAWS, draw_stains
from histoscale.config.recipe import Recipe
from histoscale.seeding import key, uniforms

Task = Callable[[], None]

_GLOBAL_CROPS = 2  # numbered 0 and 1; local ones follow
_SOLARIZED_CROP = 1  # DINOv2

# Crops that are made together, in values: on a CPU their intermediates stay in its cache, on a GPU they keep it busy.
_VALUES_ON_CPU = 300_000
_VALUES_ON_GPU = 50_000_000


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
    local = range(_GLOBAL_CROPS, _GLOBAL_CROPS + recipe.crops.local_count)
    with _cpu_threads(tiles.device) as run_all:
        planes = planes_of(tiles, recipe.crops.poses)
        global_crops, tasks = _views(planes, sample_ids, recipe, range(_GLOBAL_CROPS))
        local_crops = None
        if local:
            local_crops, more_tasks = _views(planes, sample_ids, recipe, local)
            tasks += more_tasks
        run_all(tasks)
    return Views(global_crops, local_crops)


@contextlib.contextmanager
def _cpu_threads(device: torch.device) -> Iterator[Callable[[list[Task]], None]]:
    """Runs tasks on as many threads as torch would give to each operation; on a GPU one after the other.

    The operations are short, so that threads which share each of them wait for one another thousands of times; where
    other processes want the same cores, each wait is a time slice. So each thread has tasks of its own instead, whose
    operations it runs alone: new threads take over the one that torch is set to meanwhile.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield _one_by_one
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield partial(_shared_out, pool)
    finally:
        torch.set_num_threads(threads)


def _one_by_one(tasks: list[Task]) -> None:
    for task in tasks:
        task()


def _shared_out(pool: ThreadPoolExecutor, tasks: list[Task]) -> None:
    for running in [pool.submit(task) for task in tasks]:
        running.result()


def _views(planes: Tensor, sample_ids: NDArray[np.int64], recipe: Recipe, numbers: range) -> tuple[Tensor, list[Task]]:
    """The crops of the given numbers, of one size, crop-major: float32 [crops, 3, S, S], and what will fill them."""
    crops, region_px, is_local = recipe.crops, planes.shape[-1], _GLOBAL_CROPS in numbers
    side_px = crops.local_px if is_local else crops.global_px
    sizes = window_sizes(crops, region_px, local=is_local)
    places = draw_places(
        _draws(recipe.seed, "place", numbers, sample_ids, GEOMETRY_DRAWS), sizes, region_px, crops.poses
    )
    colours = _colours(recipe, numbers, sample_ids)
    tile = np.tile(np.arange(len(sample_ids)), len(numbers))
    views = torch.empty(len(tile), 3, side_px, side_px, device=planes.device)

    @torch.no_grad()
    def fill(part: slice) -> None:
        images = cut(planes, tile[part], places.part(part), side_px, sizes.longest_px(region_px))
        views[part] = normalise(apply_colour(images, colours.part(part)))

    values = _VALUES_ON_CPU if planes.device.type == "cpu" else _VALUES_ON_GPU
    together = max(1, values // (3 * side_px * side_px))
    return views, [partial(fill, slice(first, first + together)) for first in range(0, len(tile), together)]


def _colours(recipe: Recipe, numbers: range, sample_ids: NDArray[np.int64]) -> Colour:
    strengths, tiles = recipe.augment, len(sample_ids)
    blur_p = [strengths.blur_p[min(number, _GLOBAL_CROPS)] for number in numbers]
    solarize_p = [strengths.solarize_p if number == _SOLARIZED_CROP else 0.0 for number in numbers]
    stains = None
    if strengths.hed_p > 0.0:
        draws = _draws(recipe.seed, "stain", numbers, sample_ids, STAIN_DRAWS)
        stains = draw_stains(draws, strengths.hed_p, strengths.hed_strength)
    draws = _draws(recipe.seed, "colour", numbers, sample_ids, COLOUR_DRAWS)
    return draw_colour(draws, strengths, np.repeat(blur_p, tiles), np.repeat(solarize_p, tiles), stains)


def _draws(seed: int, purpose: str, numbers: range, sample_ids: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return np.concatenate([uniforms(key(seed, "augment", purpose, number), sample_ids, count) for number in numbers])
