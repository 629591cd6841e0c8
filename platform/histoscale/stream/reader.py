"""Reads chapters: an actor of Ray Data that turns one row of the plan into one block of tiles.

Names of slides stay inside this actor: it takes them from the protected part of the index, and every error that
leaves it names a slide by its id.
"""

from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from histoscale.errors import SlideError, StorageError
from histoscale.sampling.plan import MicroBatchPlan, Plan
from histoscale.slides.index import SlideLocation, read_locations
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.slide import Slide
from histoscale.storage import is_remote, open_store
from histoscale.storage.cache import ObjectCache, local_name
from histoscale.stream.chapters import Chapter

_OPEN_SLIDES = 64  # a small archive stays open; of a large one, hardly any slide comes twice in a row


@dataclass(frozen=True)
class ReaderSpec:
    """What every reader needs beside the plan.

    Attributes:
        index_uri: The slide index, whose protected part says where the slides lie.
        cache_folder: A node-local folder for copies of slides that lie in a bucket.
        cache_bytes: Disk that one reader's copies may take.
    """

    index_uri: str
    cache_folder: Path
    cache_bytes: int


@dataclass(frozen=True)
class _Held:
    """An open slide; `release` closes it and gives its copy up."""

    slide: Slide
    copied_bytes: int
    release: ExitStack


class OpenSlides:
    """The slides that a reader has open, the least recently used closed first.

    Args:
        spec: Where the slides are.
    """

    def __init__(self, spec: ReaderSpec) -> None:
        self._locations = read_locations(open_store(spec.index_uri, private=True))
        self._cache = ObjectCache(spec.cache_folder, spec.cache_bytes)
        self._cache_bytes = spec.cache_bytes
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def read(self, slide_id: str, x_px0: float, y_px0: float, side_px: int, mpp: float) -> NDArray[np.uint8]:
        """One region, uint8 [side_px, side_px, 3].

        Raises:
            SlideError: The slide cannot be opened or read; names it by its id.
            StorageError: Its objects cannot be fetched; likewise.
        """
        try:
            return self._slide(slide_id).read(x_px0, y_px0, side_px, mpp)
        except (SlideError, StorageError) as error:
            raise type(error)(
                f"slide {slide_id}: {error.what}", value=error.value, expected=error.expected, remedy=error.remedy
            ) from None
        except OSError as error:
            # The cause holds a file name.
            raise SlideError(f"slide {slide_id} cannot be read", value=error.strerror) from None

    def _slide(self, slide_id: str) -> Slide:
        if slide_id not in self._held:
            location = self._locations.get(slide_id)
            if location is None:
                raise SlideError("not in the index", remedy="resume with the index that the run began with")
            self._held[slide_id] = self._open(slide_id, location)
        self._held.move_to_end(slide_id)
        return self._held[slide_id].slide

    def _open(self, slide_id: str, location: SlideLocation) -> _Held:
        """Open a slide on a copy, or on a link where its objects are files of this machine."""
        remote = is_remote(location.root_uri)
        copied_bytes = sum(info.size_bytes for info in location.objects) if remote else 0
        self._make_room(copied_bytes)
        store = open_store(location.root_uri, private=True)
        with ExitStack() as stack:
            folder = stack.enter_context(self._cache.lease(store, location.objects, slide_id))
            slide = open_slide(folder / local_name(0, location.objects[0].key), mpp=location.mpp_override)
            stack.callback(slide.close)
            return _Held(slide, copied_bytes, stack.pop_all())

    def _make_room(self, copied_bytes: int) -> None:
        # The cache cannot evict the copy of an open slide.
        used_bytes = sum(held.copied_bytes for held in self._held.values())
        while self._held and (len(self._held) >= _OPEN_SLIDES or used_bytes + copied_bytes > self._cache_bytes):
            _, oldest = self._held.popitem(last=False)
            oldest.release.close()
            used_bytes -= oldest.copied_bytes


class Reader:
    """The actor of `map_batches`: one row of the plan in, one block out.

    Args:
        plan: The plan of the run, in Ray's object store.
        spec: Where the slides are.
    """

    def __init__(self, plan: "ray.ObjectRef[Plan]", spec: ReaderSpec) -> None:
        self._plan: Plan = ray.get(plan)
        self._spec = spec

    @cached_property
    def _slides(self) -> OpenSlides:
        # Not in __init__: there, an error would reach the rank as the death of an actor, without its type.
        return OpenSlides(self._spec)

    def __call__(self, row: pa.Table) -> pa.Table:
        """Read one chapter; padding becomes a block without tiles.

        Raises:
            SlideError: A slide cannot be opened or read.
            StorageError: The objects of a slide cannot be fetched.
            SlideIndexError: The index cannot be read.
        """
        chapter = Chapter.from_row(row)
        if chapter.replica is None:
            return chapter.to_block(np.empty(0, np.int64), np.empty(0, np.uint8))
        spec = self._plan.spec
        planned = [self._plan.micro_batch(step, chapter.replica) for step in chapter.steps]
        side_px = spec.region_px
        tiles = np.empty((len(planned), spec.tiles_per_micro_batch, side_px, side_px, 3), np.uint8)
        for turn, i in _by_slide(planned):
            m = planned[turn]
            slide_id = self._plan.slide_ids[m.slides[i]]
            tiles[turn, i] = self._slides.read(slide_id, float(m.x_px0[i]), float(m.y_px0[i]), side_px, float(m.mpp[i]))
        return chapter.to_block(np.stack([m.sample_ids for m in planned]), tiles)


def _by_slide(planned: list[MicroBatchPlan]) -> list[tuple[int, int]]:
    """(step of the chapter, position) of all tiles, those of one slide and scale together and from top to bottom."""
    order = [
        (int(m.slides[i]), float(m.mpp[i]), float(m.y_px0[i]), float(m.x_px0[i]), turn, i)
        for turn, m in enumerate(planned)
        for i in range(len(m.slides))
    ]
    return [entry[-2:] for entry in sorted(order)]
