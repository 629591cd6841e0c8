"""The layout of a DICOM whole-slide image: one object for each level, its frames the tiles.

Read in place are sets as converters and scanners write them: TILED_FULL, one focal plane, one optical path, JPEG
baseline or JPEG 2000 frames in explicit little endian. A walker of elements that skips what it does not need keeps
within bounds whatever the lengths in the headers say. All else is left to OpenSlide; labels and overviews are never
read.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.errors import SlideError
from histoscale.slides.header import HeaderReader
from histoscale.slides.layout import ITEM_HEADER_BYTES, Codec, Colour, Level, SlideLayout, Table, fits_in_place
from histoscale.slides.scale import level_downsample
from histoscale.slides.tiff_layout import Found

_WHOLE_SLIDE_IMAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_CODECS: dict[tuple[str, str], tuple[Codec, Colour]] = {
    ("1.2.840.10008.1.2.4.50", "YBR_FULL_422"): ("jpeg", "ycbcr"),
    ("1.2.840.10008.1.2.4.50", "RGB"): ("jpeg", "rgb"),
    ("1.2.840.10008.1.2.4.90", "YBR_RCT"): ("jpeg2000", "rgb"),
    ("1.2.840.10008.1.2.4.90", "RGB"): ("jpeg2000", "rgb"),
    ("1.2.840.10008.1.2.4.91", "YBR_RCT"): ("jpeg2000", "rgb"),
    ("1.2.840.10008.1.2.4.91", "YBR_ICT"): ("jpeg2000", "rgb"),
    ("1.2.840.10008.1.2.4.91", "RGB"): ("jpeg2000", "rgb"),
}
"""By transfer syntax and photometric interpretation; the decoder of JPEG 2000 undoes its colour transforms."""

_SOP_CLASS, _TRANSFER_SYNTAX = 0x00020002, 0x00020010
_IMAGE_TYPE, _SERIES = 0x00080008, 0x0020000E
_CONCATENATION, _ORGANIZATION = 0x00209161, 0x00209311
_SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES = 0x00280002, 0x00280004, 0x00280006, 0x00280008
_ROWS, _COLUMNS, _SPACING = 0x00280010, 0x00280011, 0x00280030
_BITS, _BITS_STORED, _HIGH_BIT, _SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
_PIXEL_MEASURES, _SHARED_GROUPS = 0x00289110, 0x52009229
_MATRIX_COLUMNS, _MATRIX_ROWS, _PATHS, _PLANES = 0x00480006, 0x00480007, 0x00480302, 0x00480303
_LONG_OFFSETS, _LONG_LENGTHS, _PIXELS = 0x7FE00001, 0x7FE00002, 0x7FE00010
_WANTED = frozenset(
    [
        *(_SOP_CLASS, _TRANSFER_SYNTAX, _IMAGE_TYPE, _SERIES, _CONCATENATION, _ORGANIZATION, _SAMPLES, _PHOTOMETRIC),
        *(_PLANAR, _FRAMES, _ROWS, _COLUMNS, _BITS, _BITS_STORED, _HIGH_BIT, _SIGNED, _MATRIX_COLUMNS, _MATRIX_ROWS),
        *(_PATHS, _PLANES),
    ]
)
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD

_LONG_FORMS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_SHORT_FORMS = (
    *(b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO"),
    *(b"LT", b"PN", b"SH", b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US"),
)
_UNDEFINED = 0xFFFFFFFF
_PREFIX_BYTES = 132
_MAX_VALUE_BYTES = 4096
_MAX_ELEMENTS = 20_000
_MAX_DEPTH = 16
_MAX_FRAMES = 2**20
_MAX_OBJECTS = 1024
_MAX_WALK_BYTES = 16 * 2**20  # a walk along the frames of a larger object costs as much as its copy


class _NotInPlaceError(Exception):
    """A file that is sound, as far as can be told, but is not read in place."""


@dataclass(frozen=True, slots=True)
class _Element:
    """One element: its value lies at `position`; `length` may be undefined."""

    tag: int
    form: bytes
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class _Instance:
    """What one object says of itself: the values of single elements, and where its pixels are."""

    header: HeaderReader
    values: dict[int, bytes]
    long_tables: dict[int, _Element]
    pixels: _Element
    spacing: bytes

    def text(self, tag: int) -> list[str]:
        """The values of a text element."""
        return [part.strip(" \0") for part in self.values.get(tag, b"").decode("latin-1").split("\\")]

    def whole(self, tag: int, default: int | None = None) -> int:
        """The value of a numeric element."""
        data = self.values.get(tag, b"")
        if not data and default is not None:
            return default
        if len(data) == 2 or len(data) == 4:
            return int.from_bytes(data, "little")
        raise _damaged(f"no whole number in element {tag:08X}")


def is_dicom(head: bytes) -> bool:
    """Whether an object begins as a DICOM file does."""
    return head[128:132] == b"DICM"


def dicom_layout(headers: Sequence[HeaderReader]) -> tuple[SlideLayout, Found] | None:
    """The layout of a DICOM set and what it says of its scale.

    Args:
        headers: Read the objects of the set, in the order in which layouts count them.

    Returns:
        None where OpenSlide is to read it.

    Raises:
        SlideError: An object is cut short, or its structure is damaged.
        StorageError: It cannot be read.
    """
    if len(headers) > _MAX_OBJECTS:
        return None
    try:
        found = [(i, _instance(header)) for i, header in enumerate(headers)]
        volumes = [(i, one) for i, one in found if one.text(_IMAGE_TYPE)[2:3] == ["VOLUME"]]
        if not volumes or len({tuple(one.text(_SERIES)) for _, one in found}) != 1:
            return None
        volumes.sort(key=lambda entry: -entry[1].whole(_MATRIX_COLUMNS))
        first = volumes[0][1]
        size0 = (first.whole(_MATRIX_COLUMNS), first.whole(_MATRIX_ROWS))
        levels = tuple(_level(i, one, size0) for i, one in volumes)
    except _NotInPlaceError:
        return None
    widths = [level.width for level in levels]
    downsamples = [level.downsample for level in levels]
    if len(set(widths)) < len(widths) or downsamples != sorted(downsamples):
        return None
    return SlideLayout("dicom", levels), [(_spacing_um(first.spacing), "vendor")]


def _instance(header: HeaderReader) -> _Instance:
    """Walk the elements of one object up to its pixels."""
    if not is_dicom(header.read(0, min(_PREFIX_BYTES, header.size_bytes))):
        raise _NotInPlaceError
    values: dict[int, bytes] = {}
    long_tables: dict[int, _Element] = {}
    spacing = b""
    for element in _Walker(header).elements(_PREFIX_BYTES, header.size_bytes):
        if element.tag == _PIXELS:
            if (values.get(_SOP_CLASS, b"").strip(b"\0").decode("latin-1")) != _WHOLE_SLIDE_IMAGE:
                raise _NotInPlaceError
            return _Instance(header, values, long_tables, element, spacing)
        if element.tag in (_LONG_OFFSETS, _LONG_LENGTHS):
            long_tables[element.tag] = element
        elif element.tag == _SHARED_GROUPS:
            spacing = _find_spacing(header, element)
        elif element.tag in _WANTED and element.length <= _MAX_VALUE_BYTES:
            values[element.tag] = header.read(element.position, element.length)
        if element.tag == _TRANSFER_SYNTAX and not _is_known_syntax(values.get(_TRANSFER_SYNTAX, b"")):
            # Another syntax may lay out the elements that follow in another way.
            raise _NotInPlaceError
    raise _damaged("no pixels")


def _is_known_syntax(value: bytes) -> bool:
    return value.strip(b"\0 ").decode("latin-1") in {syntax for syntax, _ in _CODECS}


class _Walker:
    """Finds elements in explicit little endian, within a bound on their number and depth."""

    def __init__(self, header: HeaderReader) -> None:
        self._header = header
        self._seen = 0

    def elements(self, start: int, end: int, depth: int = 0) -> Iterator[_Element]:
        """The elements between two positions; sequences are stepped over. Ends at the end of an item."""
        position = start
        while position + 8 <= end:
            element = self._element(position, end)
            if element.tag == _END_OF_ITEM:
                return
            yield element
            position = self._after(element, end, depth)

    def items(self, sequence: _Element, end: int, depth: int = 0) -> Iterator[tuple[int, int]]:
        """Start and end of the content of each item of a sequence."""
        position = sequence.position
        last = end if sequence.length == _UNDEFINED else position + sequence.length
        while position + 8 <= last:
            tag, length = self._item(position)
            if tag == _END_OF_SEQUENCE:
                return
            if tag != _ITEM:
                raise _damaged("no item where one should be")
            position += 8
            stop = last if length == _UNDEFINED else position + length
            yield position, min(stop, last)
            position = self._end_of_item(position, last, depth) if length == _UNDEFINED else stop

    def _item(self, position: int) -> tuple[int, int]:
        self._count()
        group, number, length = struct.unpack("<HHI", self._header.read(position, 8))
        return group << 16 | number, length

    def _element(self, position: int, end: int) -> _Element:
        self._count()
        head = self._header.read(position, min(12, end - position))
        group, number = struct.unpack_from("<HH", head)
        tag = group << 16 | number
        if tag in (_END_OF_ITEM, _END_OF_SEQUENCE):
            return _Element(tag, b"", position + 8, 0)
        form = head[4:6]
        if form in _LONG_FORMS and len(head) == 12:
            return _Element(tag, form, position + 12, int.from_bytes(head[8:12], "little"))
        if form in _SHORT_FORMS:
            return _Element(tag, form, position + 8, int.from_bytes(head[6:8], "little"))
        raise _damaged("an element of no known form")

    def _after(self, element: _Element, end: int, depth: int) -> int:
        if element.length != _UNDEFINED:
            return element.position + element.length
        if element.form != b"SQ" or depth >= _MAX_DEPTH:
            raise _NotInPlaceError
        position = element.position
        while True:
            tag, length = self._item(position)
            position += 8
            if tag == _END_OF_SEQUENCE:
                return position
            if tag != _ITEM:
                raise _damaged("no item where one should be")
            position = self._end_of_item(position, end, depth) if length == _UNDEFINED else position + length

    def _end_of_item(self, position: int, end: int, depth: int) -> int:
        """Where an item of undefined length has ended."""
        while True:
            element = self._element(position, end)
            if element.tag == _END_OF_ITEM:
                return element.position
            position = self._after(element, end, depth + 1)

    def _count(self) -> None:
        self._seen += 1
        if self._seen > _MAX_ELEMENTS:
            raise _NotInPlaceError


def _find_spacing(header: HeaderReader, groups: _Element) -> bytes:
    """Pixel Spacing out of the Pixel Measures of the functional groups that all frames share."""
    walker = _Walker(header)
    for start, end in walker.items(groups, header.size_bytes):
        for element in walker.elements(start, end, 1):
            if element.tag != _PIXEL_MEASURES:
                continue
            for inner_start, inner_end in walker.items(element, end, 1):
                for inner in walker.elements(inner_start, inner_end, 2):
                    if inner.tag == _SPACING and inner.length <= _MAX_VALUE_BYTES:
                        return header.read(inner.position, inner.length)
    return b""


def _spacing_um(spacing: bytes) -> tuple[float, float] | None:
    """(x, y) in um/px of a Pixel Spacing, which holds the distance of rows, then of columns, in mm."""
    try:
        rows_mm, columns_mm = (float(part.strip(b" \0")) for part in spacing.split(b"\\"))
    except ValueError:
        return None
    return columns_mm * 1000, rows_mm * 1000


def _level(index: int, one: _Instance, size0: tuple[int, int]) -> Level:
    """The level of one object."""
    kind = _CODECS.get((one.text(_TRANSFER_SYNTAX)[0], one.text(_PHOTOMETRIC)[0]))
    expected = {_SAMPLES: 3, _PLANAR: 0, _BITS: 8, _BITS_STORED: 8, _HIGH_BIT: 7, _SIGNED: 0}
    width, height = one.whole(_MATRIX_COLUMNS), one.whole(_MATRIX_ROWS)
    tile_width, tile_height = one.whole(_COLUMNS), one.whole(_ROWS)
    if min(width, height, tile_width, tile_height) < 1 or max(width, height) >= 2**31:
        raise _damaged(f"a level of {width} x {height} px in tiles of {tile_width} x {tile_height}")
    frames = -(-width // tile_width) * -(-height // tile_height)
    if (
        kind is None
        or any(one.whole(tag) != value for tag, value in expected.items())
        or one.whole(_PLANES, 1) != 1
        or one.whole(_PATHS, 1) != 1
        or one.values.get(_CONCATENATION)
        or one.text(_ORGANIZATION)[0] != "TILED_FULL"
        or one.text(_FRAMES)[0] != str(frames)
        or one.pixels.length != _UNDEFINED
        or not fits_in_place(tile_width, tile_height)
        or frames > _MAX_FRAMES
    ):
        raise _NotInPlaceError
    estimate = (size0[0] / width + size0[1] / height) / 2
    offsets, byte_counts = _frame_tables(one, frames)
    return Level(
        width=width,
        height=height,
        tile_width=tile_width,
        tile_height=tile_height,
        downsample=level_downsample(size0, (width, height), estimate),
        codec=kind[0],
        colour=kind[1],
        predictor=False,
        framed=True,
        object_index=index,
        jpeg_tables=b"",
        offsets=offsets,
        byte_counts=byte_counts,
    )


def _frame_tables(one: _Instance, frames: int) -> tuple[Table, Table]:
    """Where the frames lie, the header of each included: of the Extended or Basic Offset Table, or by a walk."""
    start = one.pixels.position
    tag, length = struct.unpack("<II", one.header.read(start, ITEM_HEADER_BYTES))
    if tag != _swapped(_ITEM):
        raise _damaged("no offset table before the frames")
    first = start + ITEM_HEADER_BYTES + length
    if set(one.long_tables) == {_LONG_OFFSETS, _LONG_LENGTHS}:
        tables = one.long_tables[_LONG_OFFSETS], one.long_tables[_LONG_LENGTHS]
        if any(element.length != 8 * frames for element in tables):
            raise _damaged("an Extended Offset Table of another length")
        offsets, lengths = (Table(frames, 8, False, element.position) for element in tables)
        return (
            Table(frames, 8, False, offsets.position, base=first),
            Table(frames, 8, False, lengths.position, base=ITEM_HEADER_BYTES),
        )
    if length == 4 * frames:
        at = _basic_offsets(one.header, start + ITEM_HEADER_BYTES, frames) + first
        ends = np.append(at[1:], _end_of_frame(one.header, int(at[-1])))
    elif length == 0:
        at, ends = _walk_frames(one.header, first, frames)
    else:
        raise _damaged("a Basic Offset Table of another length")
    if (ends <= at).any():
        raise _damaged("frames out of order")
    counts = (ends - at).astype("<u4")
    return (
        Table(frames, 8, False, inline=at.astype("<u8").tobytes()),
        Table(frames, 4, False, inline=counts.tobytes()),
    )


def _basic_offsets(header: HeaderReader, position: int, frames: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    step = 2**18
    parts = [header.read(position + at, min(step, 4 * frames - at)) for at in range(0, 4 * frames, step)]
    return np.frombuffer(b"".join(parts), "<u4").astype(np.int64)


def _walk_frames(
    header: HeaderReader, position: int, frames: int
) -> "tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]":
    """Start and end of each frame, one item each, by their headers."""
    if header.size_bytes > _MAX_WALK_BYTES:
        raise _NotInPlaceError
    at, ends = [], []
    for _ in range(frames):
        at.append(position)
        position = _end_of_frame(header, position)
        ends.append(position)
    tag, _ = struct.unpack("<II", header.read(position, ITEM_HEADER_BYTES))
    if tag != _swapped(_END_OF_SEQUENCE):
        # Frames of several items cannot be told apart without a table.
        raise _NotInPlaceError
    return np.array(at, np.int64), np.array(ends, np.int64)


def _end_of_frame(header: HeaderReader, position: int) -> int:
    tag, length = struct.unpack("<II", header.read(position, ITEM_HEADER_BYTES))
    end: int = position + ITEM_HEADER_BYTES + length
    if tag != _swapped(_ITEM) or end > header.size_bytes:
        raise _damaged("a frame that is no item of the object")
    return end


def _swapped(tag: int) -> int:
    """A tag as four little-endian bytes read as one number: group first, then element."""
    return (tag & 0xFFFF) << 16 | tag >> 16


def _damaged(what: str) -> SlideError:
    return SlideError(
        "slide has a damaged DICOM header",
        value=what,
        expected="headers that a scanner writes",
        remedy="copy the slide again from the scanner's archive, or take it out",
    )
