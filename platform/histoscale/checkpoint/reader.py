"""Reading a checkpoint at any world size and ZeRO stage: each rank fetches the ranges that it needs, verified.

Every byte that is used has been checked against its block's checksum, and every element of a target must come from
exactly one shard.
"""

import contextlib
import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from histoscale.checkpoint.fragments import CENTER_PREFIX, EMA, Fragment
from histoscale.checkpoint.manifest import (
    BYTES_PER_ELEMENT,
    FOLDER,
    MANIFEST_NAME,
    START_AGAIN,
    Commit,
    CorruptCheckpoint,
    Manifest,
    Shard,
    block_checksums,
    decode_commit,
    decode_manifest,
    marker_key,
    marker_step,
)
from histoscale.errors import CheckpointError
from histoscale.storage.store import ObjectChanged, Store

T = TypeVar("T")

_BACKBONE_PREFIX = "backbone."
_MAX_BLOCKS_PER_REQUEST = 512  # 32 MiB
_READS_AT_ONCE = 4

_log = logging.getLogger(__name__)


def latest_commit(store: Store, before: int | None = None) -> Commit | None:
    """The newest commit whose files are all there in full size; None when the run has no commit.

    Args:
        store: The run folder.
        before: Only commits of earlier steps are looked at.

    Raises:
        CorruptCheckpoint: There are commits, but none is whole.
        CheckpointError: A marker is of another version.
    """
    sizes_bytes = {info.key: info.size_bytes for info in store.list(FOLDER)}
    steps = [step for step in map(marker_step, sizes_bytes) if step is not None and (before is None or step < before)]
    torn: list[CorruptCheckpoint] = []
    for step in sorted(steps, reverse=True):
        try:
            commit = decode_commit(store.get(marker_key(step)), marker_key(step))
            _require_whole(store, commit, sizes_bytes)
        except CorruptCheckpoint as problem:
            _log.warning("checkpoint of step %d is left out: %s", step, problem)
            torn.append(problem)
        except ObjectChanged:
            continue  # retired since it was listed
        else:
            return commit
    if torn:
        raise torn[0]
    return None


def require_commit(store: Store) -> Commit:
    """The newest commit of a run that must have one.

    Raises:
        CheckpointError: It has none; or as of `latest_commit`.
    """
    commit = latest_commit(store)
    if commit is None:
        raise CheckpointError(
            f"run {store.uri} has no checkpoint yet",
            expected="one commit or more",
            remedy="let it train until it says that a checkpoint is committed",
        )
    return commit


def commit_before(store: Store, commit: Commit, problem: CorruptCheckpoint) -> Commit:
    """The newest whole commit before one that proved corrupt when it was read; says that it is left out.

    Raises:
        CorruptCheckpoint: There is none; `problem` itself.
    """
    _log.warning("checkpoint of step %d is left out: %s", commit.step, problem)
    try:
        older = latest_commit(store, before=commit.step)
    except CorruptCheckpoint:
        older = None
    if older is None:
        raise problem
    return older


def read_newest(store: Store, read: Callable[[Commit], T]) -> tuple[T, Commit]:
    """What `read` makes of the newest commit that is not corrupt, and that commit.

    Raises:
        CheckpointError: The run has none, all are corrupt, or whatever else `read` says.
    """
    commit = require_commit(store)
    while True:
        try:
            return read(commit), commit
        except CorruptCheckpoint as problem:
            commit = commit_before(store, commit, problem)


def commit_at(store: Store, step: int) -> Commit:
    """The commit of one step, whose files are all there in full size.

    Raises:
        CheckpointError: There is none, or it is torn, damaged or of another version.
    """
    sizes_bytes = {info.key: info.size_bytes for info in store.list(FOLDER)}
    key = marker_key(step)
    if key not in sizes_bytes:
        steps = sorted(found for found in map(marker_step, sizes_bytes) if found is not None)
        raise CheckpointError(
            f"{store.uri} has no checkpoint of step {step}",
            value=f"checkpoints of steps {', '.join(map(str, steps))}" if steps else "no checkpoint",
            expected="a committed step",
            remedy="take one of those that are there; a run removes all but its newest checkpoint.keep_last",
        )
    commit = decode_commit(store.get(key), key)
    _require_whole(store, commit, sizes_bytes)
    return commit


def require_recipe(commit: Commit, fingerprint: str) -> None:
    """Refuse a checkpoint of another recipe.

    Raises:
        CheckpointError: The fingerprints differ.
    """
    if commit.fingerprint != fingerprint:
        raise CheckpointError(
            f"the checkpoint of step {commit.step} belongs to another recipe",
            value=commit.fingerprint,
            expected=fingerprint,
            remedy="resume with the recipe of the run folder, or start a new run folder",
        )


def require_teacher(commit: Commit, teacher: str | None) -> None:
    """Refuse to go on with a student under another frozen teacher, or under none.

    Raises:
        CheckpointError: The fingerprints differ.
    """
    if commit.teacher != teacher:
        raise CheckpointError(
            f"the checkpoint of step {commit.step} is a student of another teacher",
            value=teacher or "no frozen teacher",
            expected=commit.teacher or "no frozen teacher",
            remedy="put back what distill.teacher held when the run began (a run that trains on is another teacher at "
            "each of its commits: distil from a finished one, or from a copy), or start a new run folder",
        )


def load_into(
    store: Store, commit: Commit, targets: Mapping[str, Fragment], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Fill every tensor of `targets` from a checkpoint, whatever cut its ranges.

    Args:
        store: The run folder.
        commit: Which checkpoint.
        targets: Name -> fragment whose tensors are overwritten; their kinds must be in the checkpoint.
        shapes: Name -> shape of every parameter of the network that is being restored.

    Raises:
        CorruptCheckpoint: A file is missing or corrupt, or an element is missing.
        CheckpointError: The parameters differ, or the commit was retired meanwhile.
    """
    manifest = read_manifest(store, commit)
    _require_same_parameters(commit, manifest.shapes, shapes)
    loaded: Counter[tuple[str, str]] = Counter()
    with ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="checkpoint-read") as pool:
        for shard in manifest.shards:
            wanted = _by_kind(list(_overlaps(shard, targets)))
            starts_byte = _tensor_starts_byte(store, commit, shard) if wanted else {}
            for kind, copies in wanted.items():
                if kind not in starts_byte:
                    raise _corrupt(commit.folder + shard.name)
                fill = partial(_fill, store, commit, shard, kind, starts_byte[kind], copies)
                for _ in pool.map(fill, _block_runs(_blocks_of(shard, copies))):
                    pass
                for copy in copies:
                    loaded[copy.name, kind] += copy.target.numel()
    for name, part in targets.items():
        for kind in part.tensors:
            if loaded[name, kind] != part.numel:
                raise CorruptCheckpoint(
                    f"the checkpoint of step {commit.step} does not hold {name} ({kind}) exactly once",
                    value=loaded[name, kind],
                    expected=f"{part.numel} elements",
                    remedy=START_AGAIN,
                )


def load_teacher(store: Store, commit: Commit) -> dict[str, Tensor]:
    """The whole EMA teacher of a checkpoint, backbone and heads, in fp32 on the CPU; needs no process group."""
    return _load_ema(store, commit, "")


def load_teacher_backbone(store: Store, commit: Commit) -> dict[str, Tensor]:
    """The EMA teacher's backbone in fp32 on the CPU, with timm's parameter names; needs no process group."""
    return _load_ema(store, commit, _BACKBONE_PREFIX)


def read_manifest(store: Store, commit: Commit) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CorruptCheckpoint: It is not the one that was committed.
        CheckpointError: The commit was retired meanwhile.
    """
    key = commit.folder + MANIFEST_NAME
    with _files_of(store, commit, key):
        data = store.get(key)
    if zlib.crc32(data) != commit.manifest_crc32:
        raise _corrupt(key)
    return decode_manifest(data, key)


@dataclass(frozen=True)
class _Copy:
    """Elements `start` to `stop` of a shard's flat tensor, and where they go."""

    name: str
    kind: str
    start: int
    stop: int
    target: Tensor


def _load_ema(store: Store, commit: Commit, prefix: str) -> dict[str, Tensor]:
    shapes = read_manifest(store, commit).shapes
    whole = {
        name: Fragment(0, math.prod(shape), shape, {EMA: torch.empty(math.prod(shape))})
        for name, shape in shapes.items()
        if name.startswith(prefix) and not name.startswith(CENTER_PREFIX)
    }
    load_into(store, commit, whole, shapes)
    return {name.removeprefix(prefix): part.tensors[EMA].view(part.shape) for name, part in whole.items()}


def _overlaps(shard: Shard, targets: Mapping[str, Fragment]) -> Iterator[_Copy]:
    for piece in shard.pieces:
        part = targets.get(piece.name)
        if part is None:
            continue
        low = max(piece.offset, part.offset)
        high = min(piece.offset + piece.numel, part.offset + part.numel)
        if low >= high:
            continue
        start = piece.start + low - piece.offset
        for kind, tensor in part.tensors.items():
            target = tensor[low - part.offset : high - part.offset]
            yield _Copy(piece.name, kind, start, start + high - low, target)


def _by_kind(copies: Sequence[_Copy]) -> dict[str, list[_Copy]]:
    groups: dict[str, list[_Copy]] = {}
    for copy in copies:
        groups.setdefault(copy.kind, []).append(copy)
    return groups


def _blocks_of(shard: Shard, copies: Sequence[_Copy]) -> list[int]:
    """The blocks that hold `copies`."""
    size = shard.block_elements
    return sorted({block for copy in copies for block in range(copy.start // size, math.ceil(copy.stop / size))})


@torch.no_grad()
def _fill(
    store: Store,
    commit: Commit,
    shard: Shard,
    kind: str,
    data_start_byte: int,
    copies: Sequence[_Copy],
    run: tuple[int, int],
) -> None:
    """Fetch the blocks from the first to the last of a run, and copy out what is wanted of them."""
    key, (first, last) = commit.folder + shard.name, run
    numel = sum(piece.numel for piece in shard.pieces)
    low, high = first * shard.block_elements, min((last + 1) * shard.block_elements, numel)
    with _files_of(store, commit, key):
        data = store.get_range(key, data_start_byte + low * BYTES_PER_ELEMENT, (high - low) * BYTES_PER_ELEMENT)
    if block_checksums(memoryview(data), shard.block_elements) != shard.crc32[kind][first : last + 1]:
        raise _corrupt(key)
    values = torch.frombuffer(bytearray(data), dtype=torch.float32)
    for copy in copies:
        start, stop = max(copy.start, low), min(copy.stop, high)
        if start < stop:
            copy.target[start - copy.start : stop - copy.start].copy_(values[start - low : stop - low])


def _tensor_starts_byte(store: Store, commit: Commit, shard: Shard) -> dict[str, int]:
    """Where each flat tensor's data start in a safetensors file: an 8-byte length, a JSON header, then the data."""
    key = commit.folder + shard.name
    try:
        with _files_of(store, commit, key):
            header_bytes = int.from_bytes(store.get_range(key, 0, 8), "little")
            if header_bytes > shard.size_bytes:
                raise _corrupt(key)
            header = json.loads(store.get_range(key, 8, header_bytes))
        starts = {kind: 8 + header_bytes + int(header[kind]["data_offsets"][0]) for kind in shard.crc32}
    except (ValueError, LookupError, TypeError) as error:
        raise _corrupt(key) from error
    if min(starts.values(), default=0) < 0:
        raise _corrupt(key)
    return starts


def _block_runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last block of each run of consecutive ones, of bounded length."""
    first = last = -1
    for block in blocks:
        if first >= 0 and block == last + 1 and block - first < _MAX_BLOCKS_PER_REQUEST:
            last = block
            continue
        if first >= 0:
            yield first, last
        first = last = block
    if first >= 0:
        yield first, last


def _require_same_parameters(
    commit: Commit, stored: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]
) -> None:
    differing = sorted(name for name in {*stored, *ours} if stored.get(name) != ours.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"the checkpoint of step {commit.step} holds another network, {len(differing)} parameters differ",
            value=f"{name} {stored.get(name, 'absent')}",
            expected=f"{name} {ours.get(name, 'absent')}",
            remedy="resume with the version of histoscale that wrote it",
        )


def _require_whole(store: Store, commit: Commit, sizes_bytes: Mapping[str, int]) -> None:
    """Refuse a commit of which a file is missing, or has another size."""
    for name, expected_bytes in commit.sizes_bytes.items():
        found_bytes = sizes_bytes.get(commit.folder + name)
        if found_bytes != expected_bytes:
            raise CorruptCheckpoint(
                f"{commit.folder}{name} is {'missing' if found_bytes is None else 'truncated'}",
                value=found_bytes,
                expected=f"{expected_bytes} bytes",
                remedy=START_AGAIN,
            )
    if commit.ledger is not None and not store.exists(commit.ledger):
        raise CorruptCheckpoint(f"{commit.ledger} is missing", remedy=START_AGAIN)


@contextlib.contextmanager
def _files_of(store: Store, commit: Commit, key: str) -> Iterator[None]:
    """Tell why a file is not there, or too short: it was damaged, or its commit was retired while it was read."""
    try:
        yield
    except ObjectChanged as error:
        if commit.folder.startswith(FOLDER) and not store.exists(marker_key(commit.step)):
            raise CheckpointError(
                f"the checkpoint of step {commit.step} was retired while it was read: newer ones took its place",
                remedy="run the same command again, which reads the newest one; raise checkpoint.keep_last in the "
                "next run where this happens again",
            ) from error
        raise CorruptCheckpoint(f"{key} is missing or truncated", remedy=START_AGAIN) from error


def _corrupt(key: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{key} is corrupt: its checksum differs", remedy=START_AGAIN)
