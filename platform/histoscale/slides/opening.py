"""Opens a slide where it lies: by byte ranges where its format allows, else through OpenSlide on a copy."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pydicom

from histoscale.errors import SlideError
from histoscale.slides.locate import DICOM_SUFFIX, MIRAX_SUFFIX, LocatedSlide, is_set
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.records import SlideLocation
from histoscale.slides.slide import Slide
from histoscale.slides.table_cache import TableCache
from histoscale.slides.tiled import open_tiled
from histoscale.storage import open_store
from histoscale.storage.cache import ROOM_WAIT_S, ObjectCache, local_name
from histoscale.storage.ranges import RangeReader


@dataclass(frozen=True)
class Opened:
    """An open slide, and where its tiles lie: empty where it is read from a copy."""

    slide: Slide
    layout: bytes = field(repr=False)


@contextlib.contextmanager
def open_located(
    location: SlideLocation, ranges: RangeReader, tables: TableCache, copies: Path, copies_bytes: int
) -> Iterator[Opened]:
    """Open a slide for as long as the block runs.

    Args:
        location: Where it lies.
        ranges: Bytes of the objects at the location's root.
        tables: Pages of offset tables.
        copies: Node-local folder for copies, which goes when the last reader of the node leaves it.
        copies_bytes: Disk of the node for copies.

    Raises:
        SlideError: The slide is damaged, of an unknown format or of no known scale.
        StorageError: Its objects cannot be read, or are others by now.
    """
    tiled = open_tiled(location.objects, ranges, tables, mpp=location.mpp_override)
    if tiled is not None:
        with contextlib.closing(tiled):
            yield Opened(tiled, tiled.layout.to_bytes())
        return
    store = open_store(location.root_uri, private=True)
    # Used for one slide at a time, so that copies go as often as no reader is at one: Ray ends its actors without a
    # chance to clean up.
    with (
        contextlib.closing(ObjectCache(copies, copies_bytes)) as cache,
        cache.lease(store, location.objects, "slide", wait_s=ROOM_WAIT_S) as folder,
        entry_file(location, folder) as file,
    ):
        if file.suffix.lower() == DICOM_SUFFIX:
            _check_one_series([folder / local_name(n, info.key) for n, info in enumerate(location.objects)])
        with contextlib.closing(open_slide(file, mpp=location.mpp_override)) as slide:
            yield Opened(slide, b"")


@contextlib.contextmanager
def entry_file(location: SlideLocation, folder: Path) -> Iterator[Path]:
    """The file that opens a slide of which `folder` holds the cached objects.

    The files of MIRAX and Hamamatsu sets find each other by their names, which copies have lost: these are links in a
    folder of the owner's, which goes with the block.
    """
    objects = location.objects
    first = folder / local_name(0, objects[0].key)
    if not is_set(LocatedSlide("", objects)):
        yield first
        return
    with tempfile.TemporaryDirectory(prefix="set-", dir=folder) as name:
        entry = Path(name) / f"slide{first.suffix}"
        members = Path(name) / "slide" if first.suffix.lower() == MIRAX_SUFFIX else Path(name)
        members.mkdir(exist_ok=True)
        entry.symlink_to(first)
        for number, info in enumerate(objects[1:], 1):
            (members / PurePosixPath(info.key).name).symlink_to(folder / local_name(number, info.key))
        yield entry


def _check_one_series(files: Sequence[Path]) -> None:
    series = set()
    for file in files:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
            series.add(str(header.SeriesInstanceUID))
        except (pydicom.errors.InvalidDicomError, AttributeError, OSError, ValueError):
            # The cause names the file, so it goes no further.
            raise SlideError("a file of its DICOM folder is not DICOM or names no series") from None
    if len(series) > 1:
        raise SlideError(
            f"its DICOM folder holds {len(series)} series",
            expected="one series per folder",
            remedy="put each series into a folder of its own",
        )
