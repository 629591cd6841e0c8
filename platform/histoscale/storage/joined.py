"""Parts of memory as one file that can be read, without a copy of the whole."""

import io
from collections.abc import Sequence
from itertools import accumulate


def joined(parts: Sequence[memoryview]) -> io.BufferedReader:
    """A file of the parts end to end."""
    return io.BufferedReader(_Joined(parts))


class _Joined(io.RawIOBase):
    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._parts = [part.cast("B") for part in parts if part.nbytes]
        self._stops = list(accumulate(len(part) for part in self._parts))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        size = self._stops[-1] if self._stops else 0
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Bytes up to the end of the part, which may be fewer than there is room for."""
        target = memoryview(buffer).cast("B")
        for part, stop in zip(self._parts, self._stops, strict=True):
            if self._position < stop:
                start = self._position - (stop - len(part))
                piece = part[start : start + len(target)]
                target[: len(piece)] = piece
                self._position += len(piece)
                return len(piece)
        return 0
