"""The feed through Ray: each rank gets exactly its micro-batches of the plan, in order, pixel by pixel."""

import hashlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import tifffile

from histoscale.bench.ray_local import local_ray
from histoscale.errors import PlanError, SlideIndexError
from histoscale.sampling.plan import Plan
from histoscale.sampling.replicas import replicas_of
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.catalogue import Catalogue, open_catalogue
from histoscale.slides.index import SlideLocation, SlideRecord, make_index, write_index
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.table_cache import TableCache
from histoscale.slides.tile_check import TileCheck
from histoscale.slides.tiled import open_tiled
from histoscale.storage import open_store
from histoscale.storage.ranges import open_ranges
from histoscale.stream.chapters import Chapter
from histoscale.stream.feed import MicroBatch, RankFeed
from histoscale.stream.reader import Reader, ReaderSpec
from histoscale.stream.windows import FeedSpec, RankShare, start_feed

# Ray's workers cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SPEC = PlanSpec(
    seed=3,
    tiles=10**6,
    tiles_per_step=8,
    replicas=4,
    chapter_steps=4,
    tiles_per_visit=2,
    region_px=32,
    mix=((0.5, 0.5), (1.0, 0.5)),
    max_upsample=1.1,
    min_tissue=0.5,
)
NAME = "Mustermann-1957-07-01"


@dataclass(frozen=True)
class Archive:
    """Slides on disk with an index; every second slide is read in place, the others through a copy."""

    reader: ReaderSpec
    paths: dict[str, Path]

    def feed(self, steps: int, window_blocks: int = 10_000) -> FeedSpec:
        return FeedSpec(steps, self.reader, (2, 2), window_blocks)

    def catalogue(self) -> Catalogue:
        return open_catalogue(self.reader.index_uri)

    def plan(self) -> Plan:
        return self.reader.open_plan(self.catalogue())

    def replaced(self, **changes: Any) -> "Archive":
        return replace(self, reader=replace(self.reader, **changes))


def write_slide(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (40, 50, 3), np.uint8)
    pixels = np.kron(coarse, np.ones((16, 16, 1), np.uint8))
    tifffile.imwrite(
        path,
        pixels,
        tile=(128, 128),
        compression="jpeg",
        photometric="rgb",
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
    )


def make_archive(folder: Path, count: int = 5, in_place: int = 2) -> Archive:
    """`in_place`: every how many slides one is read through a copy; 1 is all of them, a large number none."""
    slides_folder = folder / "slides"
    slides_folder.mkdir(parents=True)
    for n in range(count):
        write_slide(slides_folder / f"{NAME}-{n}.tif", n)
    source, index_store = open_store(slides_folder, private=True), open_store(folder / "index")
    ranges, tables = open_ranges(source.uri), TableCache()
    records, locations, paths = [], {}, {}
    for n, info in enumerate(source.list()):
        name = f"{n + 1:032x}"
        mask = np.ones((40, 50), bool)
        mask[: 5 * n, :10] = False
        slide = open_tiled([info], ranges, tables)
        assert slide is not None
        layout = b"" if n % in_place == in_place - 1 else slide.layout.to_bytes()
        record = SlideRecord(name, "generic-tiff", 800, 640, 0.5, "tiff", info.size_bytes, (1.0,), mask, 16.0)
        records.append(replace(record, layout=layout))
        locations[name] = SlideLocation(source.uri, (info,), None)
        paths[name] = slides_folder / info.key
    snapshot = write_index(index_store, make_index(records, ()), locations)
    check = TileCheck(0.0, 0.0)
    reader = ReaderSpec(str(folder / "index"), snapshot.snapshot_id, SPEC, {}, check, folder / "cache", 1 << 30)
    return Archive(reader, paths)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray(cpus=8, object_store_bytes=512 * 2**20):
        yield


def digest(pixels: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def summary(batches: Sequence[MicroBatch | None]) -> list[Any]:
    return [
        m and (m.replica, m.sample_ids.tolist(), m.mpp.tolist(), m.slides.tolist(), [digest(tile) for tile in m.tiles])
        for m in batches
    ]


@ray.remote(num_cpus=0)
def run_rank(spec: FeedSpec, share: RankShare, start: int) -> list[Any]:
    feed = RankFeed(spec, share, start)
    got = [summary(feed.micro_batches(step)) for step in range(start, spec.steps)]
    feed.close()
    return got


def expected_steps(archive: Archive, rank: int, workers: int, steps: range) -> list[Any]:
    """What a rank must get: the plan, and direct reads with OpenSlide."""
    catalogue, plan = archive.catalogue(), archive.plan()
    slides = {name: open_slide(path) for name, path in archive.paths.items()}
    out = []
    for step in steps:
        batches: list[MicroBatch | None] = []
        for replica in replicas_of(rank, workers, SPEC.replicas):
            if replica is None:
                batches.append(None)
                continue
            p = plan.chapter(replica, step, step)
            places = zip(*(column[0].tolist() for column in (p.rows, p.x_px0, p.y_px0, p.mpp)), strict=True)
            tiles = [slides[catalogue.slide_id(row)].read(x, y, SPEC.region_px, mpp) for row, x, y, mpp in places]
            batches.append(MicroBatch(replica, p.sample_ids[0], np.stack(tiles), p.mpp[0], p.rows[0]))
        out.append(summary(batches))
    return out


@pytest.mark.parametrize(
    ("workers", "start", "steps", "window_blocks"),
    [(1, 0, 8, 10_000), (2, 0, 24, 8), (3, 0, 8, 10_000), (2, 6, 15, 10_000), (3, 7, 22, 8)],
)
def test_every_rank_gets_its_micro_batches_in_order(
    cluster: None, archive: Archive, workers: int, start: int, steps: int, window_blocks: int
) -> None:
    spec = archive.feed(steps, window_blocks)
    master = start_feed(spec)
    ranks = [run_rank.remote(spec, RankShare(master, "a", rank, workers), start) for rank in range(workers)]
    for rank, got in enumerate(ray.get(ranks)):
        assert got == expected_steps(archive, rank, workers, range(start, steps))


def own_readers() -> list[psutil.Process]:
    """Reader actors of this process's own Ray, and of no other that runs on the machine."""
    return [p for p in psutil.Process().children(recursive=True) if "ray::MapWorker" in " ".join(p.cmdline())]


def test_a_killed_reader_loses_and_repeats_nothing(cluster: None, archive: Archive) -> None:
    spec = archive.feed(160)
    feed = RankFeed(spec, RankShare(start_feed(spec), "a", 0, 1), 0)
    got = [summary(feed.micro_batches(0))]
    readers = own_readers()
    readers[0].kill()
    got += [summary(feed.micro_batches(step)) for step in range(1, spec.steps)]
    feed.close()
    assert len(readers) == 2
    assert got == expected_steps(archive, 0, 1, range(spec.steps))


def test_another_attempt_at_the_same_steps_has_pipelines_of_its_own(cluster: None, archive: Archive) -> None:
    spec = archive.feed(12)
    master = start_feed(spec)
    expected = expected_steps(archive, 0, 1, range(4, 12))
    for attempt in ("first", "second"):
        assert ray.get(run_rank.remote(spec, RankShare(master, attempt, 0, 1), 4)) == expected


def test_an_attempt_that_is_over_lets_its_readers_go(cluster: None, archive: Archive) -> None:
    spec = archive.feed(10**4)
    master = start_feed(spec)
    feed = RankFeed(spec, RankShare(master, "a", 0, 1), 0)
    feed.micro_batches(0)
    readers = own_readers()
    assert readers
    feed.close()
    del feed
    ray.get(master.release.remote())
    _, alive = psutil.wait_procs(readers, timeout=60)
    assert alive == []


def test_a_missing_index_stops_the_run_with_its_own_diagnosis(cluster: None, archive: Archive) -> None:
    spec = archive.replaced(index_uri="/nonexistent").feed(8)
    feed = RankFeed(spec, RankShare(start_feed(spec), "a", 0, 1), 0)
    with pytest.raises(SlideIndexError, match="no slide index"):
        feed.micro_batches(0)
    feed.close()


# Readers, without Ray.


def chapter_of(archive: Archive, number: int, replica: int = 1) -> Any:
    return Reader(archive.reader).read(Chapter(number, replica, 4 * number, 4 * number + 3), replica)


def spoil(path: Path) -> None:
    """Spoil the content of a slide behind the back of its ETag: its tables point to bytes that are no JPEG."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        for start, length in zip(page.dataoffsets, page.databytecounts, strict=True):
            data[start : start + length] = bytes(length)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("in_place", [1, 1000], ids=["through a copy", "in place"])
def test_tiles_that_cannot_be_decoded_give_way_to_others_and_a_replay_finds_the_same(
    tmp_path: Path, in_place: int
) -> None:
    archive = make_archive(tmp_path, count=3, in_place=in_place)
    bad_id, path = next(iter(archive.paths.items()))
    spoil(path)
    found = chapter_of(archive, 0)
    bad_row = archive.catalogue().row_of(bad_id)
    planned = archive.plan().chapter(1, 0, 3)
    assert (planned.rows == bad_row).any()
    assert bad_row not in found.slides
    refused = {fault.sample_id for fault in found.faults}
    assert refused == set(planned.sample_ids[planned.rows == bad_row].tolist())
    assert {fault.slide_id for fault in found.faults} == {bad_id}
    assert not any(fault.whole_slide for fault in found.faults)
    assert np.array_equal(found.tiles, chapter_of(archive, 0).tiles)
    others = planned.rows != bad_row
    slides = {archive.catalogue().row_of(name): open_slide(path) for name, path in archive.paths.items()}
    for place in zip(*np.nonzero(others), strict=True):
        expected = slides[int(planned.rows[place])].read(
            float(planned.x_px0[place]), float(planned.y_px0[place]), 32, float(planned.mpp[place])
        )
        np.testing.assert_array_equal(found.tiles[place], expected)


@pytest.mark.parametrize("in_place", [1, 1000], ids=["through a copy", "in place"])
@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_slide_that_changed_is_quarantined_whole(tmp_path: Path, in_place: int, change: str) -> None:
    archive = make_archive(tmp_path, count=3, in_place=in_place)
    bad_id, path = next(iter(archive.paths.items()))
    if change == "removed":
        path.unlink()
    else:
        write_slide(path, seed=99)
    found = chapter_of(archive, 0)
    assert archive.catalogue().row_of(bad_id) not in found.slides
    assert found.faults
    assert all(fault.whole_slide and fault.slide_id == bad_id for fault in found.faults)
    assert NAME not in "".join(fault.reason for fault in found.faults)


def test_a_file_that_is_no_slide_any_more_is_quarantined(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, count=2, in_place=1)
    _, path = next(iter(archive.paths.items()))
    before = path.stat()
    path.write_bytes(b"II*\0" + bytes(before.st_size - 4))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = chapter_of(archive, 0)
    assert found.faults
    assert all(fault.whole_slide for fault in found.faults)


def test_a_slide_that_is_out_gives_no_tile_from_its_step_on(archive: Archive) -> None:
    name = next(iter(archive.paths))
    row = archive.catalogue().row_of(name)
    without = archive.replaced(out_from={name: 6})
    for number in range(4):
        before, after = chapter_of(archive, number), chapter_of(without, number)
        steps = np.arange(4 * number, 4 * number + 4)
        assert row not in after.slides[steps >= 6]
        same = (before.slides != row) | (steps < 6)[:, None]
        np.testing.assert_array_equal(before.tiles[same], after.tiles[same])
        assert not after.faults


def test_a_slide_that_left_the_index_is_a_diagnosis(archive: Archive) -> None:
    with pytest.raises(SlideIndexError, match=r"slide f{32}: not in the index"):
        chapter_of(archive.replaced(out_from={"f" * 32: 0}), 0)


def test_tiles_that_fail_the_check_are_replaced_until_none_is_left(archive: Archive) -> None:
    # Squares of 16 px are sharp edges and flat inside: hardly a region of 32 px is without an edge.
    strict = archive.replaced(check=TileCheck(0.0, 1e6))
    with pytest.raises(PlanError, match="no tile is left for a sample"):
        chapter_of(strict, 0)


def test_no_slide_is_named_when_all_are_gone(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, count=1)
    for path in archive.paths.values():
        path.unlink()
    with pytest.raises(PlanError) as caught:
        chapter_of(archive, 0)
    assert NAME not in "".join(traceback.format_exception(caught.value))


def test_readers_of_a_node_share_their_tiles(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "archive", in_place=100)
    spec = replace(archive.reader, cache_folder=tmp_path, tile_cache_bytes=10**8)
    chapter = Chapter(0, 1, 0, 3)
    first, second = Reader(spec), Reader(spec)
    expected = chapter_of(archive, 0)
    np.testing.assert_array_equal(first.read(chapter, 1).tiles, expected.tiles)
    np.testing.assert_array_equal(second.read(chapter, 1).tiles, expected.tiles)
    assert first.slides.stats().bytes > 10 * second.slides.stats().bytes
