"""What is tissue in the shared images, written down by eye: boxes in thumbnails, each of one category.

A box says what all of it is; nothing is said of what lies between the boxes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from histoscale.slides.tissue import MASK_UM_PER_PX

Scalar = TypeVar("Scalar", bound=np.generic)
Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom as shares of the picture."""

TISSUE = frozenset({"H&E", "H&E, held out", "fat", "pale tissue", "IHC", "IHC (derived)", "melanin (derived)"})
"""The categories that are to be accepted; every other one is to be refused."""

_WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_INSIDE: Box = (0.05, 0.05, 0.95, 0.95)
_FIXTURES = "tissue_fixtures/"
_RGB = _FIXTURES + "pil-images-rgb/"
_TILE = _FIXTURES + "tiles/"
_B4, _C2 = "sections/B4_BT10737_D2_HE.jpg", "sections/C2_5714_HE_BT_C2.jpg"
_CMU, _TCGA = "slides/CMU-1-Small-Region.svs", "slides/TCGA-CR-7395-01A-01-TS1.svs"

# File, um/px (an estimate for fixtures and for the slide without a scale), and boxes by category.
THUMBNAILS: tuple[tuple[str, float, dict[str, list[Box]]], ...] = (
    (
        _RGB + "tcga-green-pen.png",
        4.0,
        {
            "pen": [(0.44, 0.05, 0.54, 0.25), (0.28, 0.7, 0.34, 0.95)],
            "H&E": [(0.65, 0.1, 0.98, 0.9), (0.02, 0.1, 0.3, 0.35)],
            "fat": [(0.02, 0.45, 0.15, 0.6)],
        },
    ),
    (
        _RGB + "tcga-red-pen.png",
        4.0,
        {
            "pen": [(0.08, 0.35, 0.3, 0.9)],
            "translucent red pen": [(0.28, 0.05, 0.4, 0.15), (0.06, 0.11, 0.17, 0.18)],
            "H&E": [(0.6, 0.35, 0.98, 0.9)],
            "fat": [(0.5, 0.05, 0.83, 0.2)],
        },
    ),
    (
        _RGB + "diagnostic-slide-thumb-rgb.png",
        40.0,
        {
            "pen": [(0.07, 0.75, 0.11, 0.93), (0.478, 0.46, 0.502, 0.478), (0.625, 0.533, 0.637, 0.56)],
            "translucent red pen": [(0.972, 0.56, 0.988, 0.62), (0.075, 0.125, 0.09, 0.175)],
            "H&E": [(0.26, 0.69, 0.33, 0.8), (0.75, 0.67, 0.9, 0.73), (0.26, 0.28, 0.37, 0.4)],
            "glass": [(0.3, 0.02, 0.43, 0.05), (0.01, 0.02, 0.05, 0.25)],
            "edge of the slide": [(0.1, 0.988, 0.9, 1.0)],
        },
    ),
    (
        _RGB + "wsi-blue-pen.png",
        60.0,
        {
            "pen": [(0.84, 0.45, 0.97, 0.53), (0.87, 0.82, 0.93, 0.98)],
            "H&E": [(0.42, 0.3, 0.58, 0.6)],
            "glass": [(0.75, 0.05, 0.95, 0.3), (0.5, 0.88, 0.8, 0.98)],
        },
    ),
    (
        _FIXTURES + "kidney-48-5.tif",
        20.0,
        {"IHC": [(0.201, 0.572, 0.261, 0.616)], "glass": [(0.3, 0.05, 0.7, 0.95), (0.02, 0.7, 0.98, 0.98)]},
    ),
    (
        _B4,
        0.69,
        {
            "H&E": [(0.15, 0.62, 0.32, 0.8), (0.31, 0.5, 0.48, 0.65)],
            "pale tissue": [(0.57, 0.65, 0.72, 0.8)],
            "tinted glass": [(0.25, 0.03, 0.95, 0.25), (0.9, 0.5, 0.99, 0.95), (0.1, 0.93, 0.9, 0.99)],
            "film of stain": [(0.07, 0.22, 0.13, 0.35), (0.25, 0.26, 0.35, 0.33)],
        },
    ),
    (
        _C2,
        0.69,
        {
            "H&E": [(0.5, 0.5, 0.75, 0.7), (0.28, 0.6, 0.43, 0.66)],
            "glass": [(0.1, 0.05, 0.9, 0.3), (0.1, 0.85, 0.9, 0.98)],
            "film of stain": [(0.87, 0.3, 0.95, 0.6)],
        },
    ),
    (
        _CMU,
        0.499,
        {
            "H&E": [(0.38, 0.55, 0.5, 0.95)],
            "glass": [(0.05, 0.45, 0.22, 0.8), (0.8, 0.05, 0.92, 0.18), (0.87, 0.9, 0.98, 0.98)],
        },
    ),
    (_TCGA, 0.25, {"H&E": [(0.15, 0.35, 0.55, 0.75)], "glass": [(0.0, 0.0, 0.08, 0.12), (0.44, 0.0, 0.6, 0.08)]}),
    (_TILE + "no-tissue.png", 1.0, {"glass": [_WHOLE]}),
    (_TILE + "no-tissue2.png", 1.0, {"glass": [_WHOLE]}),
    (_TILE + "almost-white-1.png", 1.0, {"glass": [_WHOLE]}),
    (_TILE + "almost-white-ihc.png", 20.0, {"glass": [_WHOLE]}),
    (_TILE + "no-tissue-line.png", 1.0, {"edge of a coverslip": [_WHOLE]}),
    (_TILE + "no-tissue-green-pen.png", 1.0, {"pen": [_WHOLE]}),
    (_TILE + "no-tissue-red-pen.png", 1.0, {"pen": [_WHOLE]}),
    (
        _TILE + "high-nuclei-score-red-pen-level1.png",
        1.0,
        {"pen": [(0.5, 0.25, 0.6, 0.45)], "H&E": [(0.02, 0.6, 0.8, 0.98)]},
    ),
    (
        _TILE + "medium-nuclei-score-green-pen-level1.png",
        1.0,
        {"pen": [(0.5, 0.02, 0.98, 0.4)], "H&E": [(0.7, 0.8, 0.98, 0.98)]},
    ),
    (
        _TILE + "very-low-nuclei-score-red-pen-level1.png",
        1.0,
        {
            "pen": [(0.5, 0.7, 0.8, 0.98)],
            "translucent red pen": [(0.33, 0.42, 0.42, 0.55)],
            "fat": [(0.02, 0.02, 0.4, 0.25)],
        },
    ),
    (_TILE + "high-nuclei-score-level0.png", 0.5, {"H&E": [_INSIDE]}),
    (_TILE + "medium-nuclei-score-level0.png", 0.5, {"H&E": [_INSIDE]}),
    (_TILE + "very-low-nuclei-score-level0.png", 0.5, {"pale tissue": [_INSIDE]}),
    (_TILE + "medium-nuclei-score-level1-2.png", 1.0, {"H&E": [_INSIDE]}),
    (
        _TILE + "medium-nuclei-score-level1.png",
        1.0,
        {"H&E": [(0.3, 0.6, 0.9, 0.75)], "pale tissue": [(0.2, 0.02, 0.9, 0.18)]},
    ),
    (
        _TILE + "medium-nuclei-score-level2.png",
        4.0,
        {"H&E": [(0.05, 0.05, 0.6, 0.6)], "glass": [(0.8, 0.85, 1.0, 1.0)]},
    ),
    (
        _TILE + "high-nuclei-score-level2.png",
        4.0,
        {"H&E": [(0.1, 0.02, 0.5, 0.12)], "glass": [(0.3, 0.45, 0.95, 0.95)]},
    ),
    (_TILE + "low-nuclei-score-level0.png", 0.5, {"fat": [_INSIDE]}),
    (_TILE + "low-nuclei-score-level1.png", 1.0, {"fat": [_INSIDE]}),
    (_TILE + "liver-level2-10907-7808-11707-8608.png", 8.0, {"H&E": [_WHOLE]}),
    (_TILE + "liver-level2-20914-13715-21714-14515.png", 8.0, {"glass": [(0.0, 0.35, 1.0, 1.0)]}),
    (_TILE + "liver-level2-38626-13514-39426-14315.png", 8.0, {"glass": [_WHOLE]}),
    (_TILE + "liver-level2-57138-8209-57938-9009.png", 8.0, {"H&E": [(0.0, 0.0, 1.0, 0.5)]}),
    (_TILE + "kidney-ihc-level0-310-500-360-530.png", 20.0, {"IHC": [_INSIDE]}),
    (
        _TILE + "kidney-ihc-level0-330-480-380-510.png",
        20.0,
        {"IHC": [(0.05, 0.72, 0.95, 0.98)], "glass": [(0.0, 0.02, 1.0, 0.5)]},
    ),
    (_TILE + "kidney-ihc-level0-340-520-390-550.png", 20.0, {"IHC": [_INSIDE]}),
)


@dataclass(frozen=True)
class Scene:
    """A picture and what is known of it.

    Attributes:
        pixels: uint8 [H, W, 3].
        um_per_px: Its scale.
        boxes: Categories and their boxes.
    """

    pixels: Pixels
    um_per_px: float
    boxes: dict[str, list[Box]]


def cut(pixels: NDArray[Scalar], box: Box) -> NDArray[Scalar]:
    """The part of an array [H, W, ...] in a box, at least one pixel: a view."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = box
    rows = slice(int(top * height), max(int(bottom * height), int(top * height) + 1))
    return pixels[rows, int(left * width) : max(int(right * width), int(left * width) + 1)]


def thumbnails(data: Path) -> Iterator[Scene]:
    """The labelled pictures at the scale of a mask, or at their own where that is coarser."""
    for name, um_per_px, boxes in THUMBNAILS:
        pixels, um_per_px = thumbnail(data, name, um_per_px)
        yield Scene(pixels, um_per_px, boxes)


def thumbnail(data: Path, name: str, um_per_px: float) -> tuple[Pixels, float]:
    """A picture at the scale of a mask, or at its own where that is coarser, and that scale."""
    image = picture(data / name)
    if um_per_px >= MASK_UM_PER_PX:
        return np.asarray(image), um_per_px
    shrink = um_per_px / MASK_UM_PER_PX
    size = (round(image.width * shrink), round(image.height * shrink))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC)), MASK_UM_PER_PX


@lru_cache(maxsize=2)  # a section is 276 MB of pixels
def picture(path: Path) -> Image.Image:
    """A slide's level 0, or a picture on white where it is transparent."""
    if path.suffix == ".svs":
        with openslide.OpenSlide(path) as slide:
            rgba = slide.read_region((0, 0), 0, slide.dimensions)
    else:
        with Image.open(path) as image:
            rgba = image.convert("RGB") if image.mode == "RGB" else image.convert("RGBA")
    if rgba.mode == "RGB":
        return rgba
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white
