"""The feed: through Ray, each rank gets exactly its micro-batches of the plan, in order, pixel by pixel."""

import hashlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
import tifffile
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from histoscale.config.recipe import Recipe
from histoscale.errors import SlideError, SlideIndexError, StorageError, StreamError
from histoscale.sampling.plan import Plan
from histoscale.sampling.replicas import replicas_of
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.index import SlideLocation, SlideRecord, make_index, write_index
from histoscale.slides.openslide_reader import open_slide
from histoscale.storage import open_store
from histoscale.stream import reader as reader_module
from histoscale.stream.chapters import Chapter, chapters, deal
from histoscale.stream.feed import DATASET, FeedSpec, MicroBatch, PlanFeed, RankFeed, open_feed
from histoscale.stream.reader import OpenSlides, ReaderSpec

# Ray's workers cannot import a test module.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SPEC = PlanSpec(
    seed=3,
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
    """Slides on disk with an index and a plan over them."""

    plan: Plan
    reader: ReaderSpec
    paths: dict[str, Path]

    def feed(self, steps: int) -> FeedSpec:
        return FeedSpec(self.plan, steps, self.reader, readers=2)


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


def make_archive(folder: Path, count: int = 5) -> Archive:
    slides_folder = folder / "slides"
    slides_folder.mkdir(parents=True)
    for n in range(count):
        write_slide(slides_folder / f"{NAME}-{n}.tif", n)
    source, index_store = open_store(slides_folder, private=True), open_store(folder / "index")
    records, locations, paths = [], {}, {}
    for n, info in enumerate(source.list()):
        name = f"{n:032x}"
        mask = np.ones((40, 50), bool)
        mask[: 5 * n, :10] = False
        records.append(SlideRecord(name, "generic-tiff", 800, 640, 0.5, "tiff", info.size_bytes, (1.0,), mask, 16.0))
        locations[name] = SlideLocation(source.uri, (info,), None)
        paths[name] = slides_folder / info.key
    index = make_index(records, ())
    write_index(index_store, index, locations)
    reader = ReaderSpec(str(folder / "index"), folder / "cache", 1 << 30)
    return Archive(Plan(SPEC, index.records), reader, paths)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return make_archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp", prefix="ray") as folder:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
        ray.init(
            address="local",
            num_cpus=6,
            object_store_memory=512 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()


def digest(pixels: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def summary(batches: Sequence[MicroBatch | None]) -> list[Any]:
    return [
        m and (m.replica, m.sample_ids.tolist(), m.mpp.tolist(), m.slides.tolist(), [digest(tile) for tile in m.tiles])
        for m in batches
    ]


@ray.remote(num_cpus=0)
def run_rank(spec: FeedSpec, iterator: Any, rank: int, workers: int, start: int) -> list[Any]:
    feed = RankFeed(iterator, spec.plan, rank, workers, start, spec.steps)
    return [summary(feed.micro_batches(step)) for step in range(start, spec.steps)]


def expected_steps(archive: Archive, rank: int, workers: int, steps: range) -> list[Any]:
    """What a rank must get: the plan, and direct reads with the slide reader."""
    slides = {name: open_slide(path) for name, path in archive.paths.items()}
    out = []
    for step in steps:
        batches: list[MicroBatch | None] = []
        for replica in replicas_of(rank, workers, SPEC.replicas):
            if replica is None:
                batches.append(None)
                continue
            m = archive.plan.micro_batch(step, replica)
            tiles = [
                slides[archive.plan.slide_ids[row]].read(x, y, SPEC.region_px, mpp)
                for row, x, y, mpp in zip(m.slides, m.x_px0.tolist(), m.y_px0.tolist(), m.mpp.tolist(), strict=True)
            ]
            batches.append(MicroBatch(replica, m.sample_ids, np.stack(tiles), m.mpp, m.slides))
        out.append(summary(batches))
    return out


@pytest.mark.parametrize(("workers", "start", "steps"), [(1, 0, 8), (2, 0, 8), (3, 0, 8), (2, 6, 15), (3, 7, 10)])
def test_every_rank_gets_its_micro_batches_in_order(
    local_ray: None, archive: Archive, workers: int, start: int, steps: int
) -> None:
    spec = archive.feed(steps)
    iterators = open_feed(spec, workers, start)
    ranks = [run_rank.remote(spec, it, rank, workers, start) for rank, it in enumerate(iterators)]
    for rank, got in enumerate(ray.get(ranks)):
        assert got == expected_steps(archive, rank, workers, range(start, steps))


def own_readers() -> list[psutil.Process]:
    """Reader actors of this process's own Ray, and of no other that runs on the machine."""
    return [p for p in psutil.Process().children(recursive=True) if "ray::MapWorker" in " ".join(p.cmdline())]


def test_a_killed_reader_loses_and_repeats_nothing(local_ray: None, archive: Archive) -> None:
    spec = archive.feed(160)
    [iterator] = open_feed(spec, 1, 0)
    feed = RankFeed(iterator, spec.plan, 0, 1, 0, spec.steps)
    got = [summary(feed.micro_batches(0))]
    readers = own_readers()
    readers[0].kill()
    got += [summary(feed.micro_batches(step)) for step in range(1, spec.steps)]
    assert len(readers) == 2
    assert got == expected_steps(archive, 0, 1, range(spec.steps))


def break_slide(path: Path) -> None:
    """Spoil the content of a slide behind the back of its ETag."""
    before = path.stat()
    path.write_bytes(b"II*\0" + bytes(before.st_size - 4))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_slide_that_cannot_be_read_stops_the_run_and_is_named_by_its_id(local_ray: None, tmp_path: Path) -> None:
    archive = make_archive(tmp_path, count=2)
    broken_id, path = next(iter(archive.paths.items()))
    break_slide(path)
    spec = archive.feed(8)
    [iterator] = open_feed(spec, 1, 0)
    with pytest.raises(SlideError, match=f"slide {broken_id}: ") as caught:
        RankFeed(iterator, spec.plan, 0, 1, 0, spec.steps).micro_batches(0)
    assert NAME not in "".join(traceback.format_exception(caught.value))


def test_a_missing_index_stops_the_run_with_its_own_diagnosis(local_ray: None, archive: Archive) -> None:
    spec = replace(archive.feed(8), reader=replace(archive.reader, index_uri="/nonexistent"))
    [iterator] = open_feed(spec, 1, 0)
    with pytest.raises(SlideIndexError, match="no slide index"):
        RankFeed(iterator, spec.plan, 0, 1, 0, spec.steps).micro_batches(0)


def train_loop(config: dict[str, Any]) -> None:
    spec: FeedSpec = config["spec"]
    context = ray.train.get_context()
    rank, workers, start = context.get_world_rank(), context.get_world_size(), config["committed_step"]()
    feed = RankFeed(ray.train.get_dataset_shard(DATASET), spec.plan, rank, workers, start, spec.steps)
    got = [summary(feed.micro_batches(step)) for step in range(start, spec.steps)]
    (config["out"] / f"rank{rank}").write_text(repr(got))


def read_committed_step(path: Path) -> int:
    return int(path.read_text())


def test_ray_train_starts_the_feed_at_the_committed_step(local_ray: None, archive: Archive, tmp_path: Path) -> None:
    (tmp_path / "committed").write_text("5")
    committed_step = partial(read_committed_step, tmp_path / "committed")
    spec = archive.feed(12)
    TorchTrainer(
        train_loop,
        train_loop_config={"spec": spec, "committed_step": committed_step, "out": tmp_path},
        scaling_config=ScalingConfig(num_workers=2),
        torch_config=TorchConfig(backend="gloo"),
        datasets=PlanFeed.placeholder(),
        dataset_config=PlanFeed(spec, committed_step),
        run_config=RunConfig(name="feed", storage_path=str(tmp_path / "ray")),
    ).fit()
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == repr(expected_steps(archive, rank, 2, range(5, 12)))


# Without Ray: the order of chapters, and what a rank refuses.


def test_chapters_start_at_multiples_and_only_the_ends_are_shorter() -> None:
    got = [(c.number, c.first_step, c.last_step) for c in chapters(1, 6, 15, 4)]
    assert got == [(1, 6, 7), (2, 8, 11), (3, 12, 14)]
    assert list(chapters(1, 15, 15, 4)) == []


def test_round_robin_over_the_dealt_rows_gives_each_rank_its_replicas() -> None:
    rows = list(deal(SPEC, 3, 2, 9))
    for rank in range(3):
        own = [(c.number, c.replica) for c in rows[rank::3]]
        assert own == [(number, replica) for number in (0, 1, 2) for replica in replicas_of(rank, 3, 4)]


def test_a_chapter_survives_its_row() -> None:
    for chapter in (Chapter(7, 3, 28, 31), Chapter(0, None, 2, 3)):
        assert Chapter.from_row(chapter.to_row()) == chapter


class FakeIterator:
    """A feed whose blocks are given; reads them as a reader would, without Ray."""

    def __init__(self, blocks: Sequence[pa.Table]) -> None:
        self.blocks = blocks

    def iter_batches(self, **kwargs: object) -> Iterator[pa.Table]:
        return iter(self.blocks)


def fake_block(plan: Plan, chapter: Chapter) -> pa.Table:
    assert chapter.replica is not None
    ids = np.stack([plan.sample_ids(step, chapter.replica) for step in chapter.steps])
    return chapter.to_block(ids, np.full((*ids.shape, 32, 32, 3), chapter.replica, np.uint8))


def fake_feed(archive: Archive, blocks: Sequence[pa.Table], start: int = 0) -> RankFeed:
    return RankFeed(FakeIterator(blocks), archive.plan, 0, 4, start, 8)


def test_tiles_are_a_view_of_the_block(archive: Archive) -> None:
    block = fake_block(archive.plan, Chapter(0, 0, 0, 3))
    [batch] = fake_feed(archive, [block]).micro_batches(0)
    assert batch is not None
    assert batch.tiles.shape == (2, 32, 32, 3)
    buffer = block["tiles"].chunk(0).buffers()[2]
    start = batch.tiles.__array_interface__["data"][0]
    assert buffer.address <= start < buffer.address + buffer.size


@pytest.mark.parametrize("wrong", [Chapter(0, 1, 0, 3), Chapter(1, 0, 4, 7), Chapter(0, 0, 1, 3)])
def test_another_chapter_is_refused(archive: Archive, wrong: Chapter) -> None:
    with pytest.raises(StreamError, match="another chapter"):
        fake_feed(archive, [fake_block(archive.plan, wrong)]).micro_batches(0)


def test_padding_in_place_of_tiles_is_refused(archive: Archive) -> None:
    block = Chapter(0, None, 0, 3).to_block(np.empty(0, np.int64), np.empty(0, np.uint8))
    with pytest.raises(StreamError, match="replica=None"):
        fake_feed(archive, [block]).micro_batches(0)


def test_other_samples_are_refused(archive: Archive) -> None:
    chapter = Chapter(0, 0, 0, 3)
    ids = np.stack([archive.plan.sample_ids(step, 0) for step in chapter.steps])[:, ::-1]
    with pytest.raises(StreamError, match="other samples"):
        fake_feed(archive, [chapter.to_block(ids, np.zeros((4, 2, 32, 32, 3), np.uint8))]).micro_batches(0)


def test_tiles_of_another_size_are_refused(archive: Archive) -> None:
    chapter = Chapter(0, 0, 0, 3)
    ids = np.stack([archive.plan.sample_ids(step, 0) for step in chapter.steps])
    with pytest.raises(StreamError, match=r"24000 bytes.*24576 bytes"):
        fake_feed(archive, [chapter.to_block(ids, np.zeros(24_000, np.uint8))]).micro_batches(0)


def test_two_merged_chapters_are_refused(archive: Archive) -> None:
    block = fake_block(archive.plan, Chapter(0, 0, 0, 3))
    with pytest.raises(StreamError, match="2 rows"):
        fake_feed(archive, [pa.concat_tables([block, block])]).micro_batches(0)


def test_a_feed_that_ends_early_is_an_error(archive: Archive) -> None:
    with pytest.raises(StreamError, match="ended too early"):
        fake_feed(archive, []).micro_batches(0)


def test_steps_are_taken_in_turn(archive: Archive) -> None:
    feed = fake_feed(archive, [fake_block(archive.plan, Chapter(1, 0, 6, 7))], start=6)
    with pytest.raises(StreamError, match="expected step 6"):
        feed.micro_batches(7)
    feed.micro_batches(6)
    feed.micro_batches(7)
    with pytest.raises(StreamError, match="ends before this step"):
        feed.micro_batches(8)


def test_waiting_is_measured(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 20.0, 20.0])
    monkeypatch.setattr("histoscale.stream.feed.time.monotonic", lambda: next(clock))
    feed = fake_feed(archive, [fake_block(archive.plan, Chapter(0, 0, 0, 3))])
    feed.micro_batches(0)
    assert feed.wait_s == 2.5
    feed.micro_batches(1)
    assert feed.wait_s == 0.0


def test_a_reader_keeps_few_slides_open_and_reads_the_same(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_OPEN_SLIDES", 2)
    slides = OpenSlides(archive.reader)
    for name in [*archive.paths, *archive.paths]:
        expected = open_slide(archive.paths[name]).read(40, 50, 32, 1.0)
        np.testing.assert_array_equal(slides.read(name, 40, 50, 32, 1.0), expected)
        assert len(slides._held) <= 2


def test_a_slide_that_changed_is_refused_by_its_id(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, count=1)
    [(name, path)] = archive.paths.items()
    write_slide(path, seed=99)
    with pytest.raises(StorageError, match=f"slide {name}: .*changed") as caught:
        OpenSlides(archive.reader).read(name, 0, 0, 32, 0.5)
    assert NAME not in str(caught.value)


def test_errors_of_the_system_lose_the_name_of_the_file(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *, mpp: float | None) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(reader_module, "open_slide", refuse)
    name = next(iter(archive.paths))
    with pytest.raises(SlideError, match=f"slide {name} cannot be read .*Permission denied") as caught:
        OpenSlides(archive.reader).read(name, 0, 0, 32, 0.5)
    assert "/" not in str(caught.value)


def test_a_slide_that_left_the_index_is_a_diagnosis(archive: Archive) -> None:
    with pytest.raises(SlideError, match=r"slide ffff: not in the index\. Resume with"):
        OpenSlides(archive.reader).read("ffff", 0, 0, 32, 0.5)


def test_copies_of_open_slides_fit_in_the_cache(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "is_remote", lambda uri: True)
    sizes = [path.stat().st_size for path in archive.paths.values()]
    slides = OpenSlides(replace(archive.reader, cache_bytes=2 * max(sizes)))
    for name in archive.paths:
        slides.read(name, 0, 0, 32, 0.5)
    assert len(slides._held) == 2


def test_the_feed_takes_its_sizes_from_the_recipe(archive: Archive) -> None:
    recipe = Recipe.model_validate({"cluster": {"readers": 4, "slide_cache_gb": 2.0}, "schedule": {"images": 9000}})
    spec = FeedSpec.from_recipe(recipe, archive.plan, "index", Path("cache"))
    assert spec == FeedSpec(archive.plan, 2, ReaderSpec("index", Path("cache"), 500_000_000), 4)
