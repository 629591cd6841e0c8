"""Where the tiles of a slide lie in its objects: all that a later visit needs to read it without its headers.

The arrays of tile offsets stay where they are, in the object; a layout says where that is. It is bytes in the slide
index, and so is checked like any input when it is read.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from histoscale.errors import SlideError

Codec = Literal["raw", "lzw", "deflate", "jpeg", "jpeg2000"]
Colour = Literal["rgb", "ycbcr"]
Vendor = Literal["aperio", "generic-tiff", "dicom"]


ITEM_HEADER_BYTES = 8
"""Tag and length before each frame of a DICOM object."""

_CODECS: tuple[Codec, ...] = ("raw", "lzw", "deflate", "jpeg", "jpeg2000")
_COLOURS: tuple[Colour, ...] = ("rgb", "ycbcr")
_VENDORS: tuple[Vendor, ...] = ("aperio", "generic-tiff", "dicom")

_MAX_TILE_PX = 4096 * 4096
_MAX_TILE_SIDE_PX = 2**15

_MAGIC = b"HSL1"
_HEAD = struct.Struct("<BHH")
_BLOB = struct.Struct("<I")
_LEVEL = struct.Struct("<IIIIdBBBBHH")
_TABLE = struct.Struct("<QQQBBH")
_MAX_BYTES = 64 * 2**20
_MAX_LEVELS = 256
_MAX_POSITION = 2**62


@dataclass(frozen=True, slots=True)
class Table:
    """An array of whole numbers, one for each tile, row by row from the top.

    Attributes:
        count: Its length.
        item_bytes: 2, 4 or 8.
        big_endian: Byte order.
        position: Where it begins in the object; of no meaning where it is inline.
        base: What is to be added to each number.
        inline: Its bytes, where it is not read from the object.
    """

    count: int
    item_bytes: int
    big_endian: bool
    position: int = 0
    base: int = 0
    inline: bytes = b""

    @property
    def dtype(self) -> str:
        """What numpy calls the numbers."""
        return f"{'>' if self.big_endian else '<'}u{self.item_bytes}"

    @property
    def size_bytes(self) -> int:
        """Length in bytes."""
        return self.count * self.item_bytes


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the pyramid.

    Attributes:
        width: Width in px of the level.
        height: Height in px of the level.
        tile_width: Width of a tile; the last one of a row may reach beyond the level.
        tile_height: Height of a tile.
        downsample: Level-0 px per px of the level.
        codec: How the tiles are compressed.
        colour: What the three components of a compressed tile are.
        predictor: Whether rows hold differences of px.
        framed: Whether each tile begins with the header of a DICOM item, which its byte count includes.
        object_index: Which object of the slide holds it.
        jpeg_tables: Quantisation and Huffman tables that the tiles share; empty where each has its own.
        offsets: First byte of each tile.
        byte_counts: Length of each tile.
    """

    width: int
    height: int
    tile_width: int
    tile_height: int
    downsample: float
    codec: Codec
    colour: Colour
    predictor: bool
    framed: bool
    object_index: int
    jpeg_tables: bytes
    offsets: Table
    byte_counts: Table

    @property
    def tiles_across(self) -> int:
        """Tiles in a row."""
        return -(-self.width // self.tile_width)

    @property
    def tiles_down(self) -> int:
        """Rows of tiles."""
        return -(-self.height // self.tile_height)


@dataclass(frozen=True, slots=True)
class SlideLayout:
    """The levels of a slide, the finest first.

    Attributes:
        vendor: The vendor as OpenSlide names it.
        levels: The levels.
    """

    vendor: Vendor
    levels: tuple[Level, ...]

    def to_bytes(self) -> bytes:
        """The layout in a compact form for `from_bytes`."""
        blobs = [b""]
        for level in self.levels:
            for blob in (level.jpeg_tables, level.offsets.inline, level.byte_counts.inline):
                if blob not in blobs:
                    blobs.append(blob)
        parts = [_HEAD.pack(_VENDORS.index(self.vendor), len(self.levels), len(blobs))]
        for blob in blobs:
            parts += [_BLOB.pack(len(blob)), blob]
        parts += [_pack_level(level, blobs) for level in self.levels]
        return _MAGIC + zlib.compress(b"".join(parts))

    @classmethod
    def from_bytes(cls, data: bytes) -> "SlideLayout":
        """Read what `to_bytes` made.

        Raises:
            SlideError: It is no layout, or not a possible one.
        """
        try:
            layout = _unpack(data)
        except (struct.error, zlib.error, IndexError) as error:
            raise _damaged(str(error)) from None
        layout.check()
        return layout

    def check(self, object_sizes: Sequence[int] | None = None) -> None:
        """Refuse a layout that no slide can have.

        Args:
            object_sizes: Lengths in bytes of the slide's objects, where they are known.

        Raises:
            SlideError: A size, a count or a position is impossible.
        """
        if not 1 <= len(self.levels) <= _MAX_LEVELS:
            raise _damaged("no levels, or too many")
        for level in self.levels:
            _check_level(level)
            if object_sizes is None:
                continue
            if level.object_index >= len(object_sizes):
                raise _damaged("a level of an object that the slide has not")
            for table in (level.offsets, level.byte_counts):
                if not table.inline and table.position + table.size_bytes > object_sizes[level.object_index]:
                    raise _damaged("a table of tiles beyond the object")


def fits_in_place(tile_width: int, tile_height: int) -> bool:
    """Whether tiles of this size in px are small enough to be read in place."""
    return max(tile_width, tile_height) <= _MAX_TILE_SIDE_PX and tile_width * tile_height <= _MAX_TILE_PX


def _pack_level(level: Level, blobs: list[bytes]) -> bytes:
    head = _LEVEL.pack(
        level.width,
        level.height,
        level.tile_width,
        level.tile_height,
        level.downsample,
        _CODECS.index(level.codec),
        _COLOURS.index(level.colour),
        level.predictor,
        level.framed,
        level.object_index,
        blobs.index(level.jpeg_tables),
    )
    return head + b"".join(
        _TABLE.pack(t.position, t.count, t.base, t.item_bytes, t.big_endian, blobs.index(t.inline))
        for t in (level.offsets, level.byte_counts)
    )


def _unpack(data: bytes) -> SlideLayout:
    if data[: len(_MAGIC)] != _MAGIC:
        raise _damaged("no layout")
    inflate = zlib.decompressobj()
    body = inflate.decompress(data[len(_MAGIC) :], _MAX_BYTES)
    if not inflate.eof or inflate.unused_data:
        raise _damaged("cut short, or too long")
    vendor, n_levels, n_blobs = _HEAD.unpack_from(body)
    at = _HEAD.size
    blobs = []
    for _ in range(n_blobs):
        (length,) = _BLOB.unpack_from(body, at)
        at += _BLOB.size
        if at + length > len(body):
            raise _damaged("cut short")
        blobs.append(body[at : at + length])
        at += length
    levels = []
    for _ in range(n_levels):
        width, height, tile_width, tile_height, downsample, *kind, object_index, tables = _LEVEL.unpack_from(body, at)
        codec, colour, predictor, framed = kind
        at += _LEVEL.size
        offsets, byte_counts = (_unpack_table(body, at + i * _TABLE.size, blobs) for i in (0, 1))
        at += 2 * _TABLE.size
        levels.append(
            Level(
                width=width,
                height=height,
                tile_width=tile_width,
                tile_height=tile_height,
                downsample=downsample,
                codec=_CODECS[codec],
                colour=_COLOURS[colour],
                predictor=bool(predictor),
                framed=bool(framed),
                object_index=object_index,
                jpeg_tables=blobs[tables],
                offsets=offsets,
                byte_counts=byte_counts,
            )
        )
    if at != len(body):
        raise _damaged("too long")
    return SlideLayout(_VENDORS[vendor], tuple(levels))


def _unpack_table(body: bytes, at: int, blobs: list[bytes]) -> Table:
    position, count, base, item_bytes, big_endian, inline = _TABLE.unpack_from(body, at)
    return Table(count, item_bytes, bool(big_endian), position, base, blobs[inline])


def _check_level(level: Level) -> None:
    sizes = (level.width, level.height, level.tile_width, level.tile_height)
    if min(sizes) < 1 or not fits_in_place(level.tile_width, level.tile_height):
        raise _damaged("sizes of no tile or level")
    if not (math.isfinite(level.downsample) and level.downsample >= 1):
        raise _damaged("a level finer than the first")
    for table in (level.offsets, level.byte_counts):
        if table.item_bytes not in (2, 4, 8) or table.count < level.tiles_across * level.tiles_down:
            raise _damaged("fewer table entries than tiles")
        if max(table.position, table.base, table.count) > _MAX_POSITION:
            raise _damaged("a position beyond any object")
        if table.inline and len(table.inline) != table.size_bytes:
            raise _damaged("an inline table of another length")


def _damaged(why: str) -> SlideError:
    return SlideError(
        "layout of the slide is damaged", value=why, expected="what the index wrote", remedy="build the index again"
    )
