"""Draw what the teacher and the student see of some tiles, as one picture: a recipe's crops, colours and masks.

    python -m histoscale.augment.show --recipe jobs/recipes/quickstart.yaml --out sheet.png
    python -m histoscale.augment.show --slide SLIDE.svs --mpp 0.25 --tiles 8
    python -m histoscale.augment.show --slide photo.png --set augment.hed_p=1 --set augment.jitter_p=0
    python -m histoscale.augment.show --set 'crops.window={kind: random_resized, local_scale: [0.05, 0.3]}'

A row is a tile. Its columns are the region as it was read, made smaller to fit; the two global crops, which the teacher
sees; the same as the student sees them, where grey patches are hidden and must be told from the rest; and the local
crops, which only the student sees. All are at their true size, and are the very pixels that training would see: run it
with --set to learn what a field does before a run depends on it, and look whether nuclei can still be told apart.

Without --slide the tiles are of a slide that is drawn for the purpose. The same options give the same picture.
Exit status: 0, or 2 with a one-line diagnosis.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from histoscale.augment.sheet import Pixels, draw_sheet
from histoscale.config.decode import decode_recipe, load_recipe
from histoscale.config.recipe import Recipe
from histoscale.errors import HistoscaleError, SlideError, StorageError
from histoscale.seeding import key, uniforms
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.slide import Slide
from histoscale.slides.synthetic import make_slides
from histoscale.slides.tissue import tissue_mask

_DIAGNOSED = 2
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_MASK_UM_PER_PX = 8.0
_PLACES_PER_TILE = 64  # that are looked at for tissue


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, draw the sheet, say where it is."""
    options = _parser().parse_args(arguments)
    try:
        overrides = options.set + ([] if options.seed is None else [f"seed={options.seed}"])
        recipe = load_recipe(options.recipe, overrides) if options.recipe else decode_recipe({}, overrides)
        tiles = _tiles(options, recipe)
        image = draw_sheet(tiles, np.arange(len(tiles)), recipe)
        try:
            image.save(options.out, format="PNG")
        except OSError as error:
            raise StorageError(
                "the picture cannot be written", value=options.out, expected="a file in a folder that exists"
            ) from error
    except HistoscaleError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(_DIAGNOSED)
    sys.stdout.write(f"{options.out}: {len(tiles)} tiles, {image.width} x {image.height} px\n")


def regions_of(slide: Slide, recipe: Recipe, count: int, mpp: float) -> Pixels:
    """Regions of tissue, at places drawn with the recipe's seed: [count, R, R, 3].

    Those that hold the recipe's share of tissue come first; where there are too few, those with the most follow.

    Raises:
        SlideError: The slide is damaged or smaller than a region, or holds no tissue.
    """
    info, region_px = slide.info, recipe.data.region_px
    room = np.array([info.width_px0, info.height_px0]) - region_px * mpp / info.mpp
    _check_room(room, "the slide is smaller than a region", "a smaller --mpp or --set data.region_px")
    tissue = tissue_mask(slide.thumbnail(_MASK_UM_PER_PX), _MASK_UM_PER_PX)
    draws = uniforms(key(recipe.seed, "show"), np.arange(count * _PLACES_PER_TILE), 2)
    corners_px0 = draws * room
    side = max(1, round(region_px * mpp / _MASK_UM_PER_PX))
    cells = (corners_px0 * info.mpp / _MASK_UM_PER_PX).astype(np.int64)
    shares = np.array([tissue[y : y + side, x : x + side].mean() for x, y in cells])
    best = np.argsort(-np.minimum(shares, recipe.data.min_tissue), kind="stable")[:count]
    if shares.max() <= 0.0:
        raise SlideError("no tissue was found on the slide", remedy="show another slide")
    return np.stack([slide.read(x, y, region_px, mpp) for x, y in corners_px0[best].tolist()])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m histoscale.augment.show",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", metavar="FILE", help="a YAML file; jobs/recipes has some (default: the defaults)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override the recipe; repeat")
    parser.add_argument("--tiles", type=_count, default=4, metavar="N", help="rows of the picture (default: 4)")
    parser.add_argument(
        "--slide", metavar="FILE", help="a slide on this machine, or a picture (PNG, JPEG), cut up as it is"
    )
    parser.add_argument("--mpp", type=_um_per_px, default=0.5, help="um/px at which a slide is read (default: 0.5)")
    parser.add_argument("--slide-mpp", type=_um_per_px, metavar="MPP", help="um/px of a slide whose file does not say")
    parser.add_argument("--seed", type=int, help="other places, crops, colours and masks (default: the recipe's)")
    parser.add_argument("--out", default="augment.png", metavar="PNG", help="where it goes (default: augment.png)")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _um_per_px(text: str) -> float:
    # NaN is not above zero, either.
    with contextlib.suppress(ValueError):
        if (scale := float(text)) > 0.0:
            return scale
    raise argparse.ArgumentTypeError(f"expected um/px above zero, got {text!r}")


def _tiles(options: argparse.Namespace, recipe: Recipe) -> Pixels:
    if options.slide is not None and Path(options.slide).suffix.lower() in _PICTURE_SUFFIXES:
        return _regions_of_picture(Path(options.slide), recipe, options.tiles)
    with contextlib.ExitStack() as stack:
        if options.slide is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="histoscale-show-")))
            file = make_slides(folder, seed=recipe.seed, count=1)[0].path
        else:
            file = Path(options.slide)
        slide = stack.enter_context(contextlib.closing(open_slide(file, mpp=options.slide_mpp)))
        return regions_of(slide, recipe, options.tiles, options.mpp)


def _regions_of_picture(path: Path, recipe: Recipe, count: int) -> Pixels:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        # Pillow's own text holds the path, so it does not follow.
        raise SlideError("the picture cannot be read", expected="a PNG or JPEG file of this machine") from None
    region_px = recipe.data.region_px
    room = np.array([pixels.shape[1], pixels.shape[0]]) - region_px
    _check_room(room, "the picture is smaller than a region", "a smaller --set data.region_px")
    places = uniforms(key(recipe.seed, "show"), np.arange(count), 2) * (room + 1)
    return np.stack([pixels[y : y + region_px, x : x + region_px] for x, y in places.astype(np.int64)])


def _check_room(room: NDArray[np.float64] | NDArray[np.int64], what: str, way_out: str) -> None:
    if not room.min() >= 0:
        raise SlideError(what, expected=f"{-room.min():.0f} px more", remedy=f"show it with {way_out}")


if __name__ == "__main__":
    main()
