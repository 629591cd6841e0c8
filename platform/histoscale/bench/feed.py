"""How many blocks a second the feed deals when reading costs nothing: its ceiling, and what that feeds.

Readers of the benchmark hand out blocks of zeros; everything else is the production feed. The baseline is a plain Ray
Data pipeline of blocks of the same size to as many consumers, in the same call.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, DataIterator

from histoscale.bench.figure import Figure
from histoscale.bench.ray_local import local_ray, resident_bytes
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.tile_check import TileCheck
from histoscale.stream.chapters import Chapter, ChapterTiles
from histoscale.stream.feed import RankFeed
from histoscale.stream.reader import ReaderSpec
from histoscale.stream.windows import FeedSpec, RankShare, start_feed

RANKS = (2, 8, 64)
TILES_PER_S_OF_A_GPU = {"ViT-S": 500.0, "ViT-L": 160.0, "ViT-H": 90.0, "ViT-G": 46.0}
"""Tiles per second of one H100 that public DINOv2 trainers reach or should: what a feed has to deliver."""
_REPLICAS_OF_A_RANK = 1
_MEASURED_BLOCKS = 600
_SOAK_BLOCKS = 20_000
_SOAK_WINDOW_BLOCKS = 4_000
_READERS = 2
_OBJECT_STORE_BYTES = 6 * 10**9  # 64 ranks that hold four blocks of 15 MB each
_CONSUMERS = 2  # processes; their ranks are threads, for 64 processes do not fit on a small machine


class BlankReader:
    """A reader that costs nothing: the blocks of the plan, full of zeros."""

    def __init__(self, spec: ReaderSpec) -> None:
        self._plan = spec.plan
        self._tiles: dict[int, np.ndarray[Any, np.dtype[np.uint8]]] = {}

    def __call__(self, row: pa.Table) -> pa.Table:
        """One block."""
        chapter = Chapter.from_row(row)
        if chapter.replica is None:
            return ChapterTiles.padding().to_block(chapter)
        ids = chapter.sample_ids(self._plan)
        side = self._plan.region_px
        if len(ids) not in self._tiles:
            self._tiles[len(ids)] = np.zeros((*ids.shape, side, side, 3), np.uint8)
        return ChapterTiles(ids, np.zeros(ids.shape, np.int32), np.ones(ids.shape), self._tiles[len(ids)]).to_block(
            chapter
        )


@dataclass(frozen=True)
class Dealt:
    """Blocks that were dealt, over how long, and the coordinator's memory early and late."""

    blocks: int
    seconds: float
    early_bytes: int = 0
    late_bytes: int = 0

    @property
    def blocks_per_s(self) -> float:
        """The rate."""
        return self.blocks / self.seconds


def feed() -> Iterator[Figure]:
    """`feed.blocks_per_s` and `feed.tiles_per_s` to 2, 8 and 64 ranks, and the memory over 20,000 blocks."""
    with local_ray(cpus=2 * _READERS + 3, object_store_bytes=_OBJECT_STORE_BYTES):
        for tiles_per_block in (32, 8):
            rates = {}
            for ranks in RANKS:
                ours = _ours(_spec(tiles_per_block, ranks, _MEASURED_BLOCKS), ranks)
                rates[ranks] = (ours.blocks_per_s, _plain(tiles_per_block, ranks, _MEASURED_BLOCKS).blocks_per_s)
            yield from _rate_figures(tiles_per_block, rates)
        yield _memory_figure(_ours(_spec(1, 2, _SOAK_BLOCKS, _SOAK_WINDOW_BLOCKS), 2))


def _rate_figures(tiles_per_block: int, rates: dict[int, tuple[float, float]]) -> Iterator[Figure]:
    best = max(rates, key=lambda ranks: rates[ranks][0])
    ours, plain = rates[best]
    block_mb = tiles_per_block * 392 * 392 * 3 / 1e6
    by_ranks = {str(ranks): {"ours": rate, "plain": other} for ranks, (rate, other) in rates.items()}
    details = {"block_mb": block_mb, "by_ranks": by_ranks, "best_at_ranks": best}
    yield Figure("feed.blocks_per_s", ours, "blocks/s", plain, details)
    tiles_per_s = ours * tiles_per_block
    gpus = {model: tiles_per_s / rate for model, rate in TILES_PER_S_OF_A_GPU.items()}
    yield Figure("feed.tiles_per_s", tiles_per_s, "tiles/s", plain * tiles_per_block, details | {"gpus_fed": gpus})


def _memory_figure(dealt: Dealt) -> Figure:
    growth = dealt.late_bytes - dealt.early_bytes
    details = {"blocks": dealt.blocks, "early_bytes": dealt.early_bytes, "late_bytes": dealt.late_bytes}
    return Figure("feed.coordinator_growth_bytes", growth, "bytes", details=details)


def _spec(tiles_per_block: int, ranks: int, blocks: int, window_blocks: int = 10**9) -> FeedSpec:
    """Blocks of so many regions of 392 px, in micro-batches of eight or one."""
    replicas = _REPLICAS_OF_A_RANK * ranks
    b = min(tiles_per_block, 8)
    chapter_steps = tiles_per_block // b
    plan = PlanSpec(
        seed=0,
        tiles=10**9,
        tiles_per_step=b * replicas,
        replicas=replicas,
        chapter_steps=chapter_steps,
        tiles_per_visit=1,
        region_px=392 if tiles_per_block > 1 else 32,
        mix=((0.5, 1.0),),
        max_upsample=1.1,
        min_tissue=0.5,
    )
    reader = ReaderSpec("", "", plan, {}, TileCheck(0.0, 0.0), Path("/nonexistent"), 0)
    return FeedSpec(
        -(-blocks // replicas) * chapter_steps, reader, (_READERS, _READERS), window_blocks, read_with=BlankReader
    )


def _ours(spec: FeedSpec, ranks: int) -> Dealt:
    master = start_feed(spec)
    consumers = _consumers(ranks)
    done = [consumer.take_feed.remote(spec, master, f"ranks-{ranks}", ranks) for consumer in consumers]
    early_bytes = late_bytes = 0
    pending = done
    while pending:
        _, pending = ray.wait(pending, num_returns=len(pending), timeout=2.0)
        # The least of a while is the memory of a young coordinator; the most near the end that of an old one.
        now_bytes = resident_bytes("SplitCoordinator", "FeedMaster")
        early_bytes = early_bytes or now_bytes
        late_bytes = max(late_bytes, now_bytes)
    return _dealt(ray.get(done), early_bytes, late_bytes)


def _plain(tiles_per_block: int, ranks: int, blocks: int) -> Dealt:
    """A plain Ray Data pipeline: as many readers, blocks of the same size, no order, no check."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with DataContext.current(context):
        dataset = ray.data.range(blocks, override_num_blocks=blocks).map_batches(
            _PlainReader,
            fn_constructor_args=(tiles_per_block,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=_READERS),
            num_cpus=1,
        )
        iterators = dataset.streaming_split(ranks, equal=True)
    return _dealt(ray.get([consumer.take_plain.remote(iterators) for consumer in _consumers(ranks)]), 0, 0)


def _consumers(ranks: int) -> list[Any]:
    """Handles of actors that share out the ranks."""
    actor: Any = ray.remote(_Consumer)
    return [actor.options(num_cpus=0).remote(range(first, ranks, _CONSUMERS)) for first in range(_CONSUMERS)]


def _dealt(taken: Sequence[tuple[int, float, float]], early_bytes: int, late_bytes: int) -> Dealt:
    """The rate from the first block that any rank got to the last: starting Ray's pipeline is not dealing."""
    blocks = sum(count for count, _, _ in taken)
    seconds = max(last_s for _, _, last_s in taken) - min(first_s for _, first_s, _ in taken)
    return Dealt(blocks, seconds, early_bytes, late_bytes)


class _PlainReader:
    def __init__(self, tiles: int) -> None:
        self._tiles = np.zeros(tiles * 392 * 392 * 3, np.uint8)

    def __call__(self, _: pa.Table) -> pa.Table:
        buffers = [None, pa.py_buffer(np.array([0, self._tiles.nbytes])), pa.py_buffer(self._tiles)]
        return pa.table({"tiles": pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers)})


class _Consumer:
    """Some of the ranks, each a thread that takes blocks and throws them away."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = ranks

    def take_feed(self, spec: FeedSpec, master: Any, attempt: str, workers: int) -> tuple[int, float, float]:  # noqa: ANN401
        """Blocks, and the times (of the machine's monotonic clock) of the first and the last."""

        def take(rank: int, took: Callable[[int], None]) -> None:
            rank_feed = RankFeed(spec, RankShare(master, attempt, rank, workers), 0)
            for step in range(spec.steps):
                got = rank_feed.micro_batches(step)
                if step % spec.plan.chapter_steps == 0:
                    took(sum(batch is not None for batch in got))
            rank_feed.close()

        return self._run(take)

    def take_plain(self, iterators: Sequence[DataIterator]) -> tuple[int, float, float]:
        """The same of plain iterators."""

        def take(rank: int, took: Callable[[int], None]) -> None:
            for _ in iterators[rank].iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):  # type: ignore[arg-type]
                took(1)

        return self._run(take)

    def _run(self, take: Callable[[int, Callable[[int], None]], None]) -> tuple[int, float, float]:
        times_s: list[float] = []
        count = [0]

        def took(blocks: int) -> None:
            count[0] += blocks
            times_s.append(time.monotonic())

        threads = [threading.Thread(target=take, args=(rank, took)) for rank in self._ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return count[0], min(times_s), max(times_s)
