"""Pieces of pictures: rows of labelled tiles, heat maps, scatter plots and paired bars, as PIL images."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture: TypeAlias = Image.Image
Pixels: TypeAlias = NDArray[np.uint8]

_GAP_PX, _LINE_PX, _TEXT_PX = 8, 18, 13
_INK, _PALE, _RULE = "#1c2430", "#667085", "#e3e6eb"
_FONT = ImageFont.load_default(_TEXT_PX)
_HEAT = np.array([(24, 15, 61), (101, 26, 128), (196, 60, 100), (248, 140, 80), (252, 247, 190)], np.float64)
_COLOURS = (
    *("#4a7fc8", "#c85a4a", "#3f8f6b", "#e0b040", "#7a5ea8", "#4bb3c4"),
    *("#b3549a", "#8a6d3b", "#97b552", "#1f3a5f", "#e58aa5", "#5f6b76"),
)
_OTHERS = "#c3c8d0"
_PANEL_PX, _DOT_PX = 380, 3
_BAR_PX, _BARS_PX, _NAMES_PX = 9, 420, 330


@dataclass(frozen=True)
class Cell:
    """A picture and the line beneath it."""

    image: Picture
    label: str = ""


@dataclass(frozen=True)
class Row:
    """Cells side by side, and the line above them."""

    title: str
    cells: tuple[Cell, ...]


def grid(rows: Sequence[Row], cell_px: int, heads: Sequence[str] = ()) -> Picture:
    """Rows of cells, all made squares of `cell_px`.

    Args:
        rows: From top to bottom.
        cell_px: Side of a cell.
        heads: Names of the columns.
    """
    columns = max((len(row.cells) for row in rows), default=1)
    heights = [_LINE_PX * bool(row.title) + cell_px + _LINE_PX + _GAP_PX for row in rows]
    size = (_GAP_PX + columns * (cell_px + _GAP_PX), _GAP_PX + _LINE_PX * bool(heads) + sum(heights))
    sheet = Image.new("RGB", size, "white")
    pen, top = ImageDraw.Draw(sheet), _GAP_PX
    for column, head in enumerate(heads):
        pen.text((_GAP_PX + column * (cell_px + _GAP_PX), top), _short(head, cell_px), fill=_PALE, font=_FONT)
    top += _LINE_PX * bool(heads)
    for row, height in zip(rows, heights, strict=True):
        if row.title:
            pen.text((_GAP_PX, top), row.title, fill=_INK, font=_FONT)
        below = top + _LINE_PX * bool(row.title)
        for column, cell in enumerate(row.cells):
            left = _GAP_PX + column * (cell_px + _GAP_PX)
            sheet.paste(cell.image.resize((cell_px, cell_px), Image.Resampling.LANCZOS), (left, below))
            pen.text((left, below + cell_px + 2), _short(cell.label, cell_px), fill=_PALE, font=_FONT)
        top += height
    return sheet


def heat(values: NDArray[np.floating], side_px: int) -> Picture:
    """A map of values of 0 or more as colours, black for 0 and light yellow for its own largest value.

    Args:
        values: [h, w].
        side_px: Side of the picture.
    """
    places = values / max(float(values.max()), 1e-12) * (len(_HEAT) - 1)
    steps = np.arange(len(_HEAT))
    colours = np.stack([np.interp(places, steps, _HEAT[:, channel]) for channel in range(3)], axis=-1)
    return enlarged(np.rint(colours).astype(np.uint8), side_px)


def enlarged(pixels: Pixels, side_px: int) -> Picture:
    """A small picture uint8 [h, w, 3] with its pixels as squares."""
    return Image.fromarray(pixels).resize((side_px, side_px), Image.Resampling.NEAREST)


def scatter(title: str, points_N2: NDArray[np.floating], names: Sequence[str]) -> Picture:
    """Points coloured by name, with a legend; the names that are rarest share a grey where colours run out.

    Args:
        title: What the colours mean.
        points_N2: Places; the axes reach as far as the farthest of them.
        names: Of each point.
    """
    counts = Counter(names)
    ordered = sorted(counts) if len(counts) <= len(_COLOURS) else [name for name, _ in counts.most_common()]
    colour_of = dict(zip(ordered, _COLOURS, strict=False))
    legend = [(name, colour_of[name]) for name in ordered if name in colour_of]
    if len(ordered) > len(legend):
        legend.append((f"{len(ordered) - len(legend)} others", _OTHERS))
    panel = Image.new("RGB", (_PANEL_PX, _PANEL_PX + _LINE_PX * (2 + (len(legend) + 1) // 2)), "white")
    pen = ImageDraw.Draw(panel)
    pen.text((_GAP_PX, 0), title, fill=_INK, font=_FONT)
    box = (_GAP_PX, _LINE_PX, _PANEL_PX - _GAP_PX, _LINE_PX + _PANEL_PX - 2 * _GAP_PX)
    pen.rectangle(box, outline=_RULE)
    reach = float(np.abs(points_N2).max(initial=0.0)) or 1.0
    half, middle = (box[2] - box[0]) / 2 - 2 * _DOT_PX, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    pen.line((middle[0], box[1], middle[0], box[3]), fill=_RULE)
    pen.line((box[0], middle[1], box[2], middle[1]), fill=_RULE)
    for (x, y), name in zip((points_N2 / reach).tolist(), names, strict=True):
        at = (middle[0] + x * half, middle[1] - y * half)
        corners = (at[0] - _DOT_PX, at[1] - _DOT_PX, at[0] + _DOT_PX, at[1] + _DOT_PX)
        pen.ellipse(corners, fill=colour_of.get(name, _OTHERS))
    for place, (name, colour) in enumerate(legend):
        left = _GAP_PX + place % 2 * _PANEL_PX // 2
        top = box[3] + _GAP_PX + place // 2 * _LINE_PX
        pen.rectangle((left, top + 3, left + 10, top + 13), fill=colour)
        text = _short(f"{name or 'not known'} ({counts[name]})" if name in counts else name, _PANEL_PX // 2 - 24)
        pen.text((left + 16, top), text, fill=_INK, font=_FONT)
    return panel


def side_by_side(panels: Sequence[Picture], columns: int) -> Picture:
    """Panels of one width in rows of so many."""
    rows = [panels[first : first + columns] for first in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    width = panels[0].width
    sheet = Image.new("RGB", (width * min(columns, len(panels)), sum(heights)), "white")
    for place, panel in enumerate(panels):
        sheet.paste(panel, (place % columns * width, sum(heights[: place // columns])))
    return sheet


@dataclass(frozen=True)
class Pair:
    """Two shares that ought to be alike."""

    name: str
    asked: float
    seen: float


def paired_bars(pairs: Sequence[Pair]) -> Picture:
    """What was asked for above what was seen, for each name, on one scale."""
    row_px = 2 * _BAR_PX + 2 * _GAP_PX
    size = (_NAMES_PX + _BARS_PX + 140, 2 * _GAP_PX + _LINE_PX + row_px * len(pairs))
    sheet = Image.new("RGB", size, "white")
    pen, largest = ImageDraw.Draw(sheet), max((max(pair.asked, pair.seen) for pair in pairs), default=0.0) or 1.0
    for place, (name, colour) in enumerate((("asked for", _OTHERS), ("seen", _COLOURS[0]))):
        left = _NAMES_PX + 110 * place
        pen.rectangle((left, _GAP_PX + 3, left + 10, _GAP_PX + 13), fill=colour)
        pen.text((left + 16, _GAP_PX), name, fill=_INK, font=_FONT)
    pen.text((_NAMES_PX + _BARS_PX + _GAP_PX, _GAP_PX), "asked for / seen", fill=_PALE, font=_FONT)
    for place, pair in enumerate(pairs):
        top = 2 * _GAP_PX + _LINE_PX + place * row_px
        pen.text((_GAP_PX, top), _short(pair.name, _NAMES_PX - 2 * _GAP_PX), fill=_INK, font=_FONT)
        for share, colour, under in ((pair.asked, _OTHERS, 0), (pair.seen, _COLOURS[0], _BAR_PX)):
            right = _NAMES_PX + max(1.0, share / largest * _BARS_PX)
            pen.rectangle((_NAMES_PX, top + under, right, top + under + _BAR_PX - 1), fill=colour)
        numbers = f"{pair.asked:.1%} / {pair.seen:.1%}"
        pen.text((_NAMES_PX + _BARS_PX + _GAP_PX, top), numbers, fill=_PALE, font=_FONT)
    return sheet


def captioned(image: Picture, title: str, caption: str) -> Picture:
    """A picture under its title and its caption, for places that have no text of their own."""
    width = max(image.width, 560)
    lines = textwrap.wrap(caption, max(20, int(width / (0.52 * _TEXT_PX))))
    top = 2 * _GAP_PX + _LINE_PX * (1 + len(lines))
    sheet = Image.new("RGB", (width, top + image.height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP_PX, _GAP_PX), title, fill=_INK, font=ImageFont.load_default(_TEXT_PX + 2))
    for number, line in enumerate(lines, start=1):
        pen.text((_GAP_PX, _GAP_PX + number * _LINE_PX), line, fill=_PALE, font=_FONT)
    sheet.paste(image, (0, top))
    return sheet


def _short(text: str, room_px: int) -> str:
    """The text, cut where there is no room for it."""
    if _FONT.getlength(text) <= room_px:
        return text
    while text and _FONT.getlength(text + "…") > room_px:
        text = text[:-1]
    return text + "…"
