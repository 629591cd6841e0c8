"""How well tissue is told from glass, pen and blur, in masks and in tiles, on images labelled by eye.

Each category of image weighs the same, however many boxes or tiles it has: recall is the mean share of the categories
of tissue that is accepted, and precision is what it would be on as much to accept as to refuse: recall over the sum of
recall and the mean share of the other categories that is accepted. The baselines see the same images.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoscale.bench.figure import Figure
from histoscale.bench.tissue_scenes import Tile, scenes, tiles
from histoscale.bench.tissue_truth import TISSUE, Pixels, Scene, cut
from histoscale.errors import DatasetError
from histoscale.slides.tile_check import TileCheck, tile_fault
from histoscale.slides.tissue import tissue_mask

CHECK = TileCheck(min_tissue=0.65, min_sharpness=0.45)
DATA = Path("..", "shared", "data")
_BASELINE = "HSV range"  # the one that the figures name; the others stand in the details
_MIN_SHARE = 0.6  # of a tile's pixels, for the baselines
_TIMED_TILES = 200

Accepted = Mapping[str, list[float]]
"""By category, the share of each box or tile that was accepted."""


def tissue(data: Path = DATA) -> Iterator[Figure]:
    """`tissue.mask_*` and `tissue.tile_*`: precision and recall, and the time of a tile's test.

    Raises:
        DatasetError: The labelled images are not there.
    """
    if not data.is_dir():
        raise DatasetError(
            "no labelled images to measure tissue on",
            value=str(data),
            expected="a folder with sections, slides, tiles and tissue_fixtures",
            remedy="run it from the root of the repository, with the shared data beside that",
        )
    yield from _figures("mask", _accepted_boxes(scenes(data)))
    yield from _figures("tile", _accepted_tiles(tiles(data)))
    yield _time(list(islice(tiles(data), _TIMED_TILES)))


def precision_and_recall(accepted: Accepted) -> tuple[float, float]:
    """Both of what was accepted, every category weighing the same, and half of all being tissue."""
    right = statistics.mean(statistics.mean(shares) for category, shares in accepted.items() if category in TISSUE)
    wrong = statistics.mean(statistics.mean(shares) for category, shares in accepted.items() if category not in TISSUE)
    return right / max(right + wrong, 1e-9), right


def hsv_range(rgb: Pixels) -> NDArray[np.bool_]:
    """Hue 90 to 180, saturation 8 to 255 and value 103 to 255, of 180, 255 and 255: [H, W]."""
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(rgb).convert("HSV")), 2, 0)
    # PIL's hue has 256 steps; 127.5 of them are the 90 of 180.
    inside: NDArray[np.bool_] = (hue >= 128) & (saturation >= 8) & (value >= 103)
    return inside


def saturated(rgb: Pixels) -> NDArray[np.bool_]:
    """Saturation above 8 of 255: [H, W]."""
    return _saturation(rgb) > 8


def above_otsu(rgb: Pixels) -> NDArray[np.bool_]:
    """Saturation above the threshold that divides its histogram into the two most different parts: [H, W]."""
    saturation = _saturation(rgb)
    counts = np.bincount(saturation.ravel(), minlength=256).astype(np.float64)
    below, levels = np.cumsum(counts), np.arange(256)
    above = counts.sum() - below
    low = np.cumsum(counts * levels) / np.maximum(below, 1.0)
    high = ((counts * levels).sum() - np.cumsum(counts * levels)) / np.maximum(above, 1.0)
    return saturation > int(np.argmax(below * above * (high - low) ** 2))


BASELINES: dict[str, Callable[[Pixels], NDArray[np.bool_]]] = {
    _BASELINE: hsv_range,
    "saturation above 8": saturated,
    "Otsu of saturation": above_otsu,
}


def _saturation(rgb: Pixels) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(rgb).convert("HSV"))[..., 1]


def _accepted_boxes(pictures: Iterator[Scene]) -> dict[str, Accepted]:
    accepted: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for scene in pictures:
        masks = {"ours": tissue_mask(scene.pixels, scene.um_per_px)}
        masks |= {name: baseline(scene.pixels) for name, baseline in BASELINES.items()}
        for name, mask in masks.items():
            for category, boxes in scene.boxes.items():
                accepted[name][category] += [float(cut(mask, box).mean()) for box in boxes]
    return dict(accepted)


def _accepted_tiles(labelled: Iterator[Tile]) -> dict[str, Accepted]:
    accepted: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for tile in labelled:
        accepted["ours"][tile.category].append(float(tile_fault(tile.pixels, tile.mpp, CHECK) is None))
        for name, baseline in BASELINES.items():
            accepted[name][tile.category].append(float(baseline(tile.pixels).mean() >= _MIN_SHARE))
    return dict(accepted)


def _figures(what: str, accepted: Mapping[str, Accepted]) -> Iterator[Figure]:
    measured = {name: precision_and_recall(shares) for name, shares in accepted.items()}
    for number, kind in enumerate(("precision", "recall")):
        right = kind == "recall"  # recall is made of what is to be accepted, precision is lost by the rest
        table = {
            category: {"count": len(shares)}
            | {name: round(statistics.mean(accepted[name][category]), 3) for name in accepted}
            for category, shares in sorted(accepted["ours"].items())
            if (category in TISSUE) == right
        }
        others = {name: round(measured[name][number], 4) for name in BASELINES}
        yield Figure(
            f"tissue.{what}_{kind}",
            round(measured["ours"][number], 4),
            "ratio",
            others[_BASELINE],
            {"baselines": others, "accepted": table},
        )


def _time(labelled: list[Tile]) -> Figure:
    def milliseconds(check: Callable[[Tile], object]) -> float:
        check(labelled[0])  # what is made once is not counted
        start_s = time.process_time()
        for tile in labelled:
            check(tile)
        return (time.process_time() - start_s) / len(labelled) * 1e3

    ours = milliseconds(lambda tile: tile_fault(tile.pixels, tile.mpp, CHECK))
    baseline = milliseconds(lambda tile: hsv_range(tile.pixels).mean())
    return Figure("tissue.tile_check_ms", round(ours, 4), "ms of CPU", round(baseline, 4), {"tiles": len(labelled)})
