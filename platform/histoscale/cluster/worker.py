"""What every worker of a run does: take its replicas' tiles, take the steps, commit, tell."""

import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import get_device

from histoscale.checkpoint.collective import on_first_rank
from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.retention import committed_steps
from histoscale.cluster.control import ControlHandle, ControlLine, Progress, Pulse, Wish, warnings_told
from histoscale.cluster.failures import Yielded
from histoscale.cluster.lease import require_lease, taken_over
from histoscale.cluster.run_folder import committed_step
from histoscale.cluster.way_back import way_back
from histoscale.config.recipe import Recipe
from histoscale.errors import CheckpointError, RunError, StorageError
from histoscale.observe.alarms import STARVATION, Alarms
from histoscale.observe.goodput import STALL_S, GoodputMeter
from histoscale.observe.metrics import MetricsWriter
from histoscale.observe.runaway import Ring
from histoscale.observe.timeline import Event, Kind, Timeline, wall_before
from histoscale.sampling.tile_groups import SlideStrata
from histoscale.storage import Store, open_store
from histoscale.stream.faults import Fault
from histoscale.stream.feed import MicroBatch, RankFeed
from histoscale.stream.windows import FeedMasterHandle, FeedSpec, RankShare
from histoscale.train.step import StepMetrics
from histoscale.train.trainer import Trainer, build_trainer


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker needs to know, the same for each of them.

    Attributes:
        committed_step: The step that the driver has planned from.
        lease_token: Of the driver's lease of the run.
        strata: Of the slides, whose losses are told apart.
    """

    recipe: Recipe
    run_uri: str
    device: str
    feed: FeedSpec
    feed_master: FeedMasterHandle
    control: ControlHandle
    committed_step: int
    lease_token: str
    strata: SlideStrata


def train_worker(config: dict[str, WorkerSpec]) -> None:
    """The function that Ray Train runs on every worker of every attempt."""
    spec = config["spec"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    with warnings_told(spec.control, rank):
        _train(spec, rank, workers)


def _train(spec: WorkerSpec, rank: int, workers: int) -> None:
    torch.set_num_threads(spec.recipe.cluster.cpus_per_worker)
    pulse = Pulse(spec.control, rank)  # before anything that waits for others, or that may stand still itself
    try:
        store = open_store(spec.run_uri)
        device = get_device() if spec.device == "cuda" else torch.device("cpu")
        attempt, expected = on_first_rank(lambda: (secrets.token_hex(8), committed_step(store)))
        with contextlib.ExitStack() as stack:
            feed = stack.enter_context(_feed(spec, attempt, rank, workers, expected))
            feed.begin()  # readers start while the network is built and its state is read
            fence = partial(require_lease, store, spec.lease_token)
            trainer = build_trainer(spec.recipe, device, store, fence, spec.strata)
            start = trainer.resume()
            _require_planned(spec, start)
            if start != expected:
                feed.close()
                feed = stack.enter_context(_feed(spec, f"{attempt}-from-{start}", rank, workers, start))
            if rank == 0:
                _lead(spec, trainer, feed, start)
            else:
                _follow(spec, trainer, feed, start)
    finally:
        pulse.stop()


def _feed(spec: WorkerSpec, attempt: str, rank: int, workers: int, start: int) -> "contextlib.closing[RankFeed]":
    return contextlib.closing(RankFeed(spec.feed, RankShare(spec.feed_master, attempt, rank, workers), start))


def _require_planned(spec: WorkerSpec, start: int) -> None:
    """Refuse steps that come before those of the driver's plan, in which slides may have been withdrawn since."""
    if start < spec.committed_step:
        raise CheckpointError(
            f"the checkpoint of step {spec.committed_step} of {spec.run_uri} is corrupt and was left out",
            value=f"step {start}",
            expected=f"step {spec.committed_step}",
            remedy="run the same command again, which goes on from the one before",
        )


def _follow(spec: WorkerSpec, trainer: Trainer, feed: RankFeed, start: int) -> None:
    for step in range(start, spec.recipe.steps):
        micro_batches = feed.micro_batches(step)
        _tell_faults(spec, micro_batches)
        metrics = trainer.step(step, micro_batches)
        _commit_if_due(spec.recipe, trainer, step, metrics)
        if metrics.stop:
            _leave(None)
            return


def _lead(spec: WorkerSpec, trainer: Trainer, feed: RankFeed, start: int) -> None:
    line, store = ControlLine(spec.control), open_store(spec.run_uri)
    writer, timeline = MetricsWriter(store, start), Timeline(store)
    meter = GoodputMeter(writer.useful_s, wall_before(store, time.time()), time.monotonic())
    timeline.tell(_resumed(spec, start))
    stall_s = stalled_s = 0.0
    clock = _Clock(spec.recipe.batch.tiles)
    alarms, alarm = Alarms(spec.recipe, writer.last), ""
    taken_over = False
    try:
        for step in range(start, spec.recipe.steps):
            _require_the_run(line, spec.run_uri)
            micro_batches = feed.micro_batches(step)
            _tell_faults(spec, micro_batches)
            metrics = trainer.step(step, micro_batches, stop_requested=line.wish.commits or bool(alarm))
            timing = clock.tick(feed.wait_s) | {STALL_S: stall_s}
            goodput = {"progress/goodput": meter.add(timing, time.monotonic())}
            values = _scalars(metrics) | timing | goodput
            writer.write(step, values)
            begun_s = time.monotonic()
            committed = _commit_if_due(spec.recipe, trainer, step, metrics, writer)
            stall_s = time.monotonic() - begun_s
            stalled_s += stall_s
            if committed:
                workers = dist.get_world_size()
                timeline.tell(Event(Kind.COMMIT, time.time(), committed.step, workers, stall_s=stalled_s))
                stalled_s = 0.0
            notes = [_warning(spec, store, ring) for ring in alarms.update({"step": step, **values})]
            for note in notes:
                said = note.removeprefix("warning: ")
                timeline.tell(Event(Kind.ALARM, time.time(), step + 1, dist.get_world_size(), said))
            if notes and spec.recipe.on_alarm == "stop":
                alarm = alarm or notes[0]
            if committed:
                notes.append(f"checkpoint committed, of step {committed.step}")
            line.tell(_progress(spec.recipe, step, metrics, timing, "; ".join(notes)))
            if metrics.stop:
                _leave(line.wish, alarm)
                return
    except RunError:
        taken_over = not alarm
        raise
    finally:
        writer.close(publish=not taken_over)
        timeline.close()


def _warning(spec: WorkerSpec, store: Store, ring: Ring) -> str:
    """What an alarm says, and the command that goes back before what it is about."""
    if ring.alarm == STARVATION:
        return f"warning: {ring.said}"
    try:
        steps = committed_steps(store)
    except StorageError as error:
        return f"warning: {ring.said}. Its checkpoints cannot be listed: {error}"
    return f"warning: {ring.said}. {way_back(spec.recipe, spec.run_uri, spec.feed.reader.index_uri, steps, ring.since)}"


def _resumed(spec: WorkerSpec, start: int) -> Event:
    """The event of workers that are ready, with what the group before has lost, where there was one in this job."""
    before: tuple[int, float] | None = ray.get(spec.control.last_step.remote())
    workers = dist.get_world_size()
    if before is None:
        return Event(Kind.RESUME, time.time(), start, workers)
    step, since_s = before
    return Event(Kind.RESUME, time.time(), start, workers, restart_s=since_s, steps_redone=max(0, step - start))


def _leave(wish: Wish | None, alarm: str = "") -> None:
    """End the run by returning, or by an alarm, or the attempt alone by raising (collective).

    Args:
        wish: What the first rank was asked for; not looked at on others.
        alarm: What has rung there, if that is to end the run; likewise.

    Raises:
        RunError: An alarm ends the run.
        Yielded: The attempt ends, and another one begins.
    """
    rung = on_first_rank(lambda: alarm)
    if rung:
        raise RunError(
            "an alarm has stopped the run, whose last step is committed",
            value=rung.removeprefix("warning: "),
            expected="a healthy run, or on_alarm=warn",
            remedy="do as the alarm says, or run the same command with --set on_alarm=warn to go on",
        )
    if on_first_rank(lambda: wish) is Wish.COMMIT_AND_RESTART:
        raise Yielded("committed, to start again")


def _tell_faults(spec: WorkerSpec, micro_batches: Sequence[MicroBatch | None]) -> None:
    """Every rank tells its own; the driver counts slides, and stops the run where there are too many bad ones."""
    faults: list[Fault] = [fault for batch in micro_batches if batch is not None for fault in batch.faults]
    if faults:
        spec.control.tell_faults.remote(faults)


def _require_the_run(line: ControlLine, run_uri: str) -> None:
    if line.wish is Wish.ABANDON:
        raise taken_over(run_uri)


def _commit_if_due(
    recipe: Recipe, trainer: Trainer, step: int, metrics: StepMetrics, writer: MetricsWriter | None = None
) -> Commit | None:
    """Move on with checkpoints after a step; answers the commit that has come to be, if one has.

    What was measured of the steps of a commit is in the run folder before it: a resume could not measure it again.
    """
    done = step + 1
    last = done == recipe.steps or metrics.stop
    if not last and done % recipe.checkpoint.every_steps:
        return trainer.settle(wait=False)
    first = writer.flush() if writer is not None else None
    return trainer.save(done, first) if last else trainer.begin_save(done, first)


def _progress(recipe: Recipe, step: int, metrics: StepMetrics, timing: dict[str, float], note: str) -> Progress:
    return Progress(
        step=step + 1,
        steps=recipe.steps,
        losses={"loss": metrics.loss, **metrics.terms},
        lr=metrics.lr,
        tiles_per_s=timing["time/tiles_per_s"],
        wait_share=timing["time/wait_share"],
        note=note,
    )


def _scalars(metrics: StepMetrics) -> dict[str, float]:
    return {
        "loss/total": metrics.loss,
        **{f"loss/{name}": value for name, value in metrics.terms.items()},
        "health/mean_cosine": metrics.mean_cosine,
        "optim/grad_norm": metrics.grad_norm,
        "optim/lr": metrics.lr,
        "optim/weight_decay": metrics.weight_decay,
        "optim/ema_momentum": metrics.ema_momentum,
        "optim/teacher_temperature": metrics.teacher_temperature,
        "progress/images_seen": float(metrics.images_seen),
        **metrics.groups,
        **metrics.watched,
    }


class _Clock:
    """Seconds per step, and the share of them that went into waiting for tiles."""

    def __init__(self, tiles: int) -> None:
        self._tiles = tiles
        self._last_s = time.monotonic()

    def tick(self, wait_s: float) -> dict[str, float]:
        now_s = time.monotonic()
        step_s, self._last_s = now_s - self._last_s, now_s
        return {
            "time/step_s": step_s,
            "time/wait_s": wait_s,
            "time/wait_share": min(1.0, wait_s / step_s),
            "time/tiles_per_s": self._tiles / step_s,
        }
