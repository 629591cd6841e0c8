"""Reads the headers of an object: few bounded ranges, whatever the bytes in them say."""

from histoscale.errors import SlideError
from histoscale.storage import ObjectInfo
from histoscale.storage.ranges import RangeReader, RangeRequest

_HEAD_BYTES = 64 * 2**10  # one request; most headers begin, and many end, in it
_BLOCK_BYTES = 16 * 2**10
_MAX_READ_BYTES = 2**20  # the largest single value of a header that is of use here
_MAX_TOTAL_BYTES = 32 * 2**20


class HeaderReader:
    """The bytes of one object, in blocks that are fetched once.

    Args:
        info: The object as it was listed.
        ranges: Where its bytes come from.
    """

    def __init__(self, info: ObjectInfo, ranges: RangeReader) -> None:
        self._info = info
        self._ranges = ranges
        self._blocks: dict[int, bytes] = {}
        self._total_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Length of the object."""
        return self._info.size_bytes

    def read(self, position: int, length: int) -> bytes:
        """Bytes `position` to `position + length`.

        Raises:
            SlideError: They lie outside of the object, or are more than any header needs.
            StorageError: They cannot be read.
        """
        end = position + length
        if position < 0 or end > self._info.size_bytes:
            raise SlideError(
                "slide is cut short, or its headers are damaged",
                value=f"a header at byte {position} to {end}",
                expected=f"an object of more than {self._info.size_bytes} bytes",
                remedy="copy the slide again from the scanner's archive, or take it out",
            )
        if length > _MAX_READ_BYTES:
            raise _too_large(length)
        blocks = range(position // _BLOCK_BYTES, -(-end // _BLOCK_BYTES))
        self._fetch([block for block in blocks if block not in self._blocks])
        joined = b"".join(self._blocks[block] for block in blocks)
        start = position - blocks.start * _BLOCK_BYTES
        return joined[start : start + length]

    def _fetch(self, blocks: list[int]) -> None:
        if not blocks:
            return
        if blocks[0] == 0:
            blocks = list(range(max(_HEAD_BYTES // _BLOCK_BYTES, blocks[-1] + 1)))
        start = blocks[0] * _BLOCK_BYTES
        end = min((blocks[-1] + 1) * _BLOCK_BYTES, self._info.size_bytes)
        self._total_bytes += end - start
        if self._total_bytes > _MAX_TOTAL_BYTES:
            raise _too_large(self._total_bytes)
        request = RangeRequest(self._info.key, start, end - start, self._info.etag)
        (data,) = self._ranges.fetch([request])
        for block in blocks:
            self._blocks[block] = data[block * _BLOCK_BYTES - start :][:_BLOCK_BYTES]


def _too_large(length: int) -> SlideError:
    return SlideError(
        "headers of the slide are too large",
        value=f"{length} bytes",
        expected=f"{_MAX_READ_BYTES} bytes for one value, {_MAX_TOTAL_BYTES} in all",
    )
