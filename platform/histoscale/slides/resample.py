"""From a pyramid level to a wanted scale: which level, which of its px, and how they become px of the result.

A level is first averaged over whole squares of px, which is exact, antialiased and cheap, and then brought to the
wanted scale by a bicubic resampling whose window is placed in fractions of a px, so that neither the scale nor the
position is rounded. Where the average alone has the wanted scale, nothing is resampled and the place is rounded to
the next whole px of the level. `docs/decisions/0007-resampling.md` has the reasons.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoscale.errors import SlideError
from histoscale.slides.slide import SlideInfo

_SAME_SCALE = 1e-3
"""Two scales this near (0.4 px over 392) are one: resampling from the one to the other only blurs."""

_ENLARGE = 1.05  # px may be averaged a little too coarse (an 0.2525 um/px slide to 0.505 for 0.5), never more
_FILTER = Image.Resampling.BICUBIC
_FILTER_REACH = 2.0  # half-width of the bicubic kernel in px of the coarser side
_BLOCK_PX = 4000  # side of the largest read: below 4096, where OpenSlide cuts reads and rounds


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a level that one block of a result is made of.

    Attributes:
        level: Index of the level.
        left: First column in px of the level; may lie outside of it, as all of the window.
        top: First row in px of the level.
        width: Columns in px of the level, a multiple of `factor`.
        height: Rows in px of the level, a multiple of `factor`.
        factor: Side of the squares of px that are averaged.
        box: Left, top, right and bottom in averaged px of what becomes the block; None: all of it, as it is.
        row: First row of the block in the result.
        column: First column of the block in the result.
        rows: Rows of the block.
        columns: Columns of the block.
    """

    level: int
    left: int
    top: int
    width: int
    height: int
    factor: int
    box: tuple[float, float, float, float] | None
    row: int
    column: int
    rows: int
    columns: int


def region_windows(info: SlideInfo, x_px0: float, y_px0: float, side_px: int, mpp: float) -> list[Window]:
    """The windows of a square region, one for nearly all regions.

    Args:
        info: The slide's scale and levels.
        x_px0: Left edge in level-0 px.
        y_px0: Top edge in level-0 px.
        side_px: Side of the result in px.
        mpp: um/px of the result.

    Raises:
        SlideError: The place, the size or the scale is not valid.
    """
    if not (math.isfinite(x_px0) and math.isfinite(y_px0)):
        raise SlideError("region has no place", value=(x_px0, y_px0), expected="finite level-0 px")
    if side_px < 1:
        raise SlideError("region has no size", value=side_px, expected="a side of 1 px or more")
    _check_scale(mpp)
    return list(_windows(info, (x_px0, y_px0), (side_px, side_px), mpp))


def thumbnail_windows(info: SlideInfo, um_per_px: float) -> tuple[tuple[int, int], list[Window]]:
    """Height and width of the whole slide at a scale, and its windows, from top to bottom.

    Raises:
        SlideError: The scale is not valid.
    """
    _check_scale(um_per_px)
    scale = info.mpp / um_per_px
    # A sliver of rounding error must not add a white row.
    width = max(1, math.ceil(info.width_px0 * scale - 1e-3))
    height = max(1, math.ceil(info.height_px0 * scale - 1e-3))
    return (height, width), list(_windows(info, (0.0, 0.0), (width, height), um_per_px))


def resample(source: Image.Image, window: Window, shift: tuple[float, float] = (0.0, 0.0)) -> NDArray[np.uint8]:
    """Make a block of the px of its window.

    Args:
        source: The window's px of the level, RGB.
        window: The window.
        shift: By how many px of the level the source really starts right of and below the window.

    Returns:
        uint8 [rows, columns, 3].
    """
    if window.factor > 1:
        source = source.reduce(window.factor)
    if window.box is not None:
        x, y = shift[0] / window.factor, shift[1] / window.factor
        left, top, right, bottom = window.box
        box = (left - x, top - y, right - x, bottom - y)
        source = source.resize((window.columns, window.rows), _FILTER, box=box)
    return np.asarray(source)


def _windows(info: SlideInfo, corner_px0: tuple[float, float], size: tuple[int, int], mpp: float) -> Iterator[Window]:
    level = _level_for(info, mpp)
    downsample = info.level_downsamples[level]
    ratio = mpp / (info.mpp * downsample)
    factor = max(1, math.floor(ratio * _ENLARGE))
    rest = ratio / factor
    x, y = corner_px0[0] / downsample, corner_px0[1] / downsample
    if abs(rest - 1) <= _SAME_SCALE:
        step = max(1, _BLOCK_PX // factor)
        for row, rows in _spans(size[1], step):
            for column, columns in _spans(size[0], step):
                left, top = round(x) + column * factor, round(y) + row * factor
                source = (left, top, columns * factor, rows * factor)
                yield Window(level, *source, factor, None, row, column, rows, columns)
        return
    margin = math.ceil(_FILTER_REACH * max(rest, 1.0)) + 1
    step = max(1, math.floor((_BLOCK_PX / factor - 2 * margin - 2) / rest))
    for row, rows in _spans(size[1], step):
        for column, columns in _spans(size[0], step):
            # Squares are counted from the level's corner, so that neighbouring blocks average the same ones.
            at_x, at_y = x / factor + column * rest, y / factor + row * rest
            left, top = math.floor(at_x) - margin, math.floor(at_y) - margin
            width, height = (math.ceil(n * rest) + 1 + 2 * margin for n in (columns, rows))
            box = (at_x - left, at_y - top, at_x - left + columns * rest, at_y - top + rows * rest)
            source = (left * factor, top * factor, width * factor, height * factor)
            yield Window(level, *source, factor, box, row, column, rows, columns)


def _level_for(info: SlideInfo, mpp: float) -> int:
    """The coarsest level that is at least as fine as `mpp`; level 0 where none is."""
    finest = mpp * (1 + _SAME_SCALE) / info.mpp
    fine = [i for i, downsample in enumerate(info.level_downsamples) if downsample <= finest]
    return max(fine, key=lambda i: info.level_downsamples[i], default=0)


def _check_scale(mpp: float) -> None:
    if not (math.isfinite(mpp) and mpp > 0):
        raise SlideError("scale is not valid", value=mpp, expected="um/px above zero")


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the parts of a length, each of `step` but the last."""
    for start in range(0, length, step):
        yield start, min(step, length - start)
