"""Writing a checkpoint: every rank its own shard, then the manifest, the ledger and the commit marker, in that order.

Only the marker makes a checkpoint exist. Whatever is killed before it leaves a folder that nobody reads and that the
next commit removes. Shards and commit are written by a thread beside training; the ranks agree between two steps,
and only there, for the thread must not use the process group that training uses. A run that another job has by now is
not committed to: a fence is asked before anything of it is removed, and before the marker.
"""

import logging
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from histoscale.checkpoint.collective import everywhere, on_every_rank, on_first_rank
from histoscale.checkpoint.fragments import Fragment
from histoscale.checkpoint.ledger import StepRecord, encode_ledger, ledger_key, merge_records
from histoscale.checkpoint.manifest import (
    MANIFEST_NAME,
    Commit,
    Manifest,
    Shard,
    encode,
    folder_prefix,
    marker_key,
)
from histoscale.checkpoint.retention import Retention, discard_after, remove_retired
from histoscale.checkpoint.shard import HostShard
from histoscale.errors import CheckpointError, HistoscaleError, RunError, StorageError
from histoscale.storage.store import Store
from histoscale.stream.faults import Quarantined

T = TypeVar("T")

Fence = Callable[[], None]
"""Raises a RunError where another job has the run by now."""

_log = logging.getLogger(__name__)


def unfenced() -> None:
    """The fence of a run that no other job can take over."""


@dataclass(frozen=True)
class Snapshot:
    """One rank's state after `step` steps, and what the commit says about it.

    Attributes:
        fragments: Name -> this rank's fragment, all with the same kinds of tensor.
        shapes: Name -> shape of every whole parameter.
        records: What this rank put into the steps since the last commit.
        quarantine: That of the last commit.
        written_by: World size, ZeRO stage and versions, for people.
        teacher: Fingerprint of the frozen teacher, where there is one.
    """

    step: int
    images_seen: int
    fingerprint: str
    fragments: Mapping[str, Fragment]
    shapes: dict[str, tuple[int, ...]]
    records: Sequence[StepRecord]
    written_by: dict[str, str]
    quarantine: tuple[Quarantined, ...] = ()
    teacher: str | None = None


@dataclass
class _Flight:
    """A checkpoint on its way.

    Attributes:
        shard: This rank's, to come.
        records: This rank's, of the steps up to the snapshot.
        commit: To come, on rank 0; None while shards are being written.
    """

    snapshot: Snapshot
    folder: str
    shard: Future[Shard]
    records: tuple[StepRecord, ...]
    commit: Future[Commit] | None = None


class CheckpointWriter:
    """Writes checkpoints beside training, one at a time. Every method is collective: all ranks call it alike.

    A checkpoint that could not be written does no harm to the run: the next one takes its place. So many failures in a
    row as `max_failed` are the end of it, and so is the first refusal of the fence.

    Args:
        store: The run folder.
        retention: Which commits stay.
        max_failed: So many failures in a row are an error.
        fence: Asked on rank 0 before the run folder's commits, ledgers and metrics are touched.
    """

    def __init__(self, store: Store, retention: Retention, max_failed: int, fence: Fence = unfenced) -> None:
        self._store = store
        self._retention = retention
        self._max_failed = max_failed
        self._fence = fence
        self._failed = 0
        self._flight: _Flight | None = None
        # One thread: a rank's shard and rank 0's commit never run at once.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @property
    def in_flight(self) -> int | None:
        """Step of the checkpoint that is being written."""
        return self._flight.snapshot.step if self._flight else None

    def begin(self, snapshot: Snapshot, first: Callable[[], None] | None = None) -> None:
        """Copy a snapshot to host memory and let it be written; what was in flight must be settled.

        Failures come out in `settle`.

        Args:
            snapshot: Of this rank.
            first: What rank 0 does before its shard is written, beside training too: it has ended, well or not, when
                the commit comes to be. Left out where the fence refuses.
        """
        if first is not None:
            self._thread.submit(self._fenced, first)
        folder = folder_prefix(snapshot.step, on_first_rank(lambda: secrets.token_hex(4)))
        shard: Future[Shard] = Future()
        try:
            held = HostShard.of(snapshot.fragments)
        except StorageError as error:
            shard.set_exception(error)
        else:
            shard = self._beside(lambda: held.write(self._store, folder))
        self._flight = _Flight(snapshot, folder, shard, tuple(snapshot.records))

    def settle(self, *, wait: bool) -> Commit | None:
        """Move on with the checkpoint in flight; answers the commit when it is there, and None otherwise.

        Args:
            wait: Until it is committed or has failed; otherwise what is ready now is taken note of.

        Raises:
            StorageError: It failed, the last of too many in a row; the same on every rank.
            RunError: Another job has the run by now; the same on every rank.
        """
        try:
            return self._move_on(wait)
        except StorageError as error:
            if self._failed >= self._max_failed:
                raise
            if dist.get_rank() == 0:
                _log.warning(
                    "%s; failed %d of %d times, the next one tries again", error, self._failed, self._max_failed
                )
            return None

    def finish(self) -> Commit:
        """Wait for the commit of the checkpoint in flight.

        Raises:
            StorageError: It failed; the same on every rank.
            RunError: Another job has the run by now; the same on every rank.
            CheckpointError: There is none in flight.
        """
        commit = self._move_on(wait=True)
        if commit is None:
            raise CheckpointError("no checkpoint is being written", expected="one that was begun")
        return commit

    def _move_on(self, wait: bool) -> Commit | None:
        flight = self._flight
        if flight is None:
            return None
        try:
            commit = self._advance(flight, wait)
        except RunError:
            self._flight = None
            raise
        except HistoscaleError as error:
            self._flight = None
            self._failed += 1
            raise StorageError(
                f"the checkpoint of step {flight.snapshot.step} was not committed: {error.what}",
                value=error.value,
                expected=error.expected,
                remedy=error.remedy,
                transient=error.transient,
            ) from error
        if commit is not None:
            self._flight = None
            self._failed = 0
        return commit

    def _advance(self, flight: _Flight, wait: bool) -> Commit | None:
        if flight.commit is None:
            if not wait and not everywhere(flight.shard.done()):
                return None
            reports = on_every_rank(lambda: (flight.shard.result(), flight.records))
            flight.commit = self._begin_commit(flight, reports)
        if not wait and not everywhere(flight.commit.done()):
            return None
        commit = flight.commit
        return on_first_rank(commit.result)

    def _begin_commit(self, flight: _Flight, reports: Sequence[tuple[Shard, tuple[StepRecord, ...]]]) -> Future[Commit]:
        """The commit to come, on rank 0; the others have nothing to wait for."""
        if dist.get_rank() != 0:
            nothing: Future[Commit] = Future()
            nothing.cancel()
            return nothing
        shards = tuple(shard for shard, _ in reports)
        records = [merge_records(shares) for shares in zip(*(records for _, records in reports), strict=True)]
        return self._beside(lambda: self._commit(flight, shards, records))

    def _commit(self, flight: _Flight, shards: tuple[Shard, ...], records: Sequence[StepRecord]) -> Commit:
        commit = commit_shards(self._store, flight.folder, flight.snapshot, shards, records, self._fence)
        try:
            self._fence()  # folders that no marker names may be another job's by now
            remove_retired(self._store, self._retention)
        except (StorageError, CheckpointError) as error:
            # The run is committed; what could not be removed is tried again at the next commit.
            _log.warning("old checkpoints could not be removed: %s", error)
        return commit

    def _fenced(self, work: Callable[[], None]) -> None:
        self._fence()
        work()

    def _beside(self, work: Callable[[], T]) -> Future[T]:
        return self._thread.submit(_diagnosed, work)


def write_checkpoint(store: Store, snapshot: Snapshot, keep_last: int) -> Commit:
    """Write and commit a checkpoint, then remove all but the newest `keep_last` (collective).

    Raises:
        StorageError: Something could not be written; raised on every rank, and nothing is committed.
    """
    writer = CheckpointWriter(store, Retention(keep_last), max_failed=1)
    writer.begin(snapshot)
    return writer.finish()


def commit_shards(
    store: Store,
    folder: str,
    snapshot: Snapshot,
    shards: tuple[Shard, ...],
    records: Sequence[StepRecord],
    fence: Fence = unfenced,
) -> Commit:
    """Make shards that are whole a checkpoint; for one rank.

    Args:
        store: The run folder.
        folder: Where the shards are.
        snapshot: What the commit says.
        shards: Of all ranks.
        records: Of all ranks, merged: one for each step since the last commit.
        fence: Asked before anything is removed, and before the marker.

    Raises:
        RunError: The fence refuses; there is no marker.
    """
    manifest = encode(Manifest(snapshot.shapes, shards))
    store.put(folder + MANIFEST_NAME, manifest)
    fence()
    if records:
        # A commit that seemed to fail may have left its ledger, or even its marker, when only the answer was lost.
        discard_after(store, records[0].step)
    commit = Commit(
        step=snapshot.step,
        images_seen=snapshot.images_seen,
        fingerprint=snapshot.fingerprint,
        folder=folder,
        sizes_bytes={MANIFEST_NAME: len(manifest), **{shard.name: shard.size_bytes for shard in shards}},
        manifest_crc32=zlib.crc32(manifest),
        ledger=_write_ledger(store, records),
        written_by=snapshot.written_by,
        quarantine=_quarantine(snapshot.quarantine, records),
        teacher=snapshot.teacher,
    )
    fence()
    store.put(marker_key(snapshot.step), encode(commit))
    return commit


def _diagnosed(work: Callable[[], T]) -> T:
    """What a thread does: an error that one rank alone meets must not leave the others waiting for it."""
    try:
        return work()
    except (OSError, RuntimeError, MemoryError) as error:
        raise StorageError(
            "a checkpoint could not be written",
            value=f"{type(error).__name__}: {error}",
            remedy="look at the disk and the memory of the worker's node",
        ) from error


def _write_ledger(store: Store, records: Sequence[StepRecord]) -> str | None:
    """Key of the ledger of the steps since the last commit, or None when there were none."""
    if not records:
        return None
    key = ledger_key(records[0].step, records[-1].step + 1)
    store.put(key, encode_ledger(records))
    return key


def _quarantine(before: tuple[Quarantined, ...], records: Sequence[StepRecord]) -> tuple[Quarantined, ...]:
    """The slides that were out before, and those of which no tile could be read since, from the step of the first."""
    out = {slide.slide_id: slide for slide in before}
    for record in records:
        for fault in record.faults:
            if fault.whole_slide:
                out.setdefault(fault.slide_id, Quarantined(fault.slide_id, record.step, fault.reason))
    return tuple(out.values())
