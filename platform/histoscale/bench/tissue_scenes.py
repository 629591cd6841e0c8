"""The labelled pictures and tiles that tissue detection is measured on: real ones, and faults derived from them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from histoscale.bench.tissue_derived import INKS, bubble, defocused, immunostained, inked, pigmented
from histoscale.bench.tissue_truth import THUMBNAILS, Box, Pixels, Scene, cut, picture, thumbnail, thumbnails
from histoscale.slides.tissue import MASK_UM_PER_PX

_SIDE_PX = 392
_TILES_PER_BOX = 3
_MIN_LARGE_PX = 2000  # pictures from here on are slides and sections: tiles of many magnifications fit into their boxes
_HELD_OUT_EVERY = 10
_CLASSES = {"ADI": "fat", "LYM": "H&E", "MUC": "pale tissue", "MUS": "H&E", "NORM": "H&E", "STR": "H&E", "TUM": "H&E"}
_FIXTURES = {
    "high-nuclei-score-level0": ("H&E", 0.5),
    "medium-nuclei-score-level0": ("H&E", 0.5),
    "very-low-nuclei-score-level0": ("pale tissue", 0.5),
    "low-nuclei-score-level0": ("fat", 0.5),
    "low-nuclei-score-level1": ("fat", 1.0),
    "medium-nuclei-score-level1-2": ("H&E", 1.0),
    "medium-nuclei-score-level1": ("H&E", 1.0),
    "tissue-level0-4302-10273-4814-10785": ("H&E", 0.5),
    "tissue-level0-7352-11762-7864-12274": ("H&E", 0.5),
    "no-tissue": ("glass", 1.0),
    "no-tissue2": ("glass", 1.0),
    "almost-white-1": ("glass", 1.0),
    "almost-white-2": ("glass", 1.0),
    "no-tissue-line": ("edge of a coverslip", 1.0),
    "no-tissue-green-pen": ("pen", 1.0),
    "no-tissue-red-pen": ("pen", 1.0),
    "medium-nuclei-score-green-pen-level1": ("pen", 1.0),
    "very-low-nuclei-score-red-pen-level1": ("pen", 1.0),
}


@dataclass(frozen=True)
class Tile:
    """A labelled tile.

    Attributes:
        category: What all of it is.
        pixels: uint8 [H, W, 3].
        mpp: Its microns per pixel.
    """

    category: str
    pixels: Pixels
    mpp: float


def scenes(data: Path) -> Iterator[Scene]:
    """Pictures for masks: the labelled thumbnails, and those of two slides with derived faults."""
    yield from thumbnails(data)
    for path in sorted(data.glob("tiles/crc_val_he_7k_*/ADI*")):
        yield _mirrored(np.asarray(picture(path)), 0.5)
    for name, um_per_px, boxes in THUMBNAILS:
        if name.startswith(("slides/CMU", "sections/C2")):
            pixels, scale = thumbnail(data, name, um_per_px)
            yield from _faulty(pixels, scale, boxes["H&E"][0], boxes["glass"][0])


def tiles(data: Path) -> Iterator[Tile]:
    """Tiles of every magnification: cut from the labelled boxes, labelled as files, and derived from both."""
    cuts = [tile for name, mpp, boxes in THUMBNAILS for tile in _cut_tiles(data / name, mpp, boxes)]
    for tile in cuts:
        yield tile
        if tile.category == "H&E":
            yield from _spoilt(tile)
    for name, (category, mpp) in _FIXTURES.items():
        pixels = np.asarray(picture(data / "tissue_fixtures" / "tiles" / f"{name}.png"))
        yield Tile(category, pixels[:_SIDE_PX, :_SIDE_PX], mpp)
        yield Tile(category, pixels[-_SIDE_PX:, -_SIDE_PX:], mpp)
    for path in sorted(data.glob("tiles/crc_val_he_7k_*/*")):
        for kind, category in _CLASSES.items():
            if path.name.startswith(kind):
                yield Tile(category, np.asarray(picture(path)), 0.5)
    for path in islice(sorted(data.glob("tiles/oral_oscc_cc0/**/*.jp*g")), 0, None, _HELD_OUT_EVERY):
        yield Tile("H&E, held out", np.asarray(picture(path)), 0.5)


def _mirrored(pixels: Pixels, mpp: float) -> Scene:
    """A tile of fat amid mirror images of itself: alone it is smaller than the least area of a mask."""
    side = len(pixels)
    field = Image.fromarray(np.pad(pixels, ((side, side), (side, side), (0, 0)), "symmetric"))
    side_px = round(field.width * mpp / MASK_UM_PER_PX)
    small = field.resize((side_px, side_px), Image.Resampling.BICUBIC)
    return Scene(np.asarray(small), MASK_UM_PER_PX, {"fat": [(1 / 3, 1 / 3, 2 / 3, 2 / 3)]})


def _faulty(pixels: Pixels, scale: float, tissue: Box, glass: Box) -> Iterator[Scene]:
    for sigma_um in (12, 16, 24, 32):
        yield Scene(defocused(pixels, sigma_um / scale), scale, {f"defocus of {sigma_um} um (derived)": [tissue]})
    for ink in INKS:
        for density in (0.8, 1.6):
            for box, ground in ((tissue, "tissue"), (glass, "glass")):
                changed = _changed(pixels, box, inked(cut(pixels, box), ink, density))
                yield Scene(changed, scale, {f"{ink} ink of {density} on {ground} (derived)": [box]})
    for density in (0.5, 1.0, 2.0):
        changed = _changed(pixels, tissue, pigmented(cut(pixels, tissue), density))
        yield Scene(changed, scale, {"melanin (derived)": [tissue]})
    bare = cut(pixels, glass)
    centre = (bare.shape[0] / 2, bare.shape[1] / 2)
    for rim_um in (30, 60, 120):
        changed = _changed(pixels, glass, bubble(bare, centre, min(centre) * 0.8, rim_um / scale))
        yield Scene(changed, scale, {"air bubble (derived)": [glass]})


def _changed(pixels: Pixels, box: Box, part: Pixels) -> Pixels:
    changed = pixels.copy()
    cut(changed, box)[:] = part
    return changed


def _cut_tiles(path: Path, mpp: float, boxes: dict[str, list[Box]]) -> Iterator[Tile]:
    image = picture(path)
    if min(image.size) < _MIN_LARGE_PX:
        return
    for category, places in boxes.items():
        for left, top, right, bottom in places:
            corners = (left * image.width, top * image.height, right * image.width, bottom * image.height)
            part = image.crop(tuple(round(corner) for corner in corners))  # type: ignore[arg-type]
            for shrink in (1, 2, 4, 8):
                grid = islice(_grid(part.reduce(shrink)), _TILES_PER_BOX)
                yield from (Tile(category, pixels, mpp * shrink) for pixels in grid)


def _grid(image: Image.Image) -> Iterator[Pixels]:
    for top in range(0, image.height - _SIDE_PX + 1, _SIDE_PX):
        for left in range(0, image.width - _SIDE_PX + 1, _SIDE_PX):
            yield np.asarray(image.crop((left, top, left + _SIDE_PX, top + _SIDE_PX)))


def _spoilt(tile: Tile) -> Iterator[Tile]:
    for sigma_px in (1.5, 2.0, 3.0, 5.0):
        yield Tile(f"defocus of {sigma_px} px (derived)", defocused(tile.pixels, sigma_px), tile.mpp)
    for ink in INKS:
        for density in (0.8, 1.6):
            yield Tile(f"{ink} ink of {density} on tissue (derived)", inked(tile.pixels, ink, density), tile.mpp)
    for density in (0.5, 1.0, 2.0):
        yield Tile("melanin (derived)", pigmented(tile.pixels, density), tile.mpp)
    for dab in (0.0, 0.7, 1.5):
        yield Tile("IHC (derived)", immunostained(tile.pixels, dab), tile.mpp)
