"""Reads slides in place: of an object in a bucket, only the tiles that a visit needs leave it.

`begin` starts the fetches and returns at once, `result` waits and decodes: so the bytes of one visit arrive while
another is decoded. What OpenSlide reads is the measure, to the bit where a level has the wanted scale.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoscale.errors import SlideError
from histoscale.slides.decode import decode_tile
from histoscale.slides.dicom_layout import dicom_layout, is_dicom
from histoscale.slides.header import HeaderReader
from histoscale.slides.layout import SlideLayout
from histoscale.slides.resample import Window, region_windows, resample, thumbnail_windows
from histoscale.slides.scale import resolve_scale
from histoscale.slides.slide import SlideInfo
from histoscale.slides.table_cache import TableCache
from histoscale.slides.tiff_layout import is_tiff, tiff_layout
from histoscale.slides.tile_fetch import PieceCache, Tile, TileBytes, TileSource
from histoscale.storage import ObjectInfo
from histoscale.storage.ranges import RangeReader

_WHITE = 255
_HEAD_BYTES = 132

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Region:
    """A square of a slide at a scale.

    Attributes:
        x_px0: Left edge in level-0 px; may lie outside the slide.
        y_px0: Top edge in level-0 px; may lie outside the slide.
        side_px: Side in px of `mpp`.
        mpp: um/px.
    """

    x_px0: float
    y_px0: float
    side_px: int
    mpp: float


def open_tiled(
    objects: Sequence[ObjectInfo], ranges: RangeReader, tables: TableCache, *, mpp: float | None = None
) -> "TiledSlide | None":
    """Open a slide by its headers.

    Args:
        objects: The slide's objects as they were listed; the first opens it.
        ranges: Where their bytes come from.
        tables: Pages of offset tables, for all slides of the process.
        mpp: um/px of level 0 from the sidecar; wins over what the file says.

    Returns:
        None where the format is not read in place, and OpenSlide is to read it from a copy.

    Raises:
        SlideError: The slide is damaged, or its um/px cannot be told.
        StorageError: Its objects cannot be read.
    """
    header = HeaderReader(objects[0], ranges)
    head = header.read(0, min(_HEAD_BYTES, objects[0].size_bytes))
    if is_dicom(head):
        found = None if is_tiff(head) else dicom_layout([header, *(HeaderReader(o, ranges) for o in objects[1:])])
    else:
        found = tiff_layout(header) if is_tiff(head) else None
    if found is None:
        return None
    layout, scales = found
    scale = resolve_scale(scales, mpp)
    info = SlideInfo(
        width_px0=layout.levels[0].width,
        height_px0=layout.levels[0].height,
        mpp=scale.mpp,
        mpp_origin=scale.origin,
        vendor=layout.vendor,
        level_downsamples=tuple(level.downsample for level in layout.levels),
        mpp_conflict=scale.conflict,
    )
    return TiledSlide(info, layout, objects, ranges, tables)


class TiledSlide:
    """A slide that is read by byte ranges.

    Args:
        info: Geometry and optics.
        layout: Where its tiles lie.
        objects: Its objects, in the order in which `open_tiled` got them.
        ranges: Where their bytes come from.
        tables: Pages of offset tables, for all slides of the process.

    Raises:
        SlideError: The layout does not fit the objects.
    """

    def __init__(
        self,
        info: SlideInfo,
        layout: SlideLayout,
        objects: Sequence[ObjectInfo],
        ranges: RangeReader,
        tables: TableCache,
        kept: PieceCache | None = None,
    ) -> None:
        layout.check([one.size_bytes for one in objects])
        self._info = info
        self._layout = layout
        self._source = TileSource(layout, objects, ranges, tables, kept)
        self._closed = False

    @property
    def info(self) -> SlideInfo:
        """Geometry and optics."""
        return self._info

    @property
    def layout(self) -> SlideLayout:
        """What opens the slide again without its headers."""
        return self._layout

    def begin(self, regions: Sequence[Region]) -> "PendingRegions":
        """Start to read regions, each of their tiles once; returns at once.

        Raises:
            SlideError: A region is not valid, or the slide is closed.
        """
        windows = [region_windows(self._info, r.x_px0, r.y_px0, r.side_px, r.mpp) for r in regions]
        blocks = [window for of_region in windows for window in of_region]
        tiles = self._fetch({tile for window in blocks for tile in tiles_under(self._layout, window)})
        return PendingRegions(self._layout, [region.side_px for region in regions], windows, tiles)

    def read(self, x_px0: float, y_px0: float, side_px: int, mpp: float) -> Pixels:
        """Read a square of `side_px` at exactly `mpp`; see `Slide.read`."""
        return self.begin([Region(x_px0, y_px0, side_px, mpp)]).result()[0]

    def thumbnail(self, um_per_px: float) -> Pixels:
        """Read the whole slide at exactly `um_per_px`; see `Slide.thumbnail`."""
        shape, windows = thumbnail_windows(self._info, um_per_px)
        out = np.empty((*shape, 3), np.uint8)
        for window in windows:
            tiles = self._fetch(set(tiles_under(self._layout, window))).result()
            _draw(window, _Composer(self._layout, [window], tiles), out)
        return out

    def verify(self) -> None:
        """Decode a 3 x 3 grid of tiles, corners included, at every level; see `Slide.verify`."""
        wanted: set[Tile] = set()
        for index, level in enumerate(self._layout.levels):
            rows = {0, level.tiles_down // 2, level.tiles_down - 1}
            columns = {0, level.tiles_across // 2, level.tiles_across - 1}
            wanted.update(product([index], rows, columns))
        for tile, data in self._fetch(wanted).result().items():
            level = self._layout.levels[tile[0]]
            if data is not None:
                decode_tile(data, level, np.empty((level.tile_height, level.tile_width, 3), np.uint8))

    def close(self) -> None:
        """Refuse further reads; there is nothing to free."""
        self._closed = True

    def _fetch(self, tiles: set[Tile]) -> "Future[TileBytes]":
        if self._closed:
            raise SlideError("slide is closed", remedy="open it again before reading")
        return self._source.fetch(tiles)


class PendingRegions:
    """Regions whose bytes are under way.

    Args:
        layout: The layout of their slide.
        sides_px: The side of each region.
        windows: The windows of each region.
        tiles: The tiles of all of them.
    """

    def __init__(
        self,
        layout: SlideLayout,
        sides_px: Sequence[int],
        windows: Sequence[Sequence[Window]],
        tiles: "Future[TileBytes]",
    ) -> None:
        self._layout = layout
        self._sides_px = sides_px
        self._windows = windows
        self._tiles = tiles

    def result(self) -> list[Pixels]:
        """Wait for the bytes and make the regions of them, uint8 [side_px, side_px, 3] each, in order.

        Raises:
            SlideError: The slide's data is damaged there.
            StorageError: It cannot be read.
        """
        blocks = [window for of_region in self._windows for window in of_region]
        composer = _Composer(self._layout, blocks, self._tiles.result())
        regions = []
        for side_px, windows in zip(self._sides_px, self._windows, strict=True):
            out = np.empty((side_px, side_px, 3), np.uint8)
            for window in windows:
                _draw(window, composer, out)
            regions.append(out)
        return regions


class _Composer:
    """Puts the px of windows together, each tile decoded once and forgotten after its last use."""

    def __init__(self, layout: SlideLayout, windows: Sequence[Window], tiles: TileBytes) -> None:
        self._layout = layout
        self._tiles = tiles
        self._uses = Counter(tile for window in windows for tile in tiles_under(layout, window))
        self._decoded: dict[Tile, Pixels] = {}
        self._spare: list[Pixels] = []
        self._canvas: Pixels = np.empty((0, 0, 3), np.uint8)

    def canvas(self, window: Window) -> Pixels:
        """Memory for the px of a window, used again and again: new memory costs as much as a tile."""
        if self._canvas.shape[:2] != (window.height, window.width):
            self._canvas = np.empty((window.height, window.width, 3), np.uint8)
        return self._canvas

    def compose(self, window: Window, canvas: Pixels) -> None:
        """Write the px of a window, white beyond the level."""
        level = self._layout.levels[window.level]
        inside = 0 <= window.left <= level.width - window.width and 0 <= window.top <= level.height - window.height
        if not inside:
            canvas[...] = _WHITE
        right = min(window.left + window.width, level.width)
        bottom = min(window.top + window.height, level.height)
        for tile in tiles_under(self._layout, window):
            _, row, column = tile
            x, y = column * level.tile_width, row * level.tile_height
            x0, x1 = max(x, window.left), min(x + level.tile_width, right)
            y0, y1 = max(y, window.top), min(y + level.tile_height, bottom)
            target = canvas[y0 - window.top : y1 - window.top, x0 - window.left : x1 - window.left]
            px = self._take(tile)
            target[...] = _WHITE if px is None else px[y0 - y : y1 - y, x0 - x : x1 - x]

    def _take(self, tile: Tile) -> Pixels | None:
        """The px of a tile, good until the next call; None: the file has none."""
        px = self._decoded.pop(tile, None)
        data = self._tiles[tile]
        if px is None and data is not None:
            px = self._decode(data, tile)
        self._uses[tile] -= 1
        if px is not None and self._uses[tile]:
            self._decoded[tile] = px
        elif px is not None:
            self._spare.append(px)
        return px

    def _decode(self, data: memoryview, tile: Tile) -> Pixels:
        level = self._layout.levels[tile[0]]
        shape = (level.tile_height, level.tile_width, 3)
        px = self._spare.pop() if self._spare else np.empty(shape, np.uint8)
        if px.shape != shape:
            px = np.empty(shape, np.uint8)
        decode_tile(data, level, px)
        return px


def tiles_under(layout: SlideLayout, window: Window) -> list[Tile]:
    """The tiles of a level that a window overlaps."""
    level = layout.levels[window.level]
    right = min(window.left + window.width, level.width)
    bottom = min(window.top + window.height, level.height)
    left, top = max(window.left, 0), max(window.top, 0)
    if left >= right or top >= bottom:
        return []
    rows = range(top // level.tile_height, (bottom - 1) // level.tile_height + 1)
    columns = range(left // level.tile_width, (right - 1) // level.tile_width + 1)
    return [(window.level, row, column) for row in rows for column in columns]


def _draw(window: Window, composer: _Composer, out: Pixels) -> None:
    """Write the block of a window to its place in a result."""
    block = out[window.row : window.row + window.rows, window.column : window.column + window.columns]
    if window.factor == 1 and window.box is None:
        composer.compose(window, block)
        return
    canvas = composer.canvas(window)
    composer.compose(window, canvas)
    block[...] = resample(Image.fromarray(canvas), window)
