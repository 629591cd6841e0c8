"""Fetches the tiles of a visit: first the pages of the offset tables that are not at hand, then all tiles at once."""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from histoscale.errors import SlideError, StorageError
from histoscale.slides.layout import Level, SlideLayout
from histoscale.slides.table_cache import PAGE_BYTES, Page, TableCache, page_requests, pages_of, table_numbers
from histoscale.storage import ObjectInfo
from histoscale.storage.ranges import RangeReader, RangeRequest

_MAX_GAP_BYTES = 4096  # bytes between two tiles that cost less than a request of their own
_MAX_REQUEST_BYTES = 8 * 2**20
_MAX_TILE_BYTES = 64 * 2**20
_TILE_OVERHEAD_BYTES = 64 * 2**10

Tile = tuple[int, int, int]
"""Level, row and column."""

TileBytes = dict[Tile, memoryview | None]
"""The bytes of each tile; None: the file has none, and the place is white."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring tiles of one row."""

    level: int
    row: int
    column: int
    count: int


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the bytes of a tile are in the answers to a list of requests."""

    tile: Tile
    request: int
    start: int
    length: int


class _Span(NamedTuple):
    """The bytes of a tile; sorts by where they lie."""

    object_index: int
    start: int
    length: int
    tile: Tile


class PieceCache(Protocol):
    """Where fetched tiles may be kept for whoever reads them next; `storage.disk_cache.DiskCache` is one."""

    def get(self, names: Sequence[str]) -> dict[str, bytes]:
        """Those of the named pieces that are there."""

    def put(self, pieces: Mapping[str, bytes]) -> None:
        """Keep pieces."""


class TileSource:
    """The tiles of one slide.

    Args:
        layout: Where they lie.
        objects: The slide's objects, in the order in which the layout counts them.
        ranges: Where bytes come from.
        tables: Pages of the offset tables.
        kept: Tiles that were fetched before, if they are kept.
    """

    def __init__(
        self,
        layout: SlideLayout,
        objects: Sequence[ObjectInfo],
        ranges: RangeReader,
        tables: TableCache,
        kept: PieceCache | None = None,
    ) -> None:
        self._layout = layout
        self._objects = list(objects)
        self._ranges = ranges
        self._tables = tables
        self._kept = kept

    def fetch(self, tiles: Collection[Tile]) -> "Future[TileBytes]":
        """Start to fetch tiles, each once; returns at once.

        The future holds a SlideError where a tile lies where none can, a StorageError where the bytes cannot be read.
        """
        done: Future[TileBytes] = Future()
        runs = _runs(tiles)
        pages: dict[Page, bytes] = {}
        missing: set[Page] = set()
        for run in runs:
            level = self._layout.levels[run.level]
            first = run.row * level.tiles_across + run.column
            for table in (level.offsets, level.byte_counts):
                for page in pages_of(table, first, run.count):
                    held = self._tables.get(self._objects[level.object_index], page)
                    if held is None:
                        missing.add((level.object_index, page))
                    else:
                        pages[level.object_index, page] = held
        wanted = page_requests(self._objects, missing)

        def with_pages(answers: list[bytes]) -> None:
            for (request, brought), data in zip(wanted, answers, strict=True):
                for object_index, page in brought:
                    at = page * PAGE_BYTES - request.start
                    pages[object_index, page] = data[at : at + PAGE_BYTES]
                    self._tables.put(self._objects[object_index], page, pages[object_index, page])
            self._fetch_tiles(runs, pages, done)

        if wanted:
            self._then([request for request, _ in wanted], with_pages, done)
        else:
            _carry(lambda: with_pages([]), done)
        return done

    def _fetch_tiles(self, runs: list[_Run], pages: Mapping[Page, bytes], done: "Future[TileBytes]") -> None:
        found: TileBytes = {}
        spans: list[_Span] = []
        for run in runs:
            for tile, start, length in self._locate(run, pages):
                if length:
                    spans.append(_Span(self._layout.levels[run.level].object_index, start, length, tile))
                else:
                    found[tile] = None
        left = self._take_kept(spans, found)
        requests, places = _coalesced(self._objects, sorted(left))

        def with_tiles(answers: list[bytes]) -> None:
            views = [memoryview(data) for data in answers]
            for place in places:
                found[place.tile] = views[place.request][place.start : place.start + place.length]
            if self._kept is not None:
                self._kept.put({self._name(span): bytes(found[span.tile] or b"") for span in left})
            done.set_result(found)

        if requests:
            self._then(requests, with_tiles, done)
        else:
            done.set_result(found)

    def _take_kept(self, spans: list[_Span], found: TileBytes) -> list[_Span]:
        """Take what is kept; gives what is left to fetch."""
        if self._kept is None:
            return spans
        kept = self._kept.get([self._name(span) for span in spans])
        left = []
        for span in spans:
            data = kept.get(self._name(span))
            if data is None:
                left.append(span)
            else:
                found[span.tile] = memoryview(data)
        return left

    def _name(self, span: _Span) -> str:
        info = self._objects[span.object_index]
        return f"{info.etag}:{info.key}:{span.start}:{span.length}"

    def _locate(self, run: _Run, pages: Mapping[Page, bytes]) -> list[tuple[Tile, int, int]]:
        """Each tile of a run with its first byte and its length; 0: the file has none."""
        level = self._layout.levels[run.level]
        first = run.row * level.tiles_across + run.column
        starts = table_numbers(level.offsets, level.object_index, first, run.count, pages).tolist()
        lengths = table_numbers(level.byte_counts, level.object_index, first, run.count, pages).tolist()
        size_bytes = self._objects[level.object_index].size_bytes
        most = _most_bytes(level)
        for start, length in zip(starts, lengths, strict=True):
            if not 0 <= length <= most or start < 0 or start + length > size_bytes:
                raise SlideError(
                    "slide has a damaged table of tiles",
                    value=f"a tile of {length} bytes at byte {start}",
                    expected=f"at most {most} bytes within the object's {size_bytes}",
                    remedy="copy the slide again from the scanner's archive, or take it out",
                )
            if length == 0 and self._layout.vendor != "generic-tiff":
                raise SlideError("slide has a missing tile", expected="bytes for every tile")
        tiles = [(run.level, run.row, run.column + i) for i in range(run.count)]
        return list(zip(tiles, starts, lengths, strict=True))

    def _then(
        self, requests: list[RangeRequest], step: Callable[[list[bytes]], None], done: "Future[TileBytes]"
    ) -> None:
        """Fetch, and take the step when the bytes are there; whatever goes wrong ends up in `done`."""

        def arrived(fetched: "Future[list[bytes]]") -> None:
            _carry(lambda: step(fetched.result()), done)

        _carry(lambda: self._ranges.submit(requests).add_done_callback(arrived), done)


def _carry(step: Callable[[], None], done: "Future[TileBytes]") -> None:
    """Take a step of a fetch; an error goes to who waits, since the thread of a callback has nobody to tell."""
    try:
        step()
    except CancelledError:
        done.set_exception(StorageError("the reader of byte ranges was closed", remedy="open it again"))
    except Exception as error:  # noqa: BLE001 - of whatever kind: who waits would wait for ever
        done.set_exception(error)


def _most_bytes(level: Level) -> int:
    """The most bytes that a compressed tile can sensibly have."""
    raw_bytes = 3 * level.tile_width * level.tile_height
    return min(_MAX_TILE_BYTES, 2 * raw_bytes + _TILE_OVERHEAD_BYTES)


def _runs(tiles: Collection[Tile]) -> list[_Run]:
    """Tiles as runs of neighbours, from left to right and top to bottom."""
    runs: list[_Run] = []
    begun: Tile | None = None
    count = 0
    for tile in sorted(tiles):
        if begun is not None and tile == (begun[0], begun[1], begun[2] + count):
            count += 1
            continue
        if begun is not None:
            runs.append(_Run(*begun, count))
        begun, count = tile, 1
    if begun is not None:
        runs.append(_Run(*begun, count))
    return runs


def _coalesced(objects: Sequence[ObjectInfo], spans: Sequence[_Span]) -> tuple[list[RangeRequest], list[_Place]]:
    """Few requests for many sorted spans, and where each tile is in them; tiles may share bytes."""
    bounds: list[list[int]] = []  # object, start, end
    places = []
    for index, start, length, tile in spans:
        end = start + length
        last = bounds[-1] if bounds else None
        if (
            last is not None
            and last[0] == index
            and start - last[2] <= _MAX_GAP_BYTES
            and max(end, last[2]) - last[1] <= _MAX_REQUEST_BYTES
        ):
            last[2] = max(end, last[2])
        else:
            bounds.append([index, start, end])
        places.append(_Place(tile, len(bounds) - 1, start - bounds[-1][1], length))
    requests = [RangeRequest(objects[i].key, start, end - start, objects[i].etag) for i, start, end in bounds]
    return requests, places
