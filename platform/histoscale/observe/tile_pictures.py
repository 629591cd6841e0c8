"""Pictures that show tiles: of a step, their crops, what patches and attention look like, and nearest neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from histoscale.augment.colour import normalise
from histoscale.augment.sheet import draw_sheet
from histoscale.config.recipe import Recipe
from histoscale.models import VisionTransformer
from histoscale.models.attention import class_attention
from histoscale.observe.drawing import Cell, Row, enlarged, grid, heat, side_by_side
from histoscale.observe.projection import most_different, nearest, principal_components
from histoscale.sampling.gallery import Mpp, place_of
from histoscale.stream.seen_tiles import SeenTile
from histoscale.units import describe_mpp, magnification

NEIGHBOURS = "neighbours"
_CELL_PX, _SMALL_PX = 132, 112
_HEADS = 3
_NEIGHBOURS = 5
_SHOWN_ID = 8  # digits of a slide id
_LOW, _HIGH = 1.0, 99.0  # percentiles that become black and full colour


@dataclass(frozen=True)
class Picture:
    """A picture and what it says.

    Attributes:
        name: Its file's, without suffix.
        title: For people.
        caption: A sentence or two that a stranger understands.
        image: The picture.
        slides: Ids of the slides whose tissue it shows.
    """

    name: str
    title: str
    caption: str
    image: Image.Image
    slides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Looks:
    """What a network makes of some tiles, seen whole.

    Attributes:
        patches: float32 [B, N, D], patch tokens in row-major order.
        attention: float32 [B, H, N], what the class token takes from each patch in the last block.
        image_px: Side of the square that was looked at.
    """

    patches: NDArray[np.float32]
    attention: NDArray[np.float32]
    image_px: int


def central(pixels: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    """The square of `side_px` in the middle of a tile."""
    first = (pixels.shape[0] - side_px) // 2
    return pixels[first : first + side_px, first : first + side_px]


def darkness(pixels: NDArray[np.uint8]) -> float:
    """Mean of 255 less the grey value: a quantity of a tile that no checkpoint changes."""
    return 255.0 - float(pixels.mean())


@torch.inference_mode()
def look_at(backbone: VisionTransformer, patch_px: int, tiles: Sequence[SeenTile], device: torch.device) -> Looks:
    """Show whole regions to a network, one by one."""
    side_px = tiles[0].pixels.shape[0] // patch_px * patch_px
    patches, attention = [], []
    for tile in tiles:
        image_HW3 = torch.from_numpy(central(tile.pixels, side_px).copy()).to(device)
        tokens, maps = class_attention(backbone, normalise(image_HW3.permute(2, 0, 1)[None].float() / 255.0))
        patches.append(tokens[0, backbone.prefix_tokens :].cpu().numpy())
        attention.append(maps[0].cpu().numpy())
    return Looks(np.stack(patches), np.stack(attention), side_px)


def tiles_picture(step: int, tiles: Sequence[SeenTile], mix: Sequence[Mpp]) -> Picture:
    """Tiles of a step, a row for each magnification."""
    rows = []
    for place, mpp in enumerate(mix):
        cells = [
            Cell(Image.fromarray(tile.pixels), label(tile)) for tile in tiles if place_of(tile.plan.mpp, mix) == place
        ]
        if cells:
            rows.append(Row(describe_mpp(mpp), tuple(cells)))
    return Picture(
        "tiles",
        f"Tiles of step {step:,}",
        "Some of the tiles that the last step before this checkpoint learned from, a row for each magnification. "
        "Beneath each are its magnification and the start of its slide's id. They should be tissue, in focus, and look "
        "unlike each other.",
        grid(rows, _SMALL_PX),
        _slides(tiles),
    )


def crops_picture(step: int, tiles: Sequence[SeenTile], recipe: Recipe) -> Picture:
    """What teacher and student saw of a few tiles."""
    pixels = np.stack([tile.pixels for tile in tiles])
    return Picture(
        "crops",
        f"What the networks saw of {len(tiles)} tiles of step {step:,}",
        "A row is a tile. The teacher sees two large crops of it; the student sees the same with grey patches hidden, "
        "whose content it must tell, and the small crops. The colours are changed on purpose.",
        draw_sheet(pixels, np.array([tile.plan.sample_id for tile in tiles], np.int64), recipe),
        _slides(tiles),
    )


def patches_picture(tiles: Sequence[SeenTile], looks: Looks) -> Picture:
    """The first three principal components of all patch tokens together as red, green and blue, beside each tile."""
    patches_ND = looks.patches.reshape(-1, looks.patches.shape[-1])
    shown = [central(tile.pixels, looks.image_px) for tile in tiles]
    dark_N = np.concatenate([_darkness_of_patches(pixels, looks.patches.shape[1]) for pixels in shown])
    found = principal_components(patches_ND, 3, dark_N)
    low_3, high_3 = np.percentile(found.scores, (_LOW, _HIGH), axis=0)
    colours_N3 = np.clip((found.scores - low_3) / np.maximum(high_3 - low_3, 1e-12), 0.0, 1.0)
    side = round(looks.patches.shape[1] ** 0.5)
    maps = np.rint(255.0 * colours_N3).astype(np.uint8).reshape(len(tiles), side, side, 3)
    pairs = [
        grid([Row("", (Cell(Image.fromarray(pixels), label(tile)), Cell(enlarged(each, _CELL_PX))))], _CELL_PX)
        for tile, pixels, each in zip(tiles, shown, maps, strict=True)
    ]
    return Picture(
        "patches",
        "What the network tells apart within a tile",
        "Right of each tile are its patches: those that the network takes for alike have like colours, in all tiles "
        "here. (The three main directions of all patch tokens are red, green and blue, and hold "
        f"{found.share.sum():.0%} of what differs.) With training, colours should come to follow the tissue: glands, "
        "stroma, nuclei, glass.",
        side_by_side(pairs, 2),
        _slides(tiles),
    )


def attention_picture(tiles: Sequence[SeenTile], looks: Looks) -> Picture:
    """What the class token attends to: the mean of all heads, and the heads that differ most."""
    heads = most_different(looks.attention, _HEADS)
    side = round(looks.attention.shape[-1] ** 0.5)
    rows = []
    for tile, maps_HN in zip(tiles, looks.attention, strict=True):
        maps = [maps_HN.mean(axis=0), *(maps_HN[head] for head in heads)]
        cells = [Cell(Image.fromarray(central(tile.pixels, looks.image_px)), label(tile))]
        rows.append(Row("", (*cells, *(Cell(heat(each.reshape(side, side), _CELL_PX)) for each in maps))))
    return Picture(
        "attention",
        "Where the network looks",
        "For each tile, how much the last block's class token takes from each patch: black is nothing, light yellow "
        f"the most of that map. First the mean of all {looks.attention.shape[1]} heads, then the heads that differ "
        "most from it and from each other. Even maps say little; maps that follow structures say much.",
        grid(rows, _CELL_PX, ("tile", "all heads", *(f"head {head + 1}" for head in heads))),
        _slides(tiles),
    )


def neighbours_picture(
    tiles: Sequence[SeenTile], embeddings_ND: NDArray[np.floating], queries: Sequence[int]
) -> Picture:
    """For each query tile, the nearest tiles of other slides."""
    owners = np.array([tile.plan.row for tile in tiles])
    found = nearest(embeddings_ND, owners, np.array(queries, np.int64), _NEIGHBOURS)
    rows, shown = [], []
    for query, near in zip(queries, found, strict=True):
        cells = [Cell(Image.fromarray(tiles[query].pixels), label(tiles[query]))]
        cells += [
            Cell(Image.fromarray(tiles[at].pixels), f"{_scale(tiles[at])} cosine {cosine:.2f}") for at, cosine in near
        ]
        rows.append(Row("", tuple(cells)))
        shown += [tiles[query], *(tiles[at] for at, _ in near)]
    return Picture(
        NEIGHBOURS,
        "The most similar tiles of other slides",
        f"Each row begins with one of {len(queries)} tiles that are the same at every checkpoint, followed by the "
        f"{_NEIGHBOURS} tiles, of {len(tiles)} from this run, that the network finds most like it on other slides. "
        "They should show the same kind of tissue, not just the same colour. Beneath "
        "the first are its magnification and the start of its slide's id; cosine 1 is the same.",
        grid(rows, _SMALL_PX, ("this tile", "is most like ...")),
        _slides(shown),
    )


def label(tile: SeenTile) -> str:
    """Magnification and the start of the slide's id."""
    return f"{_scale(tile)} {tile.slide_id[:_SHOWN_ID]}"


def spread_over(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, evenly spread."""
    return [place * count // most for place in range(most)] if count > most else list(range(count))


def _scale(tile: SeenTile) -> str:
    return f"{magnification(tile.plan.mpp):.3g}x"


def _darkness_of_patches(pixels: NDArray[np.uint8], patches: int) -> NDArray[np.float64]:
    side = round(patches**0.5)
    patch_px = pixels.shape[0] // side
    darkness_N: NDArray[np.float64] = (
        255.0 - pixels.reshape(side, patch_px, side, patch_px, 3).mean(axis=(1, 3, 4)).ravel()
    )
    return darkness_N


def _slides(tiles: Sequence[SeenTile]) -> tuple[str, ...]:
    return tuple(sorted({tile.slide_id for tile in tiles}))
