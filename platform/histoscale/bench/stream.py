"""From the S3 server to uint8 tiles in a training worker: what it costs, against OpenSlide on a local copy."""

import multiprocessing
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histoscale.bench.archive import Archive, large_archive
from histoscale.bench.figure import Figure
from histoscale.bench.ray_local import CpuMeter, local_ray
from histoscale.sampling.plan import ChapterPlan
from histoscale.slides.catalogue import Catalogue, open_catalogue, slide_info
from histoscale.slides.layout import SlideLayout
from histoscale.slides.resample import region_windows
from histoscale.stream.chapters import Chapter
from histoscale.stream.feed import RankFeed
from histoscale.stream.reader import Reader, ReaderSpec
from histoscale.stream.windows import FeedSpec, RankShare, start_feed

_WARM_STEPS = 8
_STEPS = 40  # of 64 tiles
_WAIT_STEPS = 60
_MEMORY_TILES = 20_000
_STEP_OVER_READING = 2.5  # a training step takes this many times what one reader needs for its tiles


def stream() -> Iterator[Figure]:
    """`stream.` and: `throughput_ratio`, `bytes_ratio`, `requests_ratio`, `data_wait_share`, `reader_peak_bytes`."""
    with large_archive() as archive:
        yield from _fetched(archive)
        yield _peak_memory(archive)
        with local_ray(cpus=4):
            rate, cpu_ms, tiles = _through_the_feed(archive)
            openslide_ms, difference = _openslide_ms(archive)
            details = {
                "cpu_ms_per_tile": cpu_ms,
                "openslide_cpu_ms_per_tile": openslide_ms,
                "tiles": tiles,
                "tiles_per_s": rate,
                "largest_mean_difference_of_a_tile": difference,
            }
            yield Figure("stream.throughput_ratio", openslide_ms / cpu_ms, "ratio", 1.0, details)
            yield _wait_share(archive, rate)


def _peak_memory(archive: Archive) -> Figure:
    """Resident memory of a reader's process at its most, over many tiles of all magnifications."""
    context = multiprocessing.get_context("spawn")
    received, sent = context.Pipe(duplex=False)
    process = context.Process(target=_read_many, args=(archive.reader(), sent))
    process.start()
    peak_bytes, tiles = received.recv()
    process.join()
    return Figure("stream.reader_peak_bytes", peak_bytes, "bytes", details={"tiles": tiles})


def _read_many(spec: ReaderSpec, sent: Connection) -> None:
    reader, tiles = Reader(spec), 0
    for number in range(_MEMORY_TILES // spec.plan.tiles_per_step // spec.plan.chapter_steps + 1):
        for replica in range(spec.plan.replicas):
            chapter = Chapter(number, replica, 4 * number, 4 * number + 3)
            tiles += reader.read(chapter, replica).sample_ids.size
    sent.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, tiles))


def _through_the_feed(archive: Archive) -> tuple[float, float, int]:
    """Tiles per second and CPU milliseconds per tile of readers, coordinator and this worker; how many tiles."""
    feed = _rank_feed(archive.reader(), _WARM_STEPS + _STEPS, "throughput")
    for step in range(_WARM_STEPS):
        feed.micro_batches(step)
    meter, start_s, tiles = CpuMeter(), time.monotonic(), 0
    for step in range(_WARM_STEPS, _WARM_STEPS + _STEPS):
        for batch in feed.micro_batches(step):
            tiles += len(batch.tiles) if batch is not None else 0
    cpu_s, seconds = meter.seconds(), time.monotonic() - start_s
    feed.close()
    return tiles / seconds, cpu_s / tiles * 1000, tiles


def _wait_share(archive: Archive, tiles_per_s: float) -> Figure:
    """Share of step time that a worker waits, whose step takes longer than reading does."""
    spec = archive.reader()
    step_s = spec.plan.tiles_per_step / tiles_per_s * _STEP_OVER_READING
    feed = _rank_feed(spec, _WARM_STEPS + _WAIT_STEPS, "wait")
    waited_s = 0.0
    for step in range(_WARM_STEPS + _WAIT_STEPS):
        feed.micro_batches(step)
        if step == _WARM_STEPS:
            start_s = time.monotonic()
        waited_s += feed.wait_s if step > _WARM_STEPS else 0.0
        time.sleep(step_s)
    feed.close()
    details = {"step_s": step_s, "steps": _WAIT_STEPS, "waited_s": waited_s}
    return Figure("stream.data_wait_share", waited_s / (time.monotonic() - start_s), "share", details=details)


def _rank_feed(spec: ReaderSpec, steps: int, attempt: str) -> RankFeed:
    feed = FeedSpec(steps, spec, (1, 1))
    return RankFeed(feed, RankShare(start_feed(feed), attempt, 0, 1), 0)


def _openslide_ms(archive: Archive) -> tuple[float, float]:
    """CPU milliseconds per tile of a bare OpenSlide loop with one handle over the same tiles, and how they differ.

    The tiles of a slide are read in the order in which our readers read them, slide after slide.
    """
    spec = archive.reader()
    catalogue = open_catalogue(spec.index_uri, spec.snapshot_id)
    plan = spec.open_plan(catalogue)
    reader = Reader(spec)
    planned = [
        (chapter, plan.chapter(replica, chapter.first_step, chapter.last_step), replica)
        for chapter in (Chapter(n, None, 4 * n, 4 * n + 3) for n in range(2, 2 + _STEPS // 4))
        for replica in range(spec.plan.replicas)
    ]
    by_slide: dict[int, list[tuple[float, float, float]]] = {}
    for _, tiles, _ in planned:
        for row, *place in _tiles_of(tiles):
            by_slide.setdefault(row, []).append((place[0], place[1], place[2]))
    cpu_s, count = 0.0, 0
    for row, places in by_slide.items():
        handle = openslide.OpenSlide(archive.paths[catalogue.slide_id(row)])
        slide_mpp = float(catalogue.rows[row]["mpp"])
        places.sort()
        start_s = time.process_time()
        for mpp, y_px0, x_px0 in places:
            _read(handle, slide_mpp, x_px0, y_px0, mpp)
        cpu_s += time.process_time() - start_s
        count += len(places)
        handle.close()
    return cpu_s / count * 1000, _difference(archive, catalogue, reader, planned[0])


def _tiles_of(plan: ChapterPlan) -> Iterator[tuple[int, float, float, float]]:
    columns = (plan.rows, plan.mpp, plan.y_px0, plan.x_px0)
    return zip(*(column.reshape(-1).tolist() for column in columns), strict=True)


def _read(handle: openslide.OpenSlide, slide_mpp: float, x_px0: float, y_px0: float, mpp: float) -> NDArray[np.uint8]:
    """What a careful user of OpenSlide writes: the nearest finer level, snapped to its px, averaged to the scale."""
    level = handle.get_best_level_for_downsample(mpp / slide_mpp * 1.001)
    downsample = round(handle.level_downsamples[level])
    side = round(392 * mpp / slide_mpp / downsample)
    corner = (round(x_px0 / downsample) * downsample, round(y_px0 / downsample) * downsample)
    image = handle.read_region(corner, level, (side, side))
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    factor = side // 392
    return np.asarray(canvas if factor == 1 else canvas.reduce(factor))


def _difference(
    archive: Archive, catalogue: Catalogue, reader: Reader, planned: tuple[Chapter, ChapterPlan, int]
) -> float:
    """Largest mean absolute difference of a tile between our reader and the baseline, over one chapter."""
    chapter, plan, replica = planned
    ours = reader.read(replace(chapter, replica=replica), replica).tiles.reshape(-1, 392, 392, 3)
    largest = 0.0
    for tile, (row, mpp, y_px0, x_px0) in zip(ours, _tiles_of(plan), strict=True):
        handle = openslide.OpenSlide(archive.paths[catalogue.slide_id(row)])
        other = _read(handle, float(catalogue.rows[row]["mpp"]), x_px0, y_px0, mpp)
        largest = max(largest, float(np.abs(tile.astype(int) - other).mean()))
        handle.close()
    return largest


@dataclass
class _Floor:
    """The least that the tiles of a plan need: bytes of the TIFF tiles touched, runs of them in their rows."""

    bytes: int = 0
    requests: int = 0


def _fetched(archive: Archive) -> Iterator[Figure]:
    """Bytes and requests of a reader, tables of offsets and masks included, against the floor of the same visits."""
    spec = archive.reader()
    reader = Reader(spec)
    catalogue = open_catalogue(spec.index_uri, spec.snapshot_id)
    plan, floor, tiles = spec.open_plan(catalogue), _Floor(), 0
    counts = {row: _byte_counts(archive, catalogue, row) for row in range(len(catalogue))}
    for number in range(_STEPS // 4):
        for replica in range(spec.plan.replicas):
            chapter = Chapter(number, replica, 4 * number, 4 * number + 3)
            reader.read(chapter, replica)
            planned = plan.chapter(replica, chapter.first_step, chapter.last_step)
            tiles += planned.rows.size
            _add_floor(floor, catalogue, planned, counts)
    stats = reader.slides.stats()
    details = {"tiles": tiles, "bytes": stats.bytes, "floor_bytes": floor.bytes, "bytes_per_tile": stats.bytes / tiles}
    yield Figure("stream.bytes_ratio", stats.bytes / floor.bytes, "ratio", 1.0, details)
    details = {"requests_per_tile": stats.requests / tiles, "floor_per_tile": floor.requests / tiles}
    yield Figure("stream.requests_ratio", stats.requests / floor.requests, "ratio", 1.0, details)


def _byte_counts(archive: Archive, catalogue: Catalogue, row: int) -> list[tuple[int, ...]]:
    """Bytes of each tile of each level, read by an independent library."""
    with tifffile.TiffFile(archive.paths[catalogue.slide_id(row)]) as file:
        return [page.aspage().databytecounts for page in file.pages if page.aspage().is_tiled]


def _add_floor(
    floor: _Floor, catalogue: Catalogue, plan: ChapterPlan, counts: dict[int, list[tuple[int, ...]]]
) -> None:
    visits: dict[tuple[int, float], list[tuple[float, float]]] = {}
    for row, mpp, y_px0, x_px0 in _tiles_of(plan):
        visits.setdefault((row, mpp), []).append((x_px0, y_px0))
    for (row, mpp), corners in visits.items():
        layout = SlideLayout.from_bytes(catalogue.layout(row))
        info = slide_info(catalogue.rows[row], layout)
        touched: set[tuple[int, int, int]] = set()
        for x_px0, y_px0 in corners:
            for window in region_windows(info, x_px0, y_px0, 392, mpp):
                level = layout.levels[window.level]
                right = min(window.left + window.width, level.width) - 1
                bottom = min(window.top + window.height, level.height) - 1
                for tile_row in range(max(0, window.top) // level.tile_height, bottom // level.tile_height + 1):
                    for column in range(max(0, window.left) // level.tile_width, right // level.tile_width + 1):
                        touched.add((window.level, tile_row, column))
        for number, tile_row, column in touched:
            floor.bytes += counts[row][number][tile_row * layout.levels[number].tiles_across + column]
        floor.requests += sum((number, tile_row, column - 1) not in touched for number, tile_row, column in touched)
