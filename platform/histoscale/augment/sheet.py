"""A sheet of what the teacher and the student see of some tiles: a recipe's crops, colours and masks."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from histoscale.augment.colour import IMAGENET_MEAN, IMAGENET_STD
from histoscale.augment.crops import augment
from histoscale.augment.masks import block_masks
from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe

Pixels = NDArray[np.uint8]

_HIDDEN = 128  # grey value of a masked patch
_GAP_PX = 6
_HEADER_PX = 18


def draw_sheet(tiles: Pixels, sample_ids: NDArray[np.int64], recipe: Recipe) -> Image.Image:
    """One row for each tile, one column for each view of it, labelled.

    Args:
        tiles: [b, R, R, 3].
        sample_ids: [b].
        recipe: Its seed, crops, augmentation and masks.
    """
    crops = recipe.crops
    views = augment(torch.from_numpy(tiles), sample_ids, recipe)
    seen = _pixels(views.global_crops)
    patch_px = ARCHS[recipe.model.arch].patch_px
    grid = crops.global_px // patch_px
    masks = block_masks(sample_ids, recipe.seed, grid, recipe.loss).reshape(-1, grid, grid)
    hidden = masks.repeat(patch_px, axis=1).repeat(patch_px, axis=2)
    small = [Image.fromarray(tile).resize((crops.global_px, crops.global_px), Image.Resampling.BOX) for tile in tiles]
    columns = {"region": np.stack([np.asarray(image) for image in small])}
    masked = np.where(hidden[..., None], np.uint8(_HIDDEN), seen)
    for who, pixels in (("teacher", seen), ("student", masked)):
        columns |= {f"{who} global {number + 1}": part for number, part in enumerate(np.split(pixels, 2))}
    if views.local_crops is not None:
        parts = np.split(_pixels(views.local_crops), crops.local_count)
        columns |= {f"local {number + 1}": part for number, part in enumerate(parts)}
    return _lay_out(columns)


def _pixels(crops: torch.Tensor) -> Pixels:
    """Normalised crops [b, 3, S, S] as uint8 [b, S, S, 3]."""
    values = crops.permute(0, 2, 3, 1).numpy() * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN)
    pixels: Pixels = np.rint(255.0 * values.clip(0.0, 1.0)).astype(np.uint8)
    return pixels


def _lay_out(columns: dict[str, Pixels]) -> Image.Image:
    """Columns of square pictures side by side under their names; rows are as high as the highest."""
    rows = len(next(iter(columns.values())))
    draft = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [max(pixels.shape[2], int(draft.textlength(name))) for name, pixels in columns.items()]
    row_px = max(pixels.shape[1] for pixels in columns.values()) + _GAP_PX
    size = (_GAP_PX + sum(widths) + _GAP_PX * len(widths), _HEADER_PX + _GAP_PX + rows * row_px)
    sheet = Image.new("RGB", size, "white")
    pen, left = ImageDraw.Draw(sheet), _GAP_PX
    for (name, pixels), width in zip(columns.items(), widths, strict=True):
        pen.text((left, _GAP_PX), name, fill="black")
        for row, picture in enumerate(pixels):
            sheet.paste(Image.fromarray(picture), (left, _HEADER_PX + _GAP_PX + row * row_px))
        left += width + _GAP_PX
    return sheet
