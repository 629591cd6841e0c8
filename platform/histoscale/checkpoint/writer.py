"""Writing a checkpoint: every rank its own shard, then the manifest, then the commit marker, in that order.

Only the marker makes a checkpoint exist. Whatever is killed before it leaves a folder that nobody reads and that the
next commit removes.
"""

import logging
import secrets
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from histoscale.checkpoint.collective import on_every_rank, on_first_rank
from histoscale.checkpoint.fragments import Fragment
from histoscale.checkpoint.ledger import StepRecord, encode_ledger, ledger_key, merge_records
from histoscale.checkpoint.manifest import (
    FOLDER,
    MANIFEST_NAME,
    Commit,
    Manifest,
    Piece,
    Shard,
    block_checksums,
    decode_commit,
    encode,
    folder_prefix,
    folders_below,
    marker_key,
    marker_step,
)
from histoscale.errors import StorageError
from histoscale.storage.store import Store
from histoscale.stream.faults import Quarantined

_log = logging.getLogger(__name__)


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


def write_checkpoint(store: Store, snapshot: Snapshot, keep_last: int) -> Commit:
    """Write and commit a checkpoint, then remove all but the newest `keep_last` (collective).

    Raises:
        StorageError: Something could not be written; raised on every rank, and nothing is committed.
    """
    folder = folder_prefix(snapshot.step, on_first_rank(lambda: secrets.token_hex(4)))
    reports = on_every_rank(lambda: (write_shard(store, folder, snapshot.fragments), snapshot.records))
    shards = tuple(shard for shard, _ in reports)
    records = [merge_records(shares) for shares in zip(*(records for _, records in reports), strict=True)]

    def commit() -> Commit:
        committed = _commit(store, folder, snapshot, shards, records)
        try:
            remove_retired(store, keep_last)
        except StorageError as error:
            # The run is committed; what could not be removed is tried again at the next commit.
            _log.warning("old checkpoints could not be removed: %s", error)
        return committed

    return on_first_rank(commit)


def remove_retired(store: Store, keep_last: int) -> None:
    """Delete all commits but the newest `keep_last`, and every folder that no commit names."""
    keys = [info.key for info in store.list(FOLDER)]
    steps = sorted(step for step in map(marker_step, keys) if step is not None)
    for step in steps[:-keep_last]:
        store.delete(marker_key(step))
    kept = {decode_commit(store.get(marker_key(step)), marker_key(step)).folder for step in steps[-keep_last:]}
    folders = folders_below(FOLDER, keys)
    for folder in sorted(folders - kept):
        store.delete_prefix(folder)


def write_shard(store: Store, folder: str, fragments: Mapping[str, Fragment]) -> Shard:
    """Write this rank's file into a folder; says what it holds."""
    name = f"rank-{dist.get_rank()}-of-{dist.get_world_size()}.safetensors"
    flat = _flatten(fragments)
    with tempfile.TemporaryDirectory(prefix="histoscale-") as scratch:
        path = Path(scratch) / name
        save_file(flat, path)
        store.upload(path, folder + name)
        size_bytes = path.stat().st_size
    checksums = {kind: block_checksums(tensor.view(torch.uint8).numpy().data) for kind, tensor in flat.items()}
    return Shard(name, size_bytes, _pieces(fragments), checksums)


def _flatten(fragments: Mapping[str, Fragment]) -> dict[str, Tensor]:
    """The fragments of each kind, end to end, on the host."""
    kinds = next(iter(fragments.values())).tensors if fragments else ()
    return {kind: torch.cat([part.tensors[kind] for part in fragments.values()]).cpu() for kind in kinds}


def _pieces(fragments: Mapping[str, Fragment]) -> tuple[Piece, ...]:
    pieces, start = [], 0
    for name, part in fragments.items():
        pieces.append(Piece(name, part.offset, part.numel, start))
        start += part.numel
    return tuple(pieces)


def _commit(
    store: Store,
    folder: str,
    snapshot: Snapshot,
    shards: tuple[Shard, ...],
    records: Sequence[StepRecord],
) -> Commit:
    """Rank 0's part: what makes the shards a checkpoint."""
    manifest = encode(Manifest(snapshot.shapes, shards))
    store.put(folder + MANIFEST_NAME, manifest)
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
    store.put(marker_key(snapshot.step), encode(commit))
    return commit


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
