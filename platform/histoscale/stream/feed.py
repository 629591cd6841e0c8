"""The feed: the chapters of the plan through Ray Data, to each rank its own, in order, checked against the plan.

One read task yields the rows of the plan, a pool of reader actors turns each row into one block, order is kept,
and a split in equal shares deals the blocks to the ranks in turn. Ray calls `PlanFeed.configure` at each start of
the worker group with the world size of that start: there the stream begins again at the committed step.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, DataIterator, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig

from histoscale.config.recipe import Recipe
from histoscale.errors import HistoscaleError, StreamError
from histoscale.sampling.plan import Plan
from histoscale.sampling.replicas import replicas_of
from histoscale.stream.chapters import Chapter, chapters, deal, open_block
from histoscale.stream.reader import Reader, ReaderSpec

DATASET = "tiles"
"""Name of the dataset: `ray.train.get_dataset_shard(DATASET)` is what `RankFeed` takes."""

PLANNER_CPUS = 0.1  # the read task only counts


@dataclass(frozen=True)
class FeedSpec:
    """Everything that the feed of a run is made of; can be pickled.

    Attributes:
        plan: The plan of the run.
        steps: The step at which the run ends.
        reader: Where the slides are.
        readers: Reader actors, one CPU each.
    """

    plan: Plan
    steps: int
    reader: ReaderSpec
    readers: int

    @classmethod
    def from_recipe(cls, recipe: Recipe, plan: Plan, index_uri: str, cache_folder: Path) -> Self:
        """The feed of a recipe; `cluster.slide_cache_gb` is shared out among the readers."""
        cache_bytes = int(recipe.cluster.slide_cache_gb * 1e9) // recipe.cluster.readers
        return cls(plan, recipe.steps, ReaderSpec(index_uri, cache_folder, cache_bytes), recipe.cluster.readers)


@dataclass(frozen=True)
class MicroBatch:
    """The tiles of one replica of one step.

    Attributes:
        replica: Which replica.
        sample_ids: int64 [b].
        tiles: uint8 [b, R, R, 3], a read-only view of Ray's object store.
        mpp: float64 [b].
        slides: int32 [b], rows of `Plan.slide_ids`.
    """

    replica: int
    sample_ids: NDArray[np.int64]
    tiles: NDArray[np.uint8]
    mpp: NDArray[np.float64]
    slides: NDArray[np.int32]


def open_feed(spec: FeedSpec, workers: int, start_step: int) -> list[DataIterator]:
    """One iterator for each rank over its blocks from `start_step` on; reading starts when all ranks iterate."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # bytes: every row becomes a block
    context.execution_no_progress_timeout_s = -1  # a rank may pause for an evaluation
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    with DataContext.current(context):
        rows = ray.data.read_datasource(
            _PlanRows(spec, workers, start_step), override_num_blocks=1, num_cpus=PLANNER_CPUS
        )
        blocks = rows.map_batches(
            Reader,
            fn_constructor_args=(ray.put(spec.plan), spec.reader),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=spec.readers),
            num_cpus=1,
        )
        iterators: list[DataIterator] = blocks.streaming_split(workers, equal=True)
        return iterators


class PlanFeed(DataConfig):
    """How Ray Train gets the tiles: pass it as `dataset_config`, with `placeholder()` as `datasets`.

    Args:
        spec: The feed of the run.
        committed_step: Called at each start of the worker group, in another process: the step to start from.
    """

    def __init__(self, spec: FeedSpec, committed_step: Callable[[], int]) -> None:
        super().__init__()
        self._spec = spec
        self._committed_step = committed_step

    @staticmethod
    def placeholder() -> dict[str, Callable[[], Dataset]]:
        """The `datasets` of the trainer: Ray Train asks for the feed only where there is a dataset to split."""
        return {DATASET: partial(ray.data.range, 1)}

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: object, **kwargs: object
    ) -> list[dict[str, DataIterator]]:
        """Lay the plan out for this world size, from the committed step on."""
        iterators = open_feed(self._spec, world_size, self._committed_step())
        return [{DATASET: iterator} for iterator in iterators]


class RankFeed:
    """The micro-batches of one rank, step by step; holds one chapter of each of its replicas.

    Args:
        iterator: This rank's share of the feed.
        plan: The plan of the run.
        rank: Which rank.
        workers: The world size.
        start_step: The step from which the run goes on.
        steps: The step at which it ends.
    """

    def __init__(
        self, iterator: DataIterator, plan: Plan, rank: int, workers: int, start_step: int, steps: int
    ) -> None:
        self.wait_s = 0.0
        """Seconds that the last call of `micro_batches` waited for blocks."""
        self._plan = plan
        self._replicas = replicas_of(rank, workers, plan.spec.replicas)
        self._turns = chapters(None, start_step, steps, plan.spec.chapter_steps)
        # While one chapter is trained on, the whole next one may wait on this node.
        batches = iterator.iter_batches(
            batch_size=None,  # type: ignore[arg-type]  # whole blocks; Ray's annotation lacks it
            batch_format="pyarrow",
            prefetch_batches=len(self._replicas),
        )
        self._blocks: Iterator[pa.Table] = iter(batches)
        self._next_step = start_step
        self._held: list[tuple[Chapter, NDArray[np.uint8]]] = []

    def micro_batches(self, step: int) -> list[MicroBatch | None]:
        """The micro-batches of this rank in the order of `replicas_of`; None is padding, of weight zero.

        Raises:
            StreamError: A step out of turn, a block that is not the one of the plan, or no block.
            SlideError: A reader could not read a slide.
            StorageError: A reader could not fetch a slide.
            SlideIndexError: A reader could not read the index.
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
        return [self._micro_batch(step, chapter, tiles) for chapter, tiles in self._held]

    def _receive(self, turn: Chapter, replica: int | None) -> tuple[Chapter, NDArray[np.uint8]]:
        expected = Chapter(turn.number, replica, turn.first_step, turn.last_step)
        sample_ids = np.empty((0, 0), np.int64)
        if replica is not None:
            sample_ids = np.stack([self._plan.sample_ids(step, replica) for step in expected.steps])
        return expected, open_block(self._next_block(expected), expected, sample_ids, self._plan.spec.region_px)

    def _next_block(self, expected: Chapter) -> pa.Table:
        try:
            return next(self._blocks)
        except StopIteration:
            raise StreamError("the feed ended too early", expected=str(expected)) from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, HistoscaleError):
                raise error.cause from None
            raise

    def _micro_batch(self, step: int, chapter: Chapter, tiles: NDArray[np.uint8]) -> MicroBatch | None:
        if chapter.replica is None:
            return None
        planned = self._plan.micro_batch(step, chapter.replica)
        own = tiles[step - chapter.first_step]
        return MicroBatch(chapter.replica, planned.sample_ids, own, planned.mpp, planned.slides)


class _PlanRows(Datasource):
    """The rows of the plan in stream order, from one task that makes them as they are asked for."""

    def __init__(self, spec: FeedSpec, workers: int, start_step: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = partial(deal, spec.plan.spec, workers, start_step, spec.steps)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_tables, self._rows), metadata)]


def _tables(rows: Callable[[], Iterable[Chapter]]) -> Iterator[pa.Table]:
    for chapter in rows():
        yield chapter.to_row()
