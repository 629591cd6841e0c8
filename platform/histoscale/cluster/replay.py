"""Runs a captured step again: one process, the state of the capture, the tiles of the plan, no Ray.

Nothing is written to the run. The slides that were withdrawn since are not read, whatever the step had of them.
"""

import gc
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from histoscale.checkpoint.capture import FOLDER, Capture, CapturedBatch, read_capture
from histoscale.cluster.replay_report import (
    Replayed,
    TileFacts,
    describe_capture,
    describe_reading,
    describe_rerun,
    diagnose,
    find_origin,
    tile_facts,
)
from histoscale.cluster.run_folder import recorded_snapshot, require_run
from histoscale.cluster.segments import next_segments, out_from, read_segments
from histoscale.config.decode import decode_recipe, fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import CheckpointError, ClusterError
from histoscale.slides.catalogue import Catalogue, open_catalogue
from histoscale.slides.exclusions import read_exclusions
from histoscale.storage import Store, open_store
from histoscale.stream.chapters import Chapter
from histoscale.stream.feed import MicroBatch
from histoscale.stream.reader import Reader, ReaderSpec
from histoscale.train.rerun import Audit, Rerun, audit_state, rerun_step
from histoscale.train.trainer import build_trainer

_READS_AT_ONCE = 8
_ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@dataclass(frozen=True)
class ReplayRequest:
    """One call of the replay.

    Attributes:
        capture_uri: The capture, in its run folder.
        index_uri: The index that the run was started on.
        device: `auto`, `cpu` or `cuda`.
        overrides: Of the run's recipe, as `field=value`.
    """

    capture_uri: str
    index_uri: str
    device: str = "auto"
    overrides: tuple[str, ...] = ()


def replay(request: ReplayRequest) -> Iterator[str]:
    """Run the step again and tell, line by line, where it stops being finite, and what to do.

    Raises:
        CheckpointError: The capture is torn, damaged, of another recipe or of another network.
        HistoscaleError: The run folder, the index or a slide cannot be read.
    """
    run_uri, folder = split_uri(request.capture_uri)
    store = open_store(run_uri)
    capture = read_capture(store, folder)
    recipe = _recipe_of(store, capture, request.overrides)
    device = _device(request.device)
    yield from describe_capture(capture)
    catalogue = open_catalogue(request.index_uri, recorded_snapshot(store))
    tiles = read_step(store, recipe, capture, catalogue)
    changed = changed_replicas(capture, tiles)
    yield describe_reading(tiles, changed)
    with _process_group(device):
        audit, rerun = _rerun(store, recipe, capture, tiles, device)
        yield from describe_rerun(audit, rerun, str(device))
        finer = None
        if rerun.failure is not None and rerun.precision == "bf16":
            _, finer = _rerun(store, recipe.model_copy(update={"precision": "fp32"}), capture, tiles, device)
            yield f"the same in fp32: {'not finite either' if finer.failure else 'finite'}"
    origin = find_origin(rerun)
    yield from _facts_of(origin.replicas, tiles, catalogue)
    found = Replayed(audit, rerun, finer, len(tiles), bool(changed), request.overrides)
    yield from diagnose(found, origin)


def split_uri(capture_uri: str) -> tuple[str, str]:
    """Run folder of a capture, and the capture's own folder in it.

    Raises:
        CheckpointError: It cannot be a capture's place.
    """
    run_uri, separator, name = capture_uri.rstrip("/").rpartition(f"/{FOLDER}")
    if not separator or not run_uri or not name or "/" in name:
        raise CheckpointError(
            "this is not the place of a capture",
            value=capture_uri,
            expected=f"RUN/{FOLDER}step-...",
            remedy="give the folder that the error of the run named",
        )
    return run_uri, FOLDER + name


def read_step(store: Store, recipe: Recipe, capture: Capture, catalogue: Catalogue) -> list[MicroBatch]:
    """The tiles of a captured step, read by the plan of the run at that step.

    Raises:
        CheckpointError: The plan gives the step other samples.
        HistoscaleError: The index or a slide cannot be read.
    """
    step = capture.state.step
    withdrawn = {slide_id for one in read_exclusions(open_store(catalogue.index_uri)) for slide_id in one.slide_ids}
    segments = next_segments(read_segments(store), step, filter(catalogue.has, withdrawn))
    out = out_from(segments, capture.state.quarantine)
    spec = ReaderSpec.from_recipe(recipe, catalogue.index_uri, catalogue.snapshot_id, out)
    reader = Reader(spec)

    def read(replica: int) -> MicroBatch:
        chapter = Chapter(step // recipe.batch.chapter_steps, replica, step, step)
        found = reader.read(chapter, replica)
        ids, tiles, mpp, rows = (each[0] for each in (found.sample_ids, found.tiles, found.mpp, found.slides))
        return MicroBatch(replica, ids, tiles, mpp, rows, tuple(found.faults))

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        batches = list(pool.map(read, range(recipe.batch.replicas)))
    _require_same_samples(capture, batches)
    return batches


def changed_replicas(capture: Capture, batches: Sequence[MicroBatch]) -> list[int]:
    """Replicas whose tiles are not, pixel by pixel, those that the run saw."""
    pairs = zip(capture.micro_batches, map(_captured, batches), strict=True)
    return [then.replica for then, now in pairs if then.tiles_crc32 != now.tiles_crc32]


def _captured(batch: MicroBatch) -> CapturedBatch:
    return CapturedBatch.of(batch.replica, batch.sample_ids, batch.tiles, batch.faults)


def _require_same_samples(capture: Capture, batches: Sequence[MicroBatch]) -> None:
    then = {batch.replica: batch.samples for batch in capture.micro_batches}
    now = {batch.replica: _captured(batch).samples for batch in batches}
    if then != now:
        replica = min(replica for replica in {*then, *now} if then.get(replica) != now.get(replica))
        raise CheckpointError(
            f"the plan gives step {capture.state.step} other samples than the capture has",
            value=f"replica {replica}: {now.get(replica)}",
            expected=str(then.get(replica)),
            remedy="replay without overrides of `batch`",
        )


def _recipe_of(store: Store, capture: Capture, overrides: Sequence[str]) -> Recipe:
    """The run's recipe with the overrides, mapped to one process; a capture holds all weights, so it names none."""
    stored = require_run(store)
    if fingerprint(stored) != capture.state.fingerprint:
        raise CheckpointError(
            "the capture belongs to another recipe than that of its run folder",
            value=fingerprint(stored),
            expected=capture.state.fingerprint,
            remedy="replay it in the run folder that wrote it",
        )
    recipe = decode_recipe(stored.model_dump(mode="json"), overrides)
    # Compiled blocks hide their modules from who watches them, and ZeRO 3 would keep its memory from a second trainer.
    alone = {"workers": 1, "zero_stage": 2, "compile": False}
    cluster, model = recipe.cluster.model_copy(update=alone), recipe.model.model_copy(update={"weights": None})
    return recipe.model_copy(update={"cluster": cluster, "model": model})


def _rerun(
    store: Store, recipe: Recipe, capture: Capture, tiles: Sequence[MicroBatch], device: torch.device
) -> tuple[Audit, Rerun]:
    gc.collect()  # the trainer before, if there was one
    trainer = build_trainer(recipe, device, store)
    try:
        trainer.restore(capture.state)
    except CheckpointError as error:
        raise CheckpointError(
            f"the capture cannot be restored: {error.what}",
            value=error.value,
            expected=error.expected,
            remedy="replay it with the version of histoscale that wrote it, without overrides of `model` and `heads`; "
            "one that is corrupt is of no use: run the same job again, which meets the failure again",
        ) from error
    try:
        return audit_state(trainer), rerun_step(trainer, recipe, capture.state.step, tiles)
    finally:
        trainer.student.close()


def _facts_of(replicas: Sequence[int], tiles: Sequence[MicroBatch], catalogue: Catalogue) -> Iterator[str]:
    """What is known of the tiles where it began; of all tiles' replicas alike there is nothing to tell."""
    if len(replicas) == len(tiles):
        return
    for batch in tiles:
        if batch.replica in replicas:
            yield f"replica {batch.replica}:"
            yield from (f"  {facts.line()}" for facts in _facts(batch, catalogue))


def _facts(batch: MicroBatch, catalogue: Catalogue) -> list[TileFacts]:
    slides = [(row, catalogue.slide_id(row)) for row in batch.slides.tolist()]
    columns = zip(batch.sample_ids.tolist(), slides, batch.mpp.tolist(), batch.tiles, strict=True)
    return [tile_facts(sample_id, row, slide_id, mpp, tile) for sample_id, (row, slide_id), mpp, tile in columns]


def _device(wanted: str) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ClusterError("this machine has no CUDA device", expected="a GPU", remedy="give --device cpu")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", 0) if wanted == "cuda" else torch.device("cpu")


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """A world of one, unless the caller has made it."""
    if dist.is_initialized():
        yield
        return
    os.environ |= _ONE_PROCESS
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
