"""Pieces of pictures: colours, places and sizes of what is drawn, read back from the pixels."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from histoscale.observe.drawing import (
    Cell,
    Pair,
    Row,
    captioned,
    enlarged,
    grid,
    heat,
    paired_bars,
    scatter,
    side_by_side,
)

BLUE, RED, GREY = (ImageColor.getrgb(colour) for colour in ("#4a7fc8", "#c85a4a", "#c3c8d0"))


def plain(colour: tuple[int, ...], side_px: int = 20) -> Image.Image:
    return Image.new("RGB", (side_px, side_px), colour)


def count(image: Image.Image, colour: tuple[int, ...]) -> int:
    return int((np.asarray(image) == colour).all(axis=-1).sum())


def test_a_heat_map_is_darkest_at_zero_and_lightest_at_its_largest_value() -> None:
    pixels = np.asarray(heat(np.array([[0.0, 1.0], [2.0, 4.0]]), 4)).astype(int)
    levels = pixels[::2, ::2].sum(axis=-1)
    assert levels[0, 0] < levels[0, 1] < levels[1, 0] < levels[1, 1]
    assert tuple(pixels[3, 3]) == (252, 247, 190)
    assert np.asarray(heat(np.zeros((2, 2)), 4)).max() == 61


def test_a_patch_becomes_a_square() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert (np.asarray(enlarged(pixels, 6)) == pixels.repeat(3, axis=0).repeat(3, axis=1)).all()


def test_a_grid_has_every_cell_at_its_place() -> None:
    rows = [
        Row("first", (Cell(plain(RED)), Cell(plain(BLUE), "a label much longer than its cell is wide"))),
        Row("", (Cell(plain(GREY)),)),
    ]
    sheet = grid(rows, 30, heads=("a", "b"))
    assert [count(sheet, colour) for colour in (RED, BLUE, GREY)] == [900] * 3
    assert sheet.width == 8 + 2 * 38
    pixels = np.asarray(sheet)
    red, blue, grey = (np.argwhere((pixels == colour).all(axis=-1)).min(axis=0) for colour in (RED, BLUE, GREY))
    assert red[0] == blue[0] < grey[0]
    assert red[1] == grey[1] < blue[1]


def test_points_lie_where_their_values_say() -> None:
    panel = scatter("by side", np.array([[1.0, 1.0], [-1.0, -1.0]]), ["right", "left"])
    pixels = np.asarray(panel)[:383]
    blue, red = (np.argwhere((pixels == colour).all(axis=-1)).mean(axis=0) for colour in (BLUE, RED))
    assert blue[0] > red[0], "left comes first in the legend, and is drawn below"
    assert blue[1] < red[1]


def test_names_that_colours_do_not_reach_share_a_grey() -> None:
    names = [f"class {number:02d}" for number in range(14) for _ in range(14 - number)]
    panel = scatter("by class", np.random.default_rng(0).normal(size=(len(names), 2)), names)
    assert count(panel, GREY) > 20
    few = scatter("by class", np.zeros((2, 2)), ["", ""])
    assert count(few, GREY) == 0


def test_bars_are_as_long_as_their_shares() -> None:
    sheet = paired_bars([Pair("a", 0.5, 0.25), Pair("b", 0.25, 0.5)])
    pixels = np.asarray(sheet)[40:]
    lengths = [int((pixels[row] == BLUE).all(axis=-1).sum()) for row in range(len(pixels))]
    found = sorted({length for length in lengths if length})
    assert found[1] == pytest.approx(2 * found[0], abs=3)
    assert paired_bars([]).height > 0


def test_panels_and_captions_leave_pictures_whole() -> None:
    panels = side_by_side([plain(RED), plain(BLUE), plain(GREY, 20)], 2)
    assert panels.size == (40, 40)
    assert [count(panels, colour) for colour in (RED, BLUE, GREY)] == [400] * 3
    told = captioned(panels, "Title", "A caption. " * 40)
    assert [count(told, colour) for colour in (RED, BLUE, GREY)] == [400] * 3
    assert told.height > panels.height + 5 * 18
