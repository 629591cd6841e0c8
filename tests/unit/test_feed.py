"""The feed without Ray: the order of chapters and windows, what a rank refuses, what it measures."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from histoscale.errors import StreamError
from histoscale.sampling.replicas import replicas_of
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.tile_check import TileCheck
from histoscale.stream.chapters import Chapter, ChapterTiles, chapters, deal
from histoscale.stream.faults import Fault
from histoscale.stream.feed import RankFeed
from histoscale.stream.reader import ReaderSpec
from histoscale.stream.windows import FeedSpec

PLAN = PlanSpec(
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
READER = ReaderSpec("/index", "0" * 16, PLAN, {}, TileCheck(0.0, 0.0), Path("/cache"), 1)


def feed_spec(steps: int, window_blocks: int = 1000) -> FeedSpec:
    return FeedSpec(steps, READER, (1, 1), window_blocks)


def test_chapters_start_at_multiples_and_only_the_ends_are_shorter() -> None:
    got = [(c.number, c.first_step, c.last_step) for c in chapters(1, 6, 15, 4)]
    assert got == [(1, 6, 7), (2, 8, 11), (3, 12, 14)]
    assert list(chapters(1, 15, 15, 4)) == []


def test_round_robin_over_the_dealt_rows_gives_each_rank_its_replicas() -> None:
    rows = list(deal(PLAN, 3, 2, 9))
    for rank in range(3):
        own = [(c.number, c.replica) for c in rows[rank::3]]
        assert own == [(number, replica) for number in (0, 1, 2) for replica in replicas_of(rank, 3, 4)]


def test_a_chapter_survives_its_row() -> None:
    for chapter in (Chapter(7, 3, 28, 31), Chapter(0, None, 2, 3)):
        assert Chapter.from_row(chapter.to_row()) == chapter


@pytest.mark.parametrize("start", [0, 5, 8, 23])
def test_windows_cover_the_run_with_borders_that_do_not_depend_on_the_start(start: int) -> None:
    windows = list(feed_spec(23, window_blocks=8).windows(start))
    assert [step for window in windows for step in window] == list(range(start, 23))
    assert [window.stop for window in windows] == [stop for stop in (8, 16, 23) if stop > start]


def test_a_window_holds_at_least_one_chapter_of_every_replica() -> None:
    assert [len(window) for window in feed_spec(10, window_blocks=1).windows(0)] == [4, 4, 2]


class FakeShare:
    """Blocks as readers would make them, without Ray; counts the windows that were opened."""

    def __init__(self, blocks: Sequence[pa.Table] | None = None, rank: int = 0, workers: int = 4) -> None:
        self.rank, self.workers = rank, workers
        self.opened: list[range] = []
        self.threads: list[str] = []
        self._blocks = blocks

    def open(self, steps: range, prefetch: int) -> Iterator[pa.Table]:
        self.opened.append(steps)
        self.threads.append(threading.current_thread().name)
        if self._blocks is not None:
            return iter(self._blocks)
        rows = list(deal(PLAN, self.workers, steps.start, steps.stop))
        return (block_of(chapter) for chapter in rows[self.rank :: self.workers])


def block_of(chapter: Chapter, faults: Sequence[Fault] = ()) -> pa.Table:
    if chapter.replica is None:
        return ChapterTiles.padding().to_block(chapter)
    ids = chapter.sample_ids(PLAN)
    tiles = np.broadcast_to(ids.astype(np.uint8)[:, :, None, None, None], (*ids.shape, 32, 32, 3)).copy()
    return ChapterTiles(ids, ids.astype(np.int32) + 7, ids / 8.0, tiles, faults).to_block(chapter)


def feed_of(blocks: Sequence[pa.Table], start: int = 0, steps: int = 8) -> RankFeed:
    return RankFeed(feed_spec(steps), FakeShare(blocks), start)


@pytest.mark.parametrize(("workers", "window_blocks", "start"), [(1, 4, 0), (2, 8, 3), (3, 4, 0), (4, 1000, 2)])
def test_every_rank_gets_its_replicas_step_by_step_across_windows(workers: int, window_blocks: int, start: int) -> None:
    spec = feed_spec(21, window_blocks)
    for rank in range(workers):
        share = FakeShare(rank=rank, workers=workers)
        feed = RankFeed(spec, share, start)
        for step in range(start, 21):
            got = feed.micro_batches(step)
            assert [m and m.replica for m in got] == list(replicas_of(rank, workers, 4))
            for m in got:
                if m is not None:
                    first = (step * 4 + m.replica) * 2
                    assert m.sample_ids.tolist() == [first, first + 1]
                    assert m.tiles[:, 0, 0, 0].tolist() == [first % 256, (first + 1) % 256]
                    assert m.slides.tolist() == [first + 7, first + 8]
                    assert m.mpp.tolist() == [first / 8, (first + 1) / 8]
        assert share.opened == list(spec.windows(start))


def test_readers_may_begin_before_the_first_tiles_are_asked_for() -> None:
    share = FakeShare(workers=1)
    feed = RankFeed(feed_spec(64, window_blocks=32), share, 3)
    feed.begin()
    deadline_s = time.monotonic() + 10.0  # a thread opens it
    while not share.opened and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert share.opened == [range(3, 32)]
    assert [m is not None for m in feed.micro_batches(3)] == [True] * 4
    assert share.opened == [range(3, 32)]


def test_the_next_window_is_opened_beside_the_present_one() -> None:
    share = FakeShare(workers=1)
    feed = RankFeed(feed_spec(64, window_blocks=32), share, 0)
    for step in range(27):
        feed.micro_batches(step)
    assert share.opened == [range(32)]
    feed.micro_batches(27)
    feed.micro_batches(28)
    deadline_s = time.monotonic() + 10.0  # a thread opens it
    while len(share.opened) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    feed.close()
    assert share.opened[:2] == [range(32), range(32, 64)]
    assert all(name.startswith("next-window") for name in share.threads)


def test_faults_go_to_the_micro_batch_of_their_sample() -> None:
    faults = [Fault(0, 0, "a" * 32, "blur", False), Fault(9, 0, "b" * 32, "changed", True)]
    feed = feed_of([block_of(Chapter(0, 0, 0, 3), faults)])
    [first], [second] = feed.micro_batches(0), feed.micro_batches(1)
    assert first is not None
    assert first.faults == (faults[0],)
    assert second is not None
    assert second.faults == (faults[1],)


def test_tiles_are_a_view_of_the_block() -> None:
    block = block_of(Chapter(0, 0, 0, 3))
    [batch] = feed_of([block]).micro_batches(0)
    assert batch is not None
    assert batch.tiles.shape == (2, 32, 32, 3)
    buffer = block["tiles"].chunk(0).buffers()[2]
    start = batch.tiles.__array_interface__["data"][0]
    assert buffer.address <= start < buffer.address + buffer.size


@pytest.mark.parametrize(
    "wrong", [Chapter(0, 1, 0, 3), Chapter(1, 0, 4, 7), Chapter(0, 0, 1, 3), Chapter(0, None, 0, 3)]
)
def test_another_chapter_is_refused(wrong: Chapter) -> None:
    with pytest.raises(StreamError, match="another chapter"):
        feed_of([block_of(wrong)]).micro_batches(0)


def tampered(**columns: Any) -> pa.Table:
    """The first chapter of replica 0 with other columns."""
    chapter = Chapter(0, 0, 0, 3)
    ids = chapter.sample_ids(PLAN)
    values = {
        "sample_ids": ids,
        "slides": ids.astype(np.int32),
        "mpp": ids / 8.0,
        "tiles": np.zeros((*ids.shape, 32, 32, 3), np.uint8),
    } | columns
    return ChapterTiles(**values).to_block(chapter)


def test_other_samples_are_refused() -> None:
    with pytest.raises(StreamError, match="other samples"):
        feed_of([tampered(sample_ids=Chapter(0, 0, 0, 3).sample_ids(PLAN)[:, ::-1])]).micro_batches(0)


def test_tiles_of_another_size_are_refused() -> None:
    with pytest.raises(StreamError, match=r"24000 bytes.*24576 bytes"):
        feed_of([tampered(tiles=np.zeros(24_000, np.uint8))]).micro_batches(0)


def test_a_block_that_says_too_little_of_its_tiles_is_refused() -> None:
    with pytest.raises(StreamError, match=r"says too little of its tiles .*3 slides"):
        feed_of([tampered(slides=np.zeros(3, np.int32))]).micro_batches(0)


def test_two_merged_chapters_are_refused() -> None:
    block = block_of(Chapter(0, 0, 0, 3))
    with pytest.raises(StreamError, match="2 rows"):
        feed_of([pa.concat_tables([block, block])]).micro_batches(0)


def test_a_feed_that_ends_early_is_an_error() -> None:
    with pytest.raises(StreamError, match="ended too early"):
        feed_of([]).micro_batches(0)


def test_steps_are_taken_in_turn() -> None:
    feed = feed_of([block_of(Chapter(1, 0, 6, 7))], start=6)
    with pytest.raises(StreamError, match="expected step 6"):
        feed.micro_batches(7)
    feed.micro_batches(6)
    feed.micro_batches(7)
    with pytest.raises(StreamError, match="ends before this step"):
        feed.micro_batches(8)


def test_waiting_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 20.0, 20.0])
    monkeypatch.setattr("histoscale.stream.feed.time.monotonic", lambda: next(clock))
    feed = feed_of([block_of(Chapter(0, 0, 0, 3))])
    feed.micro_batches(0)
    assert feed.wait_s == 2.5
    feed.micro_batches(1)
    assert feed.wait_s == 0.0


def test_more_workers_than_replicas_are_refused() -> None:
    with pytest.raises(Exception, match="number of workers does not fit"):
        RankFeed(feed_spec(8), FakeShare(rank=4, workers=5), 0)


def test_the_spec_of_a_feed_is_small_and_hashes_its_plan() -> None:
    assert feed_spec(8).plan is PLAN
    assert replace(feed_spec(8), steps=9) != feed_spec(8)
