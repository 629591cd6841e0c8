"""One compressed tile to px. The size that a stream claims is checked before anything is decoded."""

import struct
from functools import lru_cache

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from histoscale.errors import SlideError
from histoscale.slides.layout import ITEM_HEADER_BYTES, Colour, Level

_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
_TRANSFORM: dict[Colour, bytes] = {"rgb": b"\x00", "ycbcr": b"\x01"}
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_SOF_BASELINE, _SOF_EXTENDED, _JFIF, _ADOBE_MARKER, _SCAN = 0xC0, 0xC1, 0xE0, 0xEE, 0xDA
_STANDALONE = {0x01, *range(0xD0, 0xD8)}
_MAX_SEGMENTS = 256

_J2K_START = b"\xff\x4f\xff\x51"
_J2K_SIZE = struct.Struct(">4xHHIIIIIIIIH9s")
_J2K_RGB = bytes((7, 1, 1)) * 3  # three components of 8 bits, none subsampled
_MAX_J2K_TILES = 256

_DICOM_ITEM = struct.Struct("<II")
_DICOM_ITEM_TAG = 0xE000FFFE


def decode_tile(data: memoryview, level: Level, out: NDArray[np.uint8]) -> None:
    """Decode one tile of a level.

    Args:
        data: The bytes of the tile, all of them.
        level: Its level.
        out: What is written, uint8 [tile_height, tile_width, 3], contiguous.

    Raises:
        SlideError: The bytes are not a tile of this level.
    """
    if level.framed:
        data = _frame(data)
    try:
        if level.codec == "jpeg":
            _decode_jpeg(data, level, out)
        elif level.codec == "jpeg2000":
            _check_jpeg2000(data, level)
            imagecodecs.jpeg2k_decode(bytes(data), out=out)
        else:
            _decode_plain(data, level, out)
    except (ValueError, RuntimeError):
        # Codecs raise these; their texts help nobody.
        raise _damaged(f"a {level.codec} tile that cannot be decoded") from None


def _frame(data: memoryview) -> memoryview:
    """The content of a DICOM item that is a whole frame."""
    if len(data) < ITEM_HEADER_BYTES:
        raise _damaged("a frame without a header")
    tag, length = _DICOM_ITEM.unpack_from(data)
    if tag != _DICOM_ITEM_TAG or ITEM_HEADER_BYTES + length != len(data):
        raise _damaged("a frame that is not one item")
    return data[ITEM_HEADER_BYTES:]


def _decode_jpeg(data: memoryview, level: Level, out: NDArray[np.uint8]) -> None:
    """Decode as OpenSlide does: colours as the container says, and every warning of libjpeg an error."""
    stream = b"".join([_jpeg_prefix(level.jpeg_tables, level.colour), *_jpeg_parts(data, level)])
    simplejpeg.decode_jpeg(stream, "RGB", buffer=out)


@lru_cache(maxsize=64)
def _jpeg_prefix(tables: bytes, colour: Colour) -> bytes:
    """What goes before a tile: the shared tables, and a marker that tells the decoder its colours."""
    if tables and not (tables.startswith(_JPEG_START) and tables.endswith(_JPEG_END)):
        raise _damaged("JPEG tables that are none")
    return _JPEG_START + tables[2:-2] + _ADOBE + _TRANSFORM[colour]


def _jpeg_parts(data: memoryview, level: Level) -> list[memoryview]:
    """The tile without its start and without markers that tell colours; refuses other sizes than the tile's."""
    if data[:2] != _JPEG_START:
        raise _damaged("a JPEG tile that holds no JPEG data")
    parts: list[memoryview] = []
    sized = False
    position = 2
    for _ in range(_MAX_SEGMENTS):
        if position + 4 > len(data) or data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker in _STANDALONE:
            position += 2
            continue
        end = position + 2 + (data[position + 2] << 8 | data[position + 3])
        if marker in (_SOF_BASELINE, _SOF_EXTENDED):
            size = struct.pack(">BHHB", 8, level.tile_height, level.tile_width, 3)
            if sized or data[position + 4 : position + 10] != size:
                break
            sized = True
        elif marker == _SCAN:
            if not sized:
                break
            return [*parts, data[position:]]
        if marker not in (_JFIF, _ADOBE_MARKER):
            parts.append(data[position:end])
        position = end
    raise _damaged("a JPEG tile of another size or kind")


def _check_jpeg2000(data: memoryview, level: Level) -> None:
    if len(data) < _J2K_SIZE.size or data[:4] != _J2K_START:
        raise _damaged("a JPEG 2000 tile that holds no JPEG 2000 data")
    _, _, width, height, x, y, part_width, part_height, part_x, part_y, n, components = _J2K_SIZE.unpack_from(data)
    if (width, height, x, y, n, components) != (level.tile_width, level.tile_height, 0, 0, 3, _J2K_RGB):
        raise _damaged("a JPEG 2000 tile of another size or kind")
    if part_x or part_y or min(part_width, part_height) < 1:
        raise _damaged("a JPEG 2000 tile with impossible parts")
    if -(-width // part_width) * -(-height // part_height) > _MAX_J2K_TILES:
        raise _damaged("a JPEG 2000 tile with too many parts")


def _decode_plain(data: memoryview, level: Level, out: NDArray[np.uint8]) -> None:
    if level.codec == "lzw":
        data = memoryview(imagecodecs.lzw_decode(bytes(data), out=out.nbytes))
    elif level.codec == "deflate":
        data = memoryview(imagecodecs.deflate_decode(bytes(data), out=out.nbytes))
    if len(data) < out.nbytes:
        raise _damaged(f"a {level.codec} tile that ends too early")
    px = np.frombuffer(data[: out.nbytes], np.uint8).reshape(out.shape)
    if level.predictor:
        np.cumsum(px, axis=1, dtype=np.uint8, out=out)
    else:
        out[...] = px


def _damaged(what: str) -> SlideError:
    return SlideError(
        "slide has damaged data",
        value=what,
        expected="tiles that can be decoded",
        remedy="copy the slide again from the scanner's archive, or take it out",
    )
