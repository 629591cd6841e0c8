"""A run's stream in windows of bounded length: each is a Ray Data pipeline of its own.

Ray's coordinator grows by some kilobytes for each block that it has dealt, so one pipeline cannot carry a run of
sixty million blocks. A window is opened while the one before still runs; its coordinator goes when the ranks have
let go of it, so that the last window of a long run finds the memory that the first one found.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, DataIterator, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from histoscale.sampling.spec import PlanSpec
from histoscale.stream.chapters import Chapter, deal
from histoscale.stream.reader import Reader, ReaderSpec

PLANNER_CPUS = 0.1  # the read task only counts
WINDOW_BLOCKS = 20_000  # at some 4 KB for each in the coordinator
_CALLS_AT_ONCE = 2  # of a reader: one waits for bytes while the other decodes
_CALLS_QUEUED = 4

FeedMasterHandle: TypeAlias = Any
"""A handle of the FeedMaster actor; its methods exist only at run time."""


@dataclass(frozen=True)
class FeedSpec:
    """Everything that the feed of a run is made of; small, can be pickled.

    Attributes:
        steps: The step at which the run ends.
        reader: What the readers read.
        readers: Least and largest number of reader actors, one CPU each.
        window_blocks: About how many blocks a window holds.
        first_on: Label selector of the nodes that readers fill first, before they go to others; empty is anywhere.
        read_with: The class of the readers; benchmarks put one that costs nothing in its place.
    """

    steps: int
    reader: ReaderSpec
    readers: tuple[int, int]
    window_blocks: int = WINDOW_BLOCKS
    first_on: Mapping[str, str] = field(default_factory=dict)
    read_with: type[Any] = Reader

    @property
    def plan(self) -> PlanSpec:
        """The spec of the plan."""
        return self.reader.plan

    def windows(self, start_step: int) -> Iterator[range]:
        """The steps of each window from `start_step` on; borders lie between chapters, at fixed steps of the run."""
        turns = max(1, self.window_blocks // self.plan.replicas)
        length = turns * self.plan.chapter_steps
        first = start_step
        while first < self.steps:
            last = min((first // length + 1) * length, self.steps)
            yield range(first, last)
            first = last


def open_window(spec: FeedSpec, workers: int, steps: range) -> list[DataIterator]:
    """One iterator for each rank over its blocks of a window; reading starts when all ranks iterate."""
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # bytes: every row becomes a block
    context.execution_no_progress_timeout_s = -1  # a rank may pause for an evaluation
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    least, most = spec.readers
    with DataContext.current(context):
        rows = ray.data.read_datasource(
            _PlanRows(spec.plan, workers, steps), override_num_blocks=1, num_cpus=PLANNER_CPUS
        )
        blocks = rows.map_batches(
            spec.read_with,
            fn_constructor_args=(spec.reader,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_tasks_in_flight_per_actor=_CALLS_QUEUED,
                max_concurrent_calls_per_actor=_CALLS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=1,
            **_placement(spec.first_on),
        )
        iterators: list[DataIterator] = blocks.streaming_split(workers, equal=True)
        return iterators


def _placement(first_on: Mapping[str, str]) -> dict[str, Any]:
    if not first_on:
        return {}
    return {"label_selector": dict(first_on), "fallback_strategy": [{"label_selector": {}}]}


class FeedMaster:
    """An actor that opens each window once, for whichever rank asks first, and hands every rank its share."""

    def __init__(self, spec: FeedSpec) -> None:
        self._spec = spec
        self._open: dict[tuple[str, range], list[DataIterator]] = {}

    def share(self, attempt: str, steps: range, rank: int, workers: int) -> DataIterator:
        """The share of one rank; `attempt` names a start of the worker group, which needs pipelines of its own."""
        name = (attempt, steps)
        if name not in self._open:
            # Shares of the window before may not all be taken yet; older ones and other attempts are over.
            self._open = {old: shares for old, shares in list(self._open.items())[-1:] if old[0] == attempt}
            self._open[name] = open_window(self._spec, workers, steps)
        return self._open[name][rank]

    def release(self) -> None:
        """Let all pipelines go, whose readers take CPUs that the workers of the next attempt may need."""
        self._open = {}


def start_feed(spec: FeedSpec) -> FeedMasterHandle:
    """Start the actor on this node; it takes no CPU and ends with the caller."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(FeedMaster).options(num_cpus=0, scheduling_strategy=here).remote(spec)


@dataclass(frozen=True)
class RankShare:
    """Where a rank gets its blocks from: one window after the other, of one attempt."""

    master: FeedMasterHandle
    attempt: str
    rank: int
    workers: int

    def open(self, steps: range, prefetch: int) -> Iterator[pa.Table]:
        """Blocks of a window; the first `next` waits until every rank has opened it."""
        share: DataIterator = ray.get(self.master.share.remote(self.attempt, steps, self.rank, self.workers))
        batches = share.iter_batches(
            batch_size=None,  # type: ignore[arg-type]  # whole blocks; Ray's annotation lacks it
            batch_format="pyarrow",
            prefetch_batches=prefetch,
        )
        return iter(batches)


class _PlanRows(Datasource):
    """The rows of the plan in stream order, from one task that makes them as they are asked for."""

    def __init__(self, plan: PlanSpec, workers: int, steps: range) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = partial(deal, plan, workers, steps.start, steps.stop)

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> list[ReadTask]:  # noqa: ARG002 - Ray's
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_tables, self._rows), metadata)]


def _tables(rows: "partial[Iterator[Chapter]]") -> Iterable[pa.Table]:
    for chapter in rows():
        yield chapter.to_row()
