"""The slides that a reader has at hand: read in place by byte ranges where the format allows, else from a copy.

Names of slides stay inside: locations come from the protected part of the index, and every error that leaves here
says what is wrong without saying where.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import SlideError
from histoscale.slides.catalogue import Catalogue, Locations, slide_info
from histoscale.slides.layout import SlideLayout
from histoscale.slides.opening import entry_file
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.records import SlideLocation
from histoscale.slides.slide import Slide
from histoscale.slides.table_cache import TableCache
from histoscale.slides.tile_fetch import PieceCache
from histoscale.slides.tiled import Region, TiledSlide
from histoscale.storage import Store, is_remote, open_store
from histoscale.storage.cache import ROOM_WAIT_S, ObjectCache
from histoscale.storage.ranges import RangeReader, RangeStats, open_ranges
from histoscale.storage.store import ObjectChanged

_OPEN_SLIDES = 64  # a small archive stays open; of a large one, hardly any slide comes twice in a row
_DOWNLOADS_AT_ONCE = 2
_TABLES_BYTES = 32 * 2**20

Pixels: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Refusal:
    """A region that the content of its slide refuses; `whole_slide`: every other region too."""

    reason: str
    whole_slide: bool


Outcome: TypeAlias = Pixels | Refusal
"""uint8 [side, side, 3], or why there are no pixels."""

Pending: TypeAlias = Callable[[], list[Outcome]]
"""Waits for a visit that was begun; gives its regions in order."""


class SlidePool:
    """Reads regions of the slides of a catalogue.

    `begin` may be called by several threads; what it gives is waited for by one.

    Args:
        catalogue: The slides.
        locations: Where they lie.
        cache_folder: Node-local folder for copies of slides that cannot be read in place.
        cache_bytes: Disk that the copies of this node may take, which all its readers share.
        kept: Compressed tiles that were fetched on this node before, if they are kept.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        locations: Locations,
        cache_folder: Path,
        cache_bytes: int,
        kept: PieceCache | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._locations = locations
        self._tables = TableCache(_TABLES_BYTES)
        self._kept = kept
        self._ranges: dict[str, RangeReader] = {}
        self._tiled: OrderedDict[int, TiledSlide] = OrderedDict()
        self._copies = _Copies(cache_folder, cache_bytes)
        self._gone: dict[int, Refusal] = {}
        self._lock = threading.Lock()

    def begin(self, row: int, regions: Sequence[Region]) -> Pending:
        """Start to fetch regions of one slide; the result waits, decodes and resamples.

        What the content decides becomes a `Refusal`. A `StorageError` from the result is a fault that may pass.
        """
        with self._lock:
            if row in self._gone:
                return _refused(self._gone[row], regions)
            layout = self._catalogue.layout(row)
            if not layout:
                read = self._copies.begin(row, self._catalogue.slide_id(row), self._locations.location(row))
                return lambda: self._finish(row, regions, lambda: read(regions), lambda region: read([region])[0])
            slide = self._in_place(row, layout)
        pending = slide.begin(regions)
        return lambda: self._finish(row, regions, pending.result, lambda region: slide.begin([region]).result()[0])

    def stats(self) -> RangeStats:
        """What was fetched so far by byte ranges."""
        stats = [ranges.stats for ranges in self._ranges.values()]
        return RangeStats(*(sum(getattr(each, field.name) for each in stats) for field in fields(RangeStats)))

    def _finish(
        self,
        row: int,
        regions: Sequence[Region],
        read_all: Callable[[], Sequence[Pixels]],
        read_one: Callable[[Region], Pixels],
    ) -> list[Outcome]:
        try:
            return list(read_all())
        except (ObjectChanged, _CannotOpen) as error:
            refusal = self._gone[row] = Refusal(str(error.what), whole_slide=True)
            return [refusal] * len(regions)
        except SlideError:
            # One damaged tile fails the lot: each region is asked for alone, so that its own content decides.
            return [_one(read_one, region) for region in regions]

    def _in_place(self, row: int, layout: bytes) -> TiledSlide:
        if row not in self._tiled:
            location = self._locations.location(row)
            if location.root_uri not in self._ranges:
                self._ranges[location.root_uri] = open_ranges(location.root_uri)
            ranges = self._ranges[location.root_uri]
            decoded = SlideLayout.from_bytes(layout)
            info = slide_info(self._catalogue.rows[row], decoded)
            self._tiled[row] = TiledSlide(info, decoded, location.objects, ranges, self._tables, self._kept)
            while len(self._tiled) > _OPEN_SLIDES:
                self._tiled.popitem(last=False)
        self._tiled.move_to_end(row)
        return self._tiled[row]


def _refused(refusal: Refusal, regions: Sequence[Region]) -> Pending:
    return lambda: [refusal] * len(regions)


def _one(read: Callable[[Region], Pixels], region: Region) -> Outcome:
    try:
        return read(region)
    except SlideError as error:
        return Refusal(error.what, whole_slide=False)


class _CannotOpen(SlideError):
    """A copy that OpenSlide does not open: no region of it can be read."""


@dataclass(frozen=True)
class _Open:
    """An open slide and its file; `release` closes it."""

    slide: Slide
    file: Path
    release: ExitStack


class _Copies:
    """Slides that OpenSlide reads, on copies that all readers of the node share.

    A copy is leased for a visit and not for as long as its slide is open: no reader may keep the others from room.
    """

    def __init__(self, cache_folder: Path, cache_bytes: int) -> None:
        self._cache = ObjectCache(cache_folder, cache_bytes)
        self._stores: dict[str, Store] = {}
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._downloads = ThreadPoolExecutor(_DOWNLOADS_AT_ONCE, thread_name_prefix="slide-copy")
        self._reading = threading.Lock()  # an OpenSlide handle is replaced after a failed read

    def begin(self, row: int, slide_id: str, location: SlideLocation) -> Callable[[Sequence[Region]], list[Pixels]]:
        """Start the copy of a slide, where it is not there yet; gives what reads regions of it."""
        uri = location.root_uri
        if uri not in self._stores:
            self._stores[uri] = open_store(uri, private=True)
        store = self._stores[uri]
        # What fails ahead of time fails again, or not, when the visit asks for it.
        ahead = self._downloads.submit(self._cache.fetch, store, location.objects, slide_id) if is_remote(uri) else None

        def read(regions: Sequence[Region]) -> list[Pixels]:
            if ahead is not None:
                ahead.cancel()
            with (
                self._cache.lease(store, location.objects, slide_id, wait_s=ROOM_WAIT_S) as folder,
                self._reading,
            ):
                slide = self._slide(row, location, folder)
                return [slide.read(region.x_px0, region.y_px0, region.side_px, region.mpp) for region in regions]

        return read

    def _slide(self, row: int, location: SlideLocation, folder: Path) -> Slide:
        """The open slide of a leased copy."""
        for other in [other for other, held in self._open.items() if not held.file.exists()]:
            self._open.pop(other).release.close()  # its copy was evicted; an open file would keep the disk full
        if row not in self._open:
            self._open[row] = _open(location, folder)
            while len(self._open) > _OPEN_SLIDES:
                self._open.popitem(last=False)[1].release.close()
        self._open.move_to_end(row)
        return self._open[row].slide


def _open(location: SlideLocation, folder: Path) -> _Open:
    """Open a slide on a copy, or on links where its objects are files of this machine."""
    with ExitStack() as stack:
        file = stack.enter_context(entry_file(location, folder))
        try:
            slide = open_slide(file, mpp=location.mpp_override)
        except SlideError as error:
            raise _CannotOpen(error.what, value=error.value, expected=error.expected) from None
        except OSError as error:
            raise _CannotOpen("slide cannot be read", value=error.strerror) from None  # the cause holds a name
        stack.callback(slide.close)
        return _Open(slide, file, stack.pop_all())
