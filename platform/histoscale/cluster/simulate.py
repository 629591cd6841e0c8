"""What a real archive would do, before it is rented: the production plan and feed on synthetic slides.

Only reading is simulated: the readers plan each chapter over the synthetic catalogue exactly as real ones do, and hand
out blocks of the right size without pixels. The plan, the feed, its windows and its checks are those of a run.
"""

import os
import queue
import resource
import secrets
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from histoscale.cluster.plan_lines import describe_plan
from histoscale.config.recipe import Recipe
from histoscale.errors import ClusterError
from histoscale.sampling.plan import Plan
from histoscale.sampling.rows import ROW_DTYPE
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.synthetic import SyntheticArchive, make_archive
from histoscale.slides.tile_check import TileCheck
from histoscale.stream.chapters import Chapter, ChapterTiles
from histoscale.stream.feed import RankFeed
from histoscale.stream.reader import ReaderSpec
from histoscale.stream.windows import FeedSpec, RankShare, start_feed
from histoscale.units import describe_mpp

_FOLDER = Path(tempfile.gettempdir()) / f"histoscale-simulated-{os.getuid()}"
_PREFIX = "synthetic:"
_SAMPLED_CHAPTERS = 200


@dataclass(frozen=True)
class Simulation:
    """What to simulate.

    Attributes:
        recipe: The recipe of the run.
        slides: How many slides the archive has.
        workers: The world size.
        blocks: How many blocks to deal.
    """

    recipe: Recipe
    slides: int
    workers: int
    blocks: int

    def __post_init__(self) -> None:
        for name, value in (("--slides", self.slides), ("--workers", self.workers), ("--blocks", self.blocks)):
            if value < 1:
                raise ClusterError(f"{name} is too small", value=value, expected="1 or more")


class SimulatedReader:
    """A reader of a synthetic archive: plans every chapter, reads nothing."""

    def __init__(self, spec: ReaderSpec) -> None:
        self._spec = spec
        self._plan = _plan(spec.plan, open_synthetic(int(spec.index_uri.removeprefix(_PREFIX))))
        self._planning = threading.Lock()

    def __call__(self, row: pa.Table) -> pa.Table:
        """One block."""
        chapter = Chapter.from_row(row)
        if chapter.replica is None:
            return ChapterTiles.padding().to_block(chapter)
        with self._planning:
            plan = self._plan.chapter(chapter.replica, chapter.first_step, chapter.last_step)
        side_px = self._spec.plan.region_px
        tiles = np.zeros((*plan.sample_ids.shape, side_px, side_px, 3), np.uint8)
        return ChapterTiles(plan.sample_ids, plan.rows, plan.mpp, tiles).to_block(chapter)


def open_synthetic(slides: int) -> SyntheticArchive:
    """A synthetic archive whose catalogue is a memory map that all processes of a node share."""
    layout = zlib.crc32(str(ROW_DTYPE.descr).encode())  # a file of another version has other rows
    path = _FOLDER / f"{slides}-{layout:08x}.npy"
    if not path.exists():
        _FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = path.with_suffix(f".{secrets.token_hex(8)}.part.npy")
        np.save(part, make_archive(slides).rows)
        part.replace(path)
    return SyntheticArchive(np.load(path, mmap_mode="r"))


def simulate(simulation: Simulation) -> Iterator[str]:
    """Plan and deal; needs a Ray that this process has joined. Gives lines for a person to read."""
    recipe, spec = simulation.recipe, PlanSpec.from_recipe(simulation.recipe)
    archive = open_synthetic(simulation.slides)
    start_s = time.monotonic()
    plan = _plan(spec, archive)
    plan.chapter(0, 0, spec.chapter_steps - 1)
    first_s = time.monotonic() - start_s
    yield f"{simulation.slides:,} slides: first chapter planned after {first_s:.1f} s, {_peak_gb():.2f} GB at most"
    yield from describe_plan(plan.report())
    yield from _realised(plan, recipe.steps)
    yield from _dealt(simulation, spec)


def _plan(spec: PlanSpec, archive: SyntheticArchive) -> Plan:
    return Plan(spec, archive.rows, archive.columns, archive.values, archive.mask)


def _realised(plan: Plan, steps: int) -> Iterator[str]:
    """The mixture of chapters all over the run against the one asked for, and what planning costs."""
    spec, scales = plan.spec, Counter[float]()
    chapters = max(1, steps // spec.chapter_steps)
    start_s, tiles, spares = time.process_time(), 0, 0
    for n in range(_SAMPLED_CHAPTERS):
        first = n * chapters // _SAMPLED_CHAPTERS * spec.chapter_steps
        planned = plan.chapter(n % spec.replicas, first, first + spec.chapter_steps - 1)
        scales.update(planned.mpp.reshape(-1).tolist())
        tiles += planned.rows.size
        spares += int((planned.attempts > 0).sum())
    cost_us = (time.process_time() - start_s) / tiles * 1e6
    yield f"planning: {cost_us:.0f} us a tile with the masks of slides that were not seen before"
    yield f"second attempts (slides without a place at their magnification): {spares / tiles:.2%} of the tiles"
    total = sum(share for _, share in spec.mix)
    for mpp, share in spec.mix:
        low, high = mpp if isinstance(mpp, tuple) else (mpp, mpp)
        found = sum(count for scale, count in scales.items() if low <= scale <= high) / tiles
        yield f"{describe_mpp(mpp)}: {found:.1%} of {tiles:,} tiles all over the run, asked for {share / total:.1%}"


def _dealt(simulation: Simulation, plan: PlanSpec) -> Iterator[str]:
    """Blocks through the feed, to ranks that are threads of this process."""
    turns = max(1, simulation.blocks // plan.replicas)
    check = TileCheck(0.0, 0.0)
    reader = ReaderSpec(f"{_PREFIX}{simulation.slides}", "", plan, {}, check, _FOLDER, 0)
    steps = min(simulation.recipe.steps, turns * plan.chapter_steps)
    spec = FeedSpec(steps, reader, simulation.recipe.cluster.reader_bounds, read_with=SimulatedReader)
    master, attempt = start_feed(spec), secrets.token_hex(8)
    times_s: list[float] = []
    feeds: list[RankFeed] = []

    def take(rank: int) -> None:
        feed = RankFeed(spec, RankShare(master, attempt, rank, simulation.workers), 0)
        feeds.append(feed)
        for step in range(steps):
            feed.micro_batches(step)
            times_s.append(time.monotonic())
        feed.close()

    start_s = time.monotonic()
    try:
        _in_threads(take, simulation.workers)
    except BaseException:  # cleaned up and raised again
        for feed in feeds:
            feed.close()
        ray.kill(master)  # the other ranks wait for blocks that only come to all of them
        raise
    first_s, seconds = min(times_s) - start_s, max(times_s) - min(times_s)
    blocks = plan.replicas * -(-steps // plan.chapter_steps)
    rate = blocks / seconds if seconds else 0.0
    tiles_per_block = plan.tiles_per_micro_batch * plan.chapter_steps
    yield (
        f"feed: first step after {first_s:.1f} s, {rate:.0f} blocks/s, {rate * tiles_per_block:,.0f} tiles/s "
        f"to {simulation.workers} ranks"
    )
    yield "every block was the one of the plan, in order"


def _in_threads(work: Callable[[int], None], count: int) -> None:
    """Work in threads until all are done, or one has failed: its error is raised, and nobody waits for the others."""
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def guarded(number: int) -> None:
        failure: Exception | None = None
        try:
            work(number)
        except Exception as error:  # noqa: BLE001 - raised again where somebody can see it
            failure = error
        ended.put(failure)

    for number in range(count):
        threading.Thread(target=guarded, args=(number,), daemon=True).start()
    for _ in range(count):
        failure = ended.get()
        if failure is not None:
            raise failure


def _peak_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
