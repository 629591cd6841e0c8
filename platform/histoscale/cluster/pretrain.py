"""From a recipe, an index and a run folder to a trained run: the driver's side."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from histoscale.checkpoint.parent import Parent
from histoscale.checkpoint.reader import latest_commit
from histoscale.checkpoint.run_record import recorded_origins
from histoscale.cluster.bad_slides import BadSlides
from histoscale.cluster.evaluator import evaluating
from histoscale.cluster.fork import ForkSource, origin_of, require_same_parent
from histoscale.cluster.launch import run_workers
from histoscale.cluster.lease import Lease
from histoscale.cluster.plan_lines import describe_plan
from histoscale.cluster.provenance import record_provenance
from histoscale.cluster.resources import resolve_device, trainer_nodes, wait_for_resources
from histoscale.cluster.run_folder import (
    DEFAULT_PRECISION,
    check_same_experiment,
    committed_step,
    read_run,
    recorded_snapshot,
    resolve_precision,
    start_run,
)
from histoscale.cluster.segments import next_segments, out_from, read_segments, write_segments
from histoscale.cluster.tracking import tracked
from histoscale.cluster.watching import Watched
from histoscale.config.recipe import Recipe
from histoscale.errors import CheckpointError, HistoscaleError, StorageError
from histoscale.evaluate.datasets import open_dataset
from histoscale.models.published import describe_published, load_for
from histoscale.observe.mlflow_sink import require_client
from histoscale.observe.run_report import write_report
from histoscale.observe.timeline import Event, Kind, Timeline
from histoscale.sampling.plan import Plan
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.tile_groups import SlideStrata
from histoscale.slides.catalogue import Catalogue, open_catalogue
from histoscale.slides.exclusions import read_exclusions
from histoscale.storage import Store, open_store
from histoscale.stream.faults import Quarantined
from histoscale.stream.reader import ReaderSpec
from histoscale.stream.windows import FeedSpec
from histoscale.train.memory import MemoryForecast, forecast
from histoscale.train.teacher_source import Teacher, describe_teacher, find_teacher, taught_by


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
        teacher: The frozen one of a distillation.
        datasets: What checkpoints are evaluated on: URI -> name.
    """

    request: PretrainRequest
    store: Store
    catalogue: Catalogue
    plan: Plan
    origins: tuple[str, ...]
    parent: Parent | None
    teacher: Teacher | None
    datasets: Mapping[str, str]


@dataclass(frozen=True)
class PretrainOutcome:
    """How a call ended: at which step of how many, and whether a stop was asked for."""

    step: int
    steps: int
    stopped: bool


def check_request(request: PretrainRequest) -> CheckedRequest:
    """Check what can be checked without a cluster.

    Raises:
        HistoscaleError: The index cannot be read, no slide serves a magnification, the parent, the frozen teacher, the
            published weights or a dataset of the evaluation cannot be used, the run folder is another's, or MLflow's
            client is not installed.
    """
    require_client(request.recipe.tracking)
    store = open_store(request.run_uri)
    # A run keeps to the snapshot that it began with, however the index has grown since.
    catalogue = open_catalogue(request.index_uri, recorded_snapshot(store))
    spec = PlanSpec.from_recipe(request.recipe)
    plan = Plan(spec, catalogue.rows, catalogue.columns, catalogue.values, catalogue.mask)
    parent, lineage = origin_of(request.fork_from, request.recipe, store)
    distill = request.recipe.distill
    teacher = find_teacher(request.recipe, distill) if distill is not None else None
    origins = _origins(request.recipe, store, teacher, lineage)
    datasets = {uri: open_dataset(uri).name for uri in request.recipe.evaluation.datasets}
    checked = CheckedRequest(request, store, catalogue, plan, origins, parent, teacher, datasets)
    _resumed_recipe(checked)
    return checked


def _origins(recipe: Recipe, store: Store, teacher: Teacher | None, lineage: tuple[str, ...]) -> tuple[str, ...]:
    """What the run learns from beside slides; published weights are read for it, before a worker starts.

    A run that has a commit recorded what it began with, and only a teacher is still used.
    """
    if latest_commit(store) is not None:
        return tuple(recorded_origins(store))
    lines = list(lineage)
    if teacher is not None and recipe.distill is not None:
        lines.append(describe_teacher(teacher, recipe.distill))
    if recipe.model.weights is not None:
        lines.append(describe_published(recipe.model.weights, load_for(recipe, recipe.model.weights)))
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
    stored = read_run(checked.store)
    device = resolve_device(checked.request.recipe.cluster, (stored or checked.request.recipe).precision)
    tracking = checked.request.recipe.tracking
    with (
        Lease(checked.store, checked.request.holder) as lease,
        tracked(checked.store, tracking, tell, lost=lambda: lease.lost),
    ):
        while True:
            start = committed_step(checked.store)
            try:
                return _go_on(checked, device, lease, tell)
            except CheckpointError as error:
                # The workers have left out a commit that was corrupt: what follows the one before is planned anew.
                if committed_step(checked.store) >= start:
                    raise
                tell(f"warning: {error}")


def _go_on(checked: CheckedRequest, device: str, lease: Lease, tell: Callable[[str], None]) -> PretrainOutcome:
    """Train from the newest commit on."""
    request, store, catalogue = checked.request, checked.store, checked.catalogue
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
    record_provenance(store)
    quarantine = commit.quarantine if commit else ()
    feed = _feed(checked, recipe, start, quarantine, device)
    tell(f"plan {checked.plan.fingerprint(catalogue.snapshot_id)} over snapshot {catalogue.snapshot_id}")
    for line in describe_plan(checked.plan.report()):
        tell(line)
    for line in checked.origins:
        tell(line)
    tell(f"memory: {_memory(recipe, device, checked.teacher).line()}")
    tell(f"{'resuming' if start else 'starting'} at step {start} of {recipe.steps} on {device}, {recipe.precision}")
    bad_slides = BadSlides(recipe.stream, len(catalogue.rows), quarantine, tell)
    with _recorded(store, recipe, start) as timeline:
        watched = Watched(lease, bad_slides, recipe.cluster.silence_s, timeline, tell)
        with evaluating(store.uri, recipe, checked.datasets, tell):
            strata = SlideStrata.of(checked.plan.strata)
            run_workers(store.uri, recipe, device, start, feed, strata, watched)
    for line in bad_slides.summary():
        tell(line)
    if bad_slides.error is not None:
        raise bad_slides.error
    step = committed_step(store)
    _report(store, recipe, tell)
    return PretrainOutcome(step, recipe.steps, stopped=step < recipe.steps)


def _report(store: Store, recipe: Recipe, tell: Callable[[str], None]) -> None:
    """Write the run's report; that it cannot be is no failure of the run."""
    try:
        tell(f"report: {write_report(store, recipe, latest_commit(store))[0]}")
    except HistoscaleError as error:
        tell(f"warning: the run's report was not written: {error}")


@contextlib.contextmanager
def _recorded(store: Store, recipe: Recipe, start: int) -> Iterator[Timeline]:
    """Tell the timeline of the run when a job takes it and lets go of it."""
    timeline, workers = Timeline(store), recipe.cluster.worker_bounds[1]
    timeline.tell(Event(Kind.START, time.time(), start, workers))
    step, failed = start, True
    try:
        yield timeline
        failed = False
    finally:
        # The record of a run is worth less than what ends it: where this fails, the step is the one of the start.
        with contextlib.suppress(StorageError, CheckpointError):
            step = committed_step(store)
        kind, reason = (Kind.END, "complete") if step >= recipe.steps else (Kind.STOP, "asked to stop")
        timeline.tell(Event(kind, time.time(), step, workers, "the job failed" if failed else reason))
        timeline.close()


def _memory(recipe: Recipe, device: str, teacher: Teacher | None) -> MemoryForecast:
    taught = taught_by(recipe, teacher) if teacher is not None else None
    cluster, dtype = recipe.cluster, torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    on: Literal["cpu", "cuda"] = "cuda" if device == "cuda" else "cpu"
    return forecast(recipe, cluster.worker_bounds[0], cluster.zero_stage, dtype, on, taught)


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
