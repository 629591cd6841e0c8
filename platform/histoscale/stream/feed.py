"""The feed as a rank sees it: its micro-batches, step by step, each checked against the plan before it is used."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray

from histoscale.errors import HistoscaleError, StreamError
from histoscale.sampling.replicas import replicas_of
from histoscale.stream.chapters import Chapter, ChapterTiles, chapters, open_block
from histoscale.stream.faults import Fault
from histoscale.stream.windows import FeedSpec

_LEAD = 8  # the next window is opened when an eighth of the present one is left


@dataclass(frozen=True)
class MicroBatch:
    """The tiles of one replica of one step.

    Attributes:
        replica: Which replica.
        sample_ids: int64 [b].
        tiles: uint8 [b, R, R, 3], a read-only view of Ray's object store.
        mpp: float64 [b].
        slides: int32 [b], rows of the catalogue.
        faults: Attempts at these samples that were given up.
    """

    replica: int
    sample_ids: NDArray[np.int64]
    tiles: NDArray[np.uint8]
    mpp: NDArray[np.float64]
    slides: NDArray[np.int32]
    faults: tuple[Fault, ...] = ()


class Share(Protocol):
    """Where the blocks of one rank come from."""

    @property
    def rank(self) -> int:
        """Which rank."""

    @property
    def workers(self) -> int:
        """The world size."""

    def open(self, steps: range, prefetch: int) -> Iterator[pa.Table]:
        """Blocks of a window, of which `prefetch` may wait on this node."""


class RankFeed:
    """The micro-batches of one rank, step by step; holds one chapter of each of its replicas.

    Args:
        spec: The feed of the run.
        share: This rank's share of it.
        start_step: The step from which the run goes on.
    """

    def __init__(self, spec: FeedSpec, share: Share, start_step: int) -> None:
        self.wait_s = 0.0
        """Seconds that the last call of `micro_batches` waited for blocks."""
        self._plan = spec.plan
        self._replicas = replicas_of(share.rank, share.workers, spec.plan.replicas)
        self._turns = chapters(None, start_step, spec.steps, spec.plan.chapter_steps)
        # While one chapter is trained on, the whole next one may wait on this node.
        self._windows = _Windows(spec, lambda steps: share.open(steps, len(self._replicas)), start_step)
        self._next_step = start_step
        self._held: list[tuple[Chapter, ChapterTiles]] = []

    def begin(self) -> None:
        """Let readers start before the first tiles are asked for; failures come out when they are."""
        self._windows.begin()

    def micro_batches(self, step: int) -> list[MicroBatch | None]:
        """The micro-batches of this rank in the order of `replicas_of`; None is padding, of weight zero.

        Raises:
            StreamError: A step out of turn, a block that is not the one of the plan, or no block.
            StorageError: A reader could not fetch a slide.
            SlideIndexError: A reader could not read the index.
            PlanError: A reader found no tile for a sample.
        """
        if step != self._next_step:
            raise StreamError("a step out of turn", value=step, expected=f"step {self._next_step}")
        start_s = time.monotonic()
        if not self._held or step > self._held[0][0].last_step:
            self._held.clear()
            turn = next(self._turns, None)
            if turn is None:
                raise StreamError("the run ends before this step", value=step, expected="an earlier step")
            self._held.extend(self._receive(turn, replica) for replica in self._replicas)
        self.wait_s = time.monotonic() - start_s
        self._next_step += 1
        return [_micro_batch(step, chapter, tiles) for chapter, tiles in self._held]

    def close(self) -> None:
        """Let go of the blocks that are under way."""
        self._held.clear()
        self._windows.close()

    def _receive(self, turn: Chapter, replica: int | None) -> tuple[Chapter, ChapterTiles]:
        expected = Chapter(turn.number, replica, turn.first_step, turn.last_step)
        try:
            block = self._windows.next_block(turn.first_step)
        except StopIteration:
            raise StreamError("the feed ended too early", expected=str(expected)) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, HistoscaleError):
                raise error.cause from None
            raise
        return expected, open_block(block, expected, self._plan)


class _Windows:
    """Blocks of one window after the other; a thread opens the next one in time."""

    def __init__(self, spec: FeedSpec, open_window: Callable[[range], Iterator[pa.Table]], start_step: int) -> None:
        self._steps = spec.windows(start_step)
        self._open_window = open_window
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="next-window")
        self._now = range(start_step, start_step)
        self._blocks: Iterator[pa.Table] = iter(())
        self._next: tuple[range, Future[Iterator[pa.Table]]] | None = None

    def next_block(self, step: int) -> pa.Table:
        """The next block, which is of the chapter that begins with `step`."""
        if step >= self._now.stop:
            self.begin()
            if self._next is not None:
                self._now, opened = self._next
                self._next = None
                self._blocks = opened.result()
        if step >= self._now.stop - len(self._now) // _LEAD:
            self.begin()
        return next(self._blocks)

    def close(self) -> None:
        self._blocks = iter(())
        self._opener.shutdown(wait=False, cancel_futures=True)

    def begin(self) -> None:
        """Open the next window beside what goes on, if it is not being opened."""
        if self._next is None and (steps := next(self._steps, None)) is not None:
            self._next = steps, self._opener.submit(self._opened, steps)

    def _opened(self, steps: range) -> Iterator[pa.Table]:
        """Blocks of a window whose first one is here already: only that makes Ray start to read."""
        blocks = self._open_window(steps)
        first = next(blocks, None)
        return blocks if first is None else _chain(first, blocks)


def _chain(first: pa.Table, rest: Iterator[pa.Table]) -> Iterator[pa.Table]:
    yield first
    yield from rest


def _micro_batch(step: int, chapter: Chapter, tiles: ChapterTiles) -> MicroBatch | None:
    if chapter.replica is None:
        return None
    turn = step - chapter.first_step
    sample_ids = tiles.sample_ids[turn]
    first, last = int(sample_ids[0]), int(sample_ids[-1])
    faults = tuple(fault for fault in tiles.faults if first <= fault.sample_id <= last)
    return MicroBatch(chapter.replica, sample_ids, tiles.tiles[turn], tiles.mpp[turn], tiles.slides[turn], faults)
