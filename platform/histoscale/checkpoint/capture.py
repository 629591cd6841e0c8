"""Captures: the state before a step that failed, and what the step was made of, so that it can be run again.

    captures/step-00000123.<random>/
        rank-0-of-2.safetensors ...     shards and
        manifest.json                   their manifest, as in a checkpoint
        capture.json                    written last: without it there is no capture

`step` is the step that failed, counted from 0: so many steps were done before it. A capture holds no tile and names no
slide but by its id. Nothing resumes from it.
"""

import json
import logging
import secrets
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from histoscale.checkpoint.collective import on_every_rank, on_first_rank
from histoscale.checkpoint.ledger import Run, runs_of
from histoscale.checkpoint.manifest import MANIFEST_NAME, Commit, Manifest, Shard, commit_of, encode, folders_below
from histoscale.checkpoint.shard import HostShard
from histoscale.checkpoint.writer import Snapshot
from histoscale.errors import CheckpointError, HistoscaleError, NonFiniteError, StorageError
from histoscale.storage.store import Store, join
from histoscale.stream.faults import Fault

FORMAT_VERSION = 1
FOLDER = "captures/"
CAPTURE_NAME = "capture.json"
KEPT = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CapturedBatch:
    """The tiles of one replica, without the tiles.

    Attributes:
        samples: Their ids, as runs.
        tiles_crc32: Checksum of their pixels, to tell whether the same are read again.
        faults: Attempts at these samples that the content refused.
    """

    replica: int
    samples: tuple[Run, ...]
    tiles_crc32: int
    faults: tuple[Fault, ...]

    @classmethod
    def of(cls, replica: int, sample_ids: NDArray[np.int64], tiles: NDArray[np.uint8], faults: Sequence[Fault]) -> Self:
        """What is kept of one replica's sample ids [b], tiles uint8 [b, R, R, 3] and faults."""
        runs = runs_of(int(sample_id) for sample_id in sample_ids)
        return cls(replica, tuple(runs), zlib.crc32(np.ascontiguousarray(tiles).data), tuple(faults))


@dataclass(frozen=True)
class Capture:
    """A step that failed.

    Attributes:
        state: What a commit before the step would say: step, recipe, files and their sizes, who wrote them.
        micro_batches: What the step was made of, by replica.
        measured: What it measured before it failed; `nan` and `inf` are what this is about.
        message: The error.
        created: Time, ISO 8601, UTC.
    """

    state: Commit
    micro_batches: tuple[CapturedBatch, ...]
    measured: Mapping[str, float]
    message: str
    created: str


def capture_failure(
    store: Store, snapshot: Snapshot, batches: Sequence[CapturedBatch], failure: NonFiniteError
) -> NonFiniteError:
    """Write a capture, and answer the failure with where it is, or with why there is none (collective).

    Args:
        store: The run folder.
        snapshot: This rank's state before the step.
        batches: What this rank put into the step.
        failure: How it ended.
    """
    try:
        folder = write_capture(store, snapshot, batches, failure)
    except HistoscaleError as error:
        remedy = f"{failure.remedy}. No capture of the step could be written: {error}".removesuffix(".")
    else:
        command = f"python jobs/doctor.py --replay {join(store.uri, folder)} --index INDEX"
        remedy = f"the step is captured: to see where this began and what to do, run `{command}`"
    return NonFiniteError(
        failure.what, value=failure.value, expected=failure.expected, remedy=remedy, measured=failure.measured
    )


def write_capture(store: Store, snapshot: Snapshot, batches: Sequence[CapturedBatch], failure: NonFiniteError) -> str:
    """Write a capture, then remove all but the newest `KEPT` (collective).

    Returns:
        The key prefix of its files.

    Raises:
        StorageError: Something could not be written; raised on every rank, and there is no capture.
    """
    attempt = on_first_rank(lambda: secrets.token_hex(4))
    folder = f"{FOLDER}step-{snapshot.step:08d}.{attempt}/"
    reports = on_every_rank(lambda: (HostShard.of(snapshot.fragments).write(store, folder), tuple(batches)))
    shards = tuple(shard for shard, _ in reports)
    micro_batches = sorted((batch for _, rank in reports for batch in rank), key=lambda batch: batch.replica)

    def finish() -> None:
        manifest = encode(Manifest(snapshot.shapes, shards))
        store.put(folder + MANIFEST_NAME, manifest)
        state = _state(snapshot, folder, shards, manifest)
        created = datetime.now(UTC).isoformat()
        capture = Capture(state, tuple(micro_batches), failure.measured, str(failure), created)
        store.put(folder + CAPTURE_NAME, _encode(capture))
        try:
            _remove_retired(store, folder)
        except StorageError as error:
            _log.warning("old captures could not be removed: %s", error)

    on_first_rank(finish)
    return folder


def read_capture(store: Store, folder: str) -> Capture:
    """The capture in a folder of a run, complete.

    Args:
        store: The run folder.
        folder: `captures/step-...`, with or without a slash at its end.

    Raises:
        CheckpointError: There is none, it is torn or damaged, or of another version.
    """
    folder = f"{folder.rstrip('/')}/"
    sizes_bytes = {info.key: info.size_bytes for info in store.list(folder)}
    if folder + CAPTURE_NAME not in sizes_bytes:
        raise CheckpointError(
            f"there is no whole capture at {join(store.uri, folder)}",
            value=f"{len(sizes_bytes)} files without {CAPTURE_NAME}" if sizes_bytes else "nothing",
            expected=f"a folder below {FOLDER} with {CAPTURE_NAME}",
            remedy="a capture that was cut short is of no use: run the same job again, which meets the failure again",
        )
    capture = _decode(store.get(folder + CAPTURE_NAME), folder)
    for name, expected_bytes in capture.state.sizes_bytes.items():
        found_bytes = sizes_bytes.get(folder + name)
        if found_bytes != expected_bytes:
            raise CheckpointError(
                f"the capture is torn: {folder}{name} is {'missing' if found_bytes is None else 'truncated'}",
                value=found_bytes,
                expected=f"{expected_bytes} bytes",
                remedy="restore the file, or run the same job again, which meets the failure again",
            )
    return capture


def _state(snapshot: Snapshot, folder: str, shards: Sequence[Shard], manifest: bytes) -> Commit:
    return Commit(
        step=snapshot.step,
        images_seen=snapshot.images_seen,
        fingerprint=snapshot.fingerprint,
        folder=folder,
        sizes_bytes={MANIFEST_NAME: len(manifest), **{shard.name: shard.size_bytes for shard in shards}},
        manifest_crc32=zlib.crc32(manifest),
        ledger=None,
        written_by=snapshot.written_by,
        quarantine=snapshot.quarantine,
        teacher=snapshot.teacher,
    )


def _remove_retired(store: Store, newest: str) -> None:
    """Delete all captures but `newest` and the newest of the others, and what is torn."""
    keys = [info.key for info in store.list(FOLDER)]
    folders = folders_below(FOLDER, keys) - {newest}
    whole = sorted((created, folder) for folder in folders if (created := _created(store, folder)))
    kept = {folder for _, folder in whole[-(KEPT - 1) :]}
    for folder in sorted(folders - kept):
        store.delete_prefix(folder)


def _created(store: Store, folder: str) -> str | None:
    try:
        return read_capture(store, folder).created
    except CheckpointError:
        return None


def _encode(capture: Capture) -> bytes:
    # JSON has no numbers for what is not finite.
    measured = {name: str(float(value)) for name, value in capture.measured.items()}
    values = {"format": FORMAT_VERSION, **asdict(capture), "measured": measured}
    return json.dumps(values, indent=1, allow_nan=False).encode()


def _decode(data: bytes, folder: str) -> Capture:
    try:
        values: dict[str, Any] = json.loads(data)
        if values["format"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{folder}{CAPTURE_NAME} was written by another version of histoscale",
                value=values["format"],
                expected=f"format {FORMAT_VERSION}",
                remedy="replay it with the version that wrote it",
            )
        return Capture(
            state=commit_of(values["state"], folder + CAPTURE_NAME),
            micro_batches=tuple(map(_batch, values["micro_batches"])),
            measured={name: float(value) for name, value in values["measured"].items()},
            message=values["message"],
            created=values["created"],
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{folder}{CAPTURE_NAME} is damaged",
            expected="what a step that failed wrote",
            remedy="run the same job again, which meets the failure again",
        ) from None


def _batch(values: dict[str, Any]) -> CapturedBatch:
    return CapturedBatch(
        replica=values["replica"],
        samples=tuple((int(first), int(count)) for first, count in values["samples"]),
        tiles_crc32=values["tiles_crc32"],
        faults=tuple(Fault(**fault) for fault in values["faults"]),
    )
