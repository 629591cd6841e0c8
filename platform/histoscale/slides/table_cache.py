"""The tables of tile offsets, by pages: what a process has read of them, and the requests for the rest."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from histoscale.slides.layout import Table
from histoscale.storage import ObjectInfo
from histoscale.storage.ranges import RangeRequest

PAGE_BYTES = 4096
_MAX_REQUEST_PAGES = 256

Page = tuple[int, int]
"""Which object of the slide, and which page of it."""


class TableCache:
    """The pages that were used last, for all slides of a process; threads share it.

    Args:
        max_bytes: What the pages may take.
    """

    def __init__(self, max_bytes: int = 64 * 2**20) -> None:
        self._max_pages = max(1, max_bytes // PAGE_BYTES)
        self._pages: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, info: ObjectInfo, page: int) -> bytes | None:
        """A page of this version of an object, if it is held."""
        key = (info.etag, info.key, page)
        with self._lock:
            data = self._pages.get(key)
            if data is not None:
                self._pages.move_to_end(key)
            return data

    def put(self, info: ObjectInfo, page: int, data: bytes) -> None:
        """Hold a page, instead of the one that was used least recently where there are too many."""
        with self._lock:
            self._pages[info.etag, info.key, page] = data
            if len(self._pages) > self._max_pages:
                self._pages.popitem(last=False)


def pages_of(table: Table, first: int, count: int) -> range:
    """The pages of an object that hold `count` numbers of a table from `first` on; none where they are inline."""
    if table.inline:
        return range(0)
    start = table.position + first * table.item_bytes
    return range(start // PAGE_BYTES, -(-(start + count * table.item_bytes) // PAGE_BYTES))


def page_requests(objects: list[ObjectInfo], pages: Iterable[Page]) -> list[tuple[RangeRequest, list[Page]]]:
    """Requests for pages, neighbours in one, each with the pages that it brings."""
    runs: list[list[Page]] = []
    for page in sorted(pages):
        last = runs[-1] if runs else []
        if last and page == (last[-1][0], last[-1][1] + 1) and len(last) < _MAX_REQUEST_PAGES:
            last.append(page)
        else:
            runs.append([page])
    requests = []
    for run in runs:
        info = objects[run[0][0]]
        start = run[0][1] * PAGE_BYTES
        end = min((run[-1][1] + 1) * PAGE_BYTES, info.size_bytes)
        requests.append((RangeRequest(info.key, start, end - start, info.etag), run))
    return requests


def table_numbers(
    table: Table, object_index: int, first: int, count: int, pages: Mapping[Page, bytes]
) -> NDArray[np.int64]:
    """`count` numbers of a table from `first` on, int64.

    Args:
        table: The table.
        object_index: The object that holds it.
        first: Index of the first number.
        count: How many.
        pages: All the pages of `pages_of`.
    """
    if table.inline:
        data, at = table.inline, first * table.item_bytes
    else:
        span = pages_of(table, first, count)
        data = b"".join([pages[object_index, page] for page in span])
        at = table.position + first * table.item_bytes - span.start * PAGE_BYTES
    # Numbers beyond the signed range become negative, and are refused with all positions that no object has.
    return np.frombuffer(data, table.dtype, count, at).astype(np.int64) + table.base
