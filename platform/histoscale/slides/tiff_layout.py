"""The layout of a tiled TIFF or BigTIFF: Aperio SVS and plain pyramids.

A parser of the few tags that say where tiles lie. Which directories are levels, and which files belong to vendors
that arrange theirs otherwise, follows OpenSlide's rules; whatever is not known to be read as OpenSlide does is left to
it. Thumbnails, labels and macro pictures are pages of strips, whose data is never touched.
"""

import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np

from histoscale.errors import SlideError
from histoscale.slides.header import HeaderReader
from histoscale.slides.layout import Codec, Colour, Level, SlideLayout, Table, Vendor, fits_in_place
from histoscale.slides.scale import level_downsample
from histoscale.slides.slide import MppOrigin

Found = list[tuple[tuple[float, float] | None, MppOrigin]]

_TILE_WIDTH, _TILE_HEIGHT, _OFFSETS, _BYTE_COUNTS = 322, 323, 324, 325
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_DESCRIPTION, _MAKE, _ORIENTATION, _SAMPLES, _PLANAR = 270, 271, 274, 277, 284
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT, _SOFTWARE, _PREDICTOR = 282, 283, 296, 305, 317
_SUBFILE_TYPE, _SAMPLE_FORMAT, _JPEG_TABLES, _XML_PACKET = 254, 339, 347, 700
_DEPTH, _NDPI_FLAG, _ARGOS_METADATA = 32997, 65420, 65000

_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_WHOLE = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}
_CODECS: dict[int, Codec] = {1: "raw", 5: "lzw", 7: "jpeg", 8: "deflate", 32946: "deflate", 33005: "jpeg2000"}
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}

_MAX_DIRECTORIES = 512
_MAX_ENTRIES = 1024
_MAX_TEXT_BYTES = 256 * 2**10
_MAX_TABLES_BYTES = 64 * 2**10
_INLINE_BYTES = 256  # tables of this length are kept in the layout, and never fetched again
_SCAN_BYTES = 2**18
_MAX_SCAN_BYTES = 24 * 2**20
_FOREIGN_SOFTWARE = (b"MedScan", b"Philips")
_LEICA_MARK = b"www.leica-microsystems.com/scn"
_VENTANA_MARK = b"iScan"


@dataclass(frozen=True, slots=True)
class _Field:
    """One entry of a directory: the type and number of its values, and where they lie."""

    kind: int
    count: int
    position: int
    size_bytes: int


_Fields = dict[int, _Field]


class _Tiff:
    """The structure of a TIFF file; nothing in it is trusted."""

    def __init__(self, header: HeaderReader) -> None:
        self.header = header
        head = header.read(0, 16)
        self.big_endian = head[:2] == b"MM"
        self._order: Literal["<", ">"] = ">" if self.big_endian else "<"
        self._big = head[2:4] in (b"\x2b\x00", b"\x00\x2b")
        self.first = self._unpack("Q", head[8:]) if self._big else self._unpack("I", head[4:8])

    def directory(self, position: int) -> tuple[_Fields, int]:
        """The fields of the directory at a position, and where the next one is (0: there is none)."""
        count_kind, entry_bytes, word_kind = ("Q", 20, "Q") if self._big else ("H", 12, "I")
        count_bytes, word_bytes = struct.calcsize(count_kind), struct.calcsize(word_kind)
        count = self._unpack(count_kind, self.header.read(position, count_bytes))
        if not 1 <= count <= _MAX_ENTRIES:
            raise damaged_tiff(f"a directory of {count} entries")
        start = position + count_bytes
        data = self.header.read(start, count * entry_bytes + word_bytes)
        fields: _Fields = {}
        for i in range(count):
            entry = data[i * entry_bytes : (i + 1) * entry_bytes]
            tag, kind = struct.unpack(self._order + "HH", entry[:4])
            n = self._unpack(word_kind, entry[4 : 4 + word_bytes])
            size_bytes = n * _TYPE_BYTES.get(kind, 0)
            at = start + i * entry_bytes + 4 + word_bytes
            if size_bytes > word_bytes:
                at = self._unpack(word_kind, entry[4 + word_bytes :])
            fields.setdefault(tag, _Field(kind, n, at, size_bytes))
        return fields, self._unpack(word_kind, data[count * entry_bytes :])

    def directories(self) -> list[_Fields]:
        """All directories of the chain."""
        found: list[_Fields] = []
        seen: set[int] = set()
        position = self.first
        while position:
            if position in seen or len(found) >= _MAX_DIRECTORIES:
                raise damaged_tiff("directories in a circle, or too many")
            seen.add(position)
            fields, position = self.directory(position)
            found.append(fields)
        return found

    def number(self, fields: _Fields, tag: int, default: int | None = None) -> int:
        """The value of a field of one whole number."""
        field = fields.get(tag)
        if field is None and default is not None:
            return default
        if field is None or field.count != 1 or field.kind not in _WHOLE:
            raise damaged_tiff(f"no whole number in tag {tag}")
        code = _WHOLE[field.kind]
        return self._unpack(code, self.header.read(field.position, struct.calcsize(code)))

    def numbers(self, fields: _Fields, tag: int, default: int) -> list[int]:
        """All the whole numbers of a field of a few."""
        field = fields.get(tag)
        if field is None:
            return [default]
        if not 1 <= field.count <= 16 or field.kind not in _WHOLE:
            raise damaged_tiff(f"no whole numbers in tag {tag}")
        data = self.header.read(field.position, field.size_bytes)
        return list(struct.unpack(f"{self._order}{field.count}{_WHOLE[field.kind]}", data))

    def fraction(self, fields: _Fields, tag: int) -> float | None:
        """The value of a field of one positive fraction; None where there is none."""
        field = fields.get(tag)
        if field is None or field.count != 1 or field.kind not in (5, 11, 12):
            return None
        data = self.header.read(field.position, field.size_bytes)
        if field.kind == 5:
            over, under = struct.unpack(self._order + "II", data)
            value = over / under if under else 0.0
        else:
            (value,) = struct.unpack(self._order + ("f" if field.kind == 11 else "d"), data)
        return value if value > 0 else None

    def raw(self, fields: _Fields, tag: int, max_bytes: int) -> bytes:
        """The bytes of a field of text or bytes; none where there is no such field."""
        field = fields.get(tag)
        if field is None or field.kind not in (1, 2, 6, 7):
            return b""
        if field.size_bytes > max_bytes:
            raise damaged_tiff(f"{field.size_bytes} bytes in tag {tag}")
        return self.header.read(field.position, field.size_bytes)

    def table(self, fields: _Fields, tag: int, tiles: int) -> Table:
        """The table of one number for each tile."""
        field = fields.get(tag)
        if field is None or field.kind not in (3, 4, 16) or field.count < tiles:
            raise damaged_tiff(f"fewer numbers in tag {tag} than tiles")
        if field.position + field.size_bytes > self.header.size_bytes:
            raise damaged_tiff("a table of tiles beyond the object")
        inline = self.header.read(field.position, field.size_bytes) if field.size_bytes <= _INLINE_BYTES else b""
        return Table(field.count, _TYPE_BYTES[field.kind], self.big_endian, field.position, inline=inline)

    def _unpack(self, code: str, data: bytes) -> int:
        (value,) = struct.unpack_from(self._order + code, data)
        return int(value)


def is_tiff(head: bytes) -> bool:
    """Whether an object begins as a TIFF or BigTIFF does."""
    return head[:4] in (b"II*\0", b"MM\0*") or head[:8] in (b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0")


def tiff_layout(header: HeaderReader) -> tuple[SlideLayout, Found] | None:
    """The layout of a tiled TIFF and what it says of its scale.

    Args:
        header: Reads the object, which begins as a TIFF does.

    Returns:
        None where OpenSlide is to read it.

    Raises:
        SlideError: The file is cut short, or its structure is damaged.
        StorageError: It cannot be read.
    """
    tiff = _Tiff(header)
    first, _ = tiff.directory(tiff.first)
    # Before the chain is followed: that of a large NDPI file has words of another width.
    vendor = _vendor(tiff, first)
    if vendor is None:
        return None
    directories = tiff.directories()
    if vendor == "aperio":
        pages = [fields for fields in directories if _is_tiled(fields)]
    else:
        reduced = [f for f in directories[1:] if _is_tiled(f) and tiff.number(f, _SUBFILE_TYPE, 0) & 1]
        pages = sorted([first, *reduced], key=lambda fields: -tiff.number(fields, _WIDTH))
    levels: list[Level] = []
    size0 = (tiff.number(pages[0], _WIDTH), tiff.number(pages[0], _HEIGHT))
    for fields in pages:
        level = _level(tiff, fields, vendor, size0)
        if level is None or (levels and level.downsample < levels[-1].downsample):
            return None
        if vendor == "aperio" and _has_missing_tiles(tiff, level):
            return None
        levels.append(level)
    return SlideLayout(vendor, tuple(levels)), _found_scales(tiff, first, vendor)


def _vendor(tiff: _Tiff, first: _Fields) -> Vendor | None:
    """The vendor by the first directory; None for those that arrange their files in a way of their own."""
    if not _is_tiled(first) or _NDPI_FLAG in first or _ARGOS_METADATA in first:
        return None
    if tiff.raw(first, _SOFTWARE, _MAX_TEXT_BYTES).startswith(_FOREIGN_SOFTWARE):
        return None
    description = tiff.raw(first, _DESCRIPTION, _MAX_TEXT_BYTES)
    if description.startswith(b"Aperio"):
        return "aperio"
    packet = first.get(_XML_PACKET)
    if packet is not None and packet.size_bytes > _MAX_TEXT_BYTES:
        return None
    foreign = (
        tiff.raw(first, _MAKE, _MAX_TEXT_BYTES).startswith(b"Huron")
        or _LEICA_MARK in description
        or _VENTANA_MARK in tiff.raw(first, _XML_PACKET, _MAX_TEXT_BYTES)
    )
    return None if foreign else "generic-tiff"


def _is_tiled(fields: _Fields) -> bool:
    return _TILE_WIDTH in fields and _TILE_HEIGHT in fields


def _level(tiff: _Tiff, fields: _Fields, vendor: Vendor, size0: tuple[int, int]) -> Level | None:
    """The level of a tiled directory; None where it is not read in place."""
    kind = _codec_and_colour(tiff, fields, vendor)
    width, height = tiff.number(fields, _WIDTH), tiff.number(fields, _HEIGHT)
    tile_width, tile_height = tiff.number(fields, _TILE_WIDTH), tiff.number(fields, _TILE_HEIGHT)
    if min(width, height, tile_width, tile_height) < 1 or max(width, height) >= 2**31:
        raise damaged_tiff(f"a level of {width} x {height} px in tiles of {tile_width} x {tile_height}")
    if kind is None or not fits_in_place(tile_width, tile_height):
        return None
    tiles = -(-width // tile_width) * -(-height // tile_height)
    estimate = (size0[0] / width + size0[1] / height) / 2
    codec, colour = kind
    predictor = codec in ("lzw", "deflate") and tiff.number(fields, _PREDICTOR, 1) == 2
    return Level(
        width=width,
        height=height,
        tile_width=tile_width,
        tile_height=tile_height,
        downsample=level_downsample(size0, (width, height), estimate),
        codec=codec,
        colour=colour,
        predictor=predictor,
        framed=False,
        object_index=0,
        jpeg_tables=tiff.raw(fields, _JPEG_TABLES, _MAX_TABLES_BYTES) if codec == "jpeg" else b"",
        offsets=tiff.table(fields, _OFFSETS, tiles),
        byte_counts=tiff.table(fields, _BYTE_COUNTS, tiles),
    )


def _codec_and_colour(tiff: _Tiff, fields: _Fields, vendor: Vendor) -> tuple[Codec, Colour] | None:
    """How the tiles are stored, where it is a way that was proven against OpenSlide."""
    codec = _CODECS.get(tiff.number(fields, _COMPRESSION, 1))
    photometric = tiff.number(fields, _PHOTOMETRIC, 0)
    plain = (
        tiff.numbers(fields, _BITS, 1) == [8, 8, 8]
        and set(tiff.numbers(fields, _SAMPLE_FORMAT, 1)) == {1}
        and tiff.number(fields, _SAMPLES, 1) == 3
        and tiff.number(fields, _PLANAR, 1) == 1
        and tiff.number(fields, _ORIENTATION, 1) == 1
        and tiff.number(fields, _DEPTH, 1) == 1
        and tiff.number(fields, _PREDICTOR, 1) in (1, 2)
    )
    if not plain or codec is None or (codec == "jpeg2000" and vendor != "aperio"):
        return None
    if photometric == 6 and codec == "jpeg":
        return codec, "ycbcr"
    # The code of Aperio's JPEG 2000 says that its components become RGB, whatever else the directory says.
    return (codec, "rgb") if photometric == 2 or codec == "jpeg2000" else None


def _has_missing_tiles(tiff: _Tiff, level: Level) -> bool:
    """Whether a tile has no bytes: OpenSlide fills its place from other levels, and so is to read the slide."""
    table = level.byte_counts
    if table.size_bytes > _MAX_SCAN_BYTES:
        return True
    tiles = level.tiles_across * level.tiles_down
    for start in range(0, tiles * table.item_bytes, _SCAN_BYTES):
        length = min(_SCAN_BYTES, tiles * table.item_bytes - start)
        if not np.frombuffer(tiff.header.read(table.position + start, length), table.dtype).all():
            return True
    return False


def _found_scales(tiff: _Tiff, first: _Fields, vendor: Vendor) -> Found:
    """um/px of level 0 by the vendor's field and by the resolution tags."""
    found: Found = []
    if vendor == "aperio":
        mpp = _aperio_mpp(tiff.raw(first, _DESCRIPTION, _MAX_TEXT_BYTES))
        found.append(((mpp, mpp) if mpp else None, "vendor"))
    unit_um = _UM_PER_UNIT.get(tiff.number(first, _RESOLUTION_UNIT, 2))
    x, y = tiff.fraction(first, _X_RESOLUTION), tiff.fraction(first, _Y_RESOLUTION)
    found.append(((unit_um / x, unit_um / y) if unit_um and x and y else None, "tiff"))
    return found


def _aperio_mpp(description: bytes) -> float | None:
    """The MPP of a description like `Aperio ...|AppMag = 20|MPP = 0.499`; some scanners write a decimal comma."""
    pairs = [entry.partition(b"=") for entry in description.split(b"\0")[0].split(b"|")[1:]]
    values = [value for name, mark, value in pairs if mark and name.strip() == b"MPP"]
    try:
        return float(values[-1].strip().replace(b",", b".")) if values else None
    except ValueError:
        return None


def damaged_tiff(what: str) -> SlideError:
    """The error for a TIFF structure that contradicts itself."""
    return SlideError(
        "slide has a damaged TIFF directory",
        value=what,
        expected="directories that a scanner writes",
        remedy="copy the slide again from the scanner's archive, or take it out",
    )
