"""From a recipe, an index and a run folder to a trained run: the driver's side."""

import contextlib
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import ray
import torch
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from histoscale.checkpoint.parent import Parent
from histoscale.checkpoint.reader import latest_commit
from histoscale.cluster.bad_slides import BadSlides
from histoscale.cluster.control import ControlHandle, Progress, Wish, start_control
from histoscale.cluster.failures import ElasticTorchTrainer, diagnosis_in
from histoscale.cluster.fork import ForkSource, origin_of, require_same_parent
from histoscale.cluster.lease import Lease
from histoscale.cluster.plan_lines import describe_plan
from histoscale.cluster.resources import resolve_device, trainer_nodes, wait_for_resources, worker_resources
from histoscale.cluster.run_folder import (
    DEFAULT_PRECISION,
    check_same_experiment,
    read_run,
    recorded_snapshot,
    resolve_precision,
    start_run,
)
from histoscale.cluster.segments import next_segments, out_from, read_segments, write_segments
from histoscale.cluster.worker import WorkerSpec, train_worker
from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.errors import RunError
from histoscale.models.published import describe_published, load_published
from histoscale.observe.timeline import Event, Kind, Timeline
from histoscale.sampling.plan import Plan
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.catalogue import Catalogue, open_catalogue
from histoscale.slides.exclusions import read_exclusions
from histoscale.storage import Store, open_store
from histoscale.stream.faults import Quarantined
from histoscale.stream.reader import ReaderSpec
from histoscale.stream.windows import FeedSpec, start_feed
from histoscale.train.memory import MemoryForecast, forecast
from histoscale.train.teacher_source import describe_teacher, find_teacher

_POLL_S = 0.5


@dataclass(frozen=True)
class PretrainRequest:
    """One call of the job: what to train, on which slides, into which folder, for whom, from which checkpoint."""

    recipe: Recipe
    index_uri: str
    run_uri: str
    holder: str
    fork_from: ForkSource | None = None


@dataclass(frozen=True)
class CheckedRequest:
    """A request whose recipe, index, teacher and run folder fit each other; nothing was written yet.

    Attributes:
        origins: Lines that tell of the parent of a fork, of the frozen teacher and of published weights, where there
            are such.
        parent: The checkpoint that the run begins from, or began from.
    """

    request: PretrainRequest
    store: Store
    catalogue: Catalogue
    plan: Plan
    origins: tuple[str, ...]
    parent: Parent | None = None


@dataclass(frozen=True)
class PretrainOutcome:
    """How a call ended: at which step of how many, and whether a stop was asked for."""

    step: int
    steps: int
    stopped: bool


def check_request(request: PretrainRequest) -> CheckedRequest:
    """Check what can be checked without a cluster.

    Raises:
        HistoscaleError: The index cannot be read, no slide serves a magnification, the parent, the frozen teacher or
            the published weights cannot be used, or the run folder is another's.
    """
    store = open_store(request.run_uri)
    # A run keeps to the snapshot that it began with, however the index has grown since.
    catalogue = open_catalogue(request.index_uri, recorded_snapshot(store))
    spec = PlanSpec.from_recipe(request.recipe)
    plan = Plan(spec, catalogue.rows, catalogue.columns, catalogue.values, catalogue.mask)
    parent, lineage = origin_of(request.fork_from, request.recipe, store)
    checked = CheckedRequest(request, store, catalogue, plan, (*lineage, *_origins(request.recipe)), parent)
    _resumed_recipe(checked)
    return checked


def _origins(recipe: Recipe) -> tuple[str, ...]:
    """What the run learns from beside slides, found and read before a worker starts."""
    lines = []
    if recipe.distill is not None:
        lines.append(describe_teacher(find_teacher(recipe, recipe.distill), recipe.distill))
    model = recipe.model
    if model.weights is not None:
        published = load_published(model.weights, ARCHS[model.arch], recipe.crops.global_px, model.qk_norm)
        lines.append(describe_published(model.weights, published))
    return tuple(lines)


def _resumed_recipe(checked: CheckedRequest) -> Recipe | None:
    """The request's recipe for the run that stands in its folder, or None where none does."""
    stored = read_run(checked.store)
    if stored is None:
        return None
    recipe = resolve_precision(checked.request.recipe, stored.precision)
    check_same_experiment(checked.store, recipe, stored, checked.catalogue.snapshot_id)
    require_same_parent(checked.store, checked.request.fork_from)
    return recipe


def pretrain(checked: CheckedRequest, tell: Callable[[str], None]) -> PretrainOutcome:
    """Train the run to its end, from its last commit on.

    Args:
        checked: What to train.
        tell: Called with one line at a time for a person to read.

    Raises:
        HistoscaleError: Whatever is wrong with the lease, the cluster or the training.
    """
    request, store, catalogue = checked.request, checked.store, checked.catalogue
    device = resolve_device(request.recipe.cluster)
    with Lease(store, request.holder) as lease:
        recipe = _resumed_recipe(checked)  # once more: the run may have been started since it was checked
        commit = latest_commit(store) if recipe else None
        start = commit.step if commit else 0
        if start >= request.recipe.steps:
            tell(f"run {store.uri} is complete: {start} steps")
            return PretrainOutcome(start, request.recipe.steps, stopped=False)
        wait_for_resources(request.recipe.cluster, device, tell)
        if recipe is None:
            recipe = resolve_precision(request.recipe, DEFAULT_PRECISION[device])
            start_run(store, recipe, request.index_uri, catalogue.snapshot_id, checked.origins, checked.parent)
        quarantine = commit.quarantine if commit else ()
        feed = _feed(checked, recipe, start, quarantine, device)
        tell(f"plan {checked.plan.fingerprint(catalogue.snapshot_id)} over snapshot {catalogue.snapshot_id}")
        for line in describe_plan(checked.plan.report()):
            tell(line)
        for line in checked.origins:
            tell(line)
        if recipe.distill is None:
            tell(f"memory: {_memory(recipe, device).line()}")
        tell(f"{'resuming' if start else 'starting'} at step {start} of {recipe.steps} on {device}, {recipe.precision}")
        bad_slides = BadSlides(recipe.stream, len(catalogue.rows), quarantine, tell)
        with _recorded(store, recipe, start):
            _run_to_the_end(store, recipe, device, feed, _Watched(lease, bad_slides, tell))
        for line in bad_slides.summary():
            tell(line)
        if bad_slides.error is not None:
            raise bad_slides.error
        step = _committed_step(store)
        return PretrainOutcome(step, recipe.steps, stopped=step < recipe.steps)


@contextlib.contextmanager
def _recorded(store: Store, recipe: Recipe, start: int) -> Iterator[None]:
    """Tell the timeline of the run when a job takes it and lets go of it."""
    timeline, workers = Timeline(store), recipe.cluster.workers
    timeline.tell(Event(Kind.START, time.time(), start, workers))
    step, reason = start, "the job failed"
    try:
        yield
        step = _committed_step(store)
        reason = "complete" if step >= recipe.steps else "asked to stop"
    finally:
        kind = Kind.END if step >= recipe.steps else Kind.STOP
        timeline.tell(Event(kind, time.time(), step, workers, reason))
        timeline.close()


def _memory(recipe: Recipe, device: str) -> MemoryForecast:
    cluster, dtype = recipe.cluster, torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    on: Literal["cpu", "cuda"] = "cuda" if device == "cuda" else "cpu"
    return forecast(recipe, ARCHS[recipe.model.arch], cluster.workers, cluster.zero_stage, dtype, on)


def _committed_step(store: Store) -> int:
    commit = latest_commit(store)
    return commit.step if commit else 0


def _feed(
    checked: CheckedRequest, recipe: Recipe, start: int, quarantine: tuple[Quarantined, ...], device: str
) -> FeedSpec:
    """The feed from a committed step on; exclusions that came since the run last began open a plan segment."""
    index_uri = checked.request.index_uri
    withdrawn = {slide_id for one in read_exclusions(open_store(index_uri)) for slide_id in one.slide_ids}
    segments = next_segments(read_segments(checked.store), start, filter(checked.catalogue.has, withdrawn))
    write_segments(checked.store, segments)
    out = out_from(segments, quarantine)
    reader = ReaderSpec.from_recipe(recipe, index_uri, checked.catalogue.snapshot_id, out)
    return FeedSpec(recipe.steps, reader, recipe.cluster.reader_bounds, first_on=trainer_nodes(device))


@dataclass(frozen=True)
class _Watched:
    """What the driver looks at, and tells of, while the workers run."""

    lease: Lease
    bad_slides: BadSlides
    tell: Callable[[str], None]


def _run_to_the_end(store: Store, recipe: Recipe, device: str, feed: FeedSpec, watched: _Watched) -> None:
    control = start_control()
    spec = WorkerSpec(recipe, store.uri, device, feed, start_feed(feed), control)
    cluster = recipe.cluster
    with tempfile.TemporaryDirectory(prefix="histoscale-train-") as scratch, _watching(control, watched):
        trainer = ElasticTorchTrainer(
            train_worker,
            train_loop_config={"spec": spec},
            torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=cluster.workers,
                use_gpu=device == "cuda",
                resources_per_worker=worker_resources(cluster, device),
            ),
            run_config=RunConfig(
                name="attempt",
                storage_path=scratch,
                # Ray tries for ever to start workers unless it is given a limit.
                failure_config=FailureConfig(
                    max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
                ),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _explain(error, cluster.max_failures) from error


def _explain(error: TrainingFailedError, max_failures: int) -> Exception:
    diagnosis = diagnosis_in(error)
    if diagnosis is not None:
        return diagnosis
    last_line = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
    return RunError(
        f"the workers failed more often than cluster.max_failures = {max_failures} allows",
        value=last_line,
        expected="workers that live",
        remedy="see the job's log for the reason, then run the same command again to resume from the last commit",
    )


@contextlib.contextmanager
def _watching(control: ControlHandle, watched: _Watched) -> Iterator[None]:
    """Show progress, and pass on why the run should stop.

    A SIGTERM and too many bad slides become the wish to commit and stop, a lost lease the wish to abandon the run.
    """
    asked, done = threading.Event(), threading.Event()
    lease, bad_slides, tell = watched.lease, watched.bad_slides, watched.tell

    def show(printer: _ProgressPrinter, last: bool = False) -> None:
        told = ray.get(control.drain.remote())
        bad_slides.take(told.faults)
        printer.show(told.progress, last)

    def watch() -> None:
        printer = _ProgressPrinter(tell)
        passed_on = Wish.GO_ON
        while not done.wait(_POLL_S):
            stop = asked.is_set() or bad_slides.error is not None
            wish = Wish.ABANDON if lease.lost else Wish.COMMIT_AND_STOP if stop else Wish.GO_ON
            if wish is not passed_on:
                tell(f"asking the workers to {wish.value}")
                ray.get(control.want.remote(wish))
                passed_on = wish
            show(printer)
        show(printer, last=True)

    def on_signal(number: int, frame: FrameType | None) -> None:
        asked.set()

    watcher = threading.Thread(target=watch, name="watch", daemon=True)
    previous = signal.signal(signal.SIGTERM, on_signal)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        signal.signal(signal.SIGTERM, previous)


class _ProgressPrinter:
    """At most one line in two seconds, and every committed step; steps that come again tell of a restart."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._next_s = 0.0
        self._last_step = 0
        self._first: tuple[int, float] | None = None

    def show(self, told: list[Progress], last: bool = False) -> None:
        for progress in told:
            now_s = time.monotonic()
            if progress.step <= self._last_step:
                self._tell(f"the workers were started again and go on from step {progress.step - 1}")
                self._first = None
            self._last_step = progress.step
            self._first = self._first or (progress.step, now_s)
            if progress.note or now_s >= self._next_s or (last and progress is told[-1]):
                self._next_s = now_s + 2.0
                self._tell(self._line(progress, now_s))

    def _line(self, progress: Progress, now_s: float) -> str:
        first_step, first_s = self._first or (progress.step, now_s)
        steps_done = progress.step - first_step
        eta = "" if not steps_done else _eta((now_s - first_s) / steps_done * (progress.steps - progress.step))
        losses = " ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
        note = f" | {progress.note}" if progress.note else ""
        return (
            f"step {progress.step}/{progress.steps} | {losses} | lr {progress.lr:.2e}"
            f" | {progress.tiles_per_s:.1f} tiles/s, {progress.wait_share:.0%} waiting{eta}{note}"
        )


def _eta(seconds: float) -> str:
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f" | ETA {hours}:{minutes:02d}:{seconds_left:02d}"
