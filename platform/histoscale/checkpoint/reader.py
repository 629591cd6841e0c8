"""Reading a checkpoint at any world size and ZeRO stage: each rank fetches the ranges that it needs, verified.

Every byte that is used has been checked against its block's checksum, and every element of a target must come from
exactly one shard.
"""

import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from histoscale.checkpoint import ledger
from histoscale.checkpoint.fragments import CENTER_PREFIX, EMA, Fragment
from histoscale.checkpoint.manifest import (
    BLOCK_ELEMENTS,
    BYTES_PER_ELEMENT,
    FOLDER,
    MANIFEST_NAME,
    Commit,
    Manifest,
    Shard,
    block_checksums,
    decode_commit,
    decode_manifest,
    marker_key,
    marker_step,
)
from histoscale.errors import CheckpointError
from histoscale.storage.store import Store

_BACKBONE_PREFIX = "backbone."
_MAX_BLOCKS_PER_REQUEST = 16

_log = logging.getLogger(__name__)


def latest_commit(store: Store) -> Commit | None:
    """The newest commit whose files are all there in full size; None when the run has no commit.

    Raises:
        CheckpointError: There are commits, but none is whole; or a marker is damaged or of another version.
    """
    sizes_bytes = {info.key: info.size_bytes for info in store.list(FOLDER)}
    steps = sorted((step for step in map(marker_step, sizes_bytes) if step is not None), reverse=True)
    torn: list[CheckpointError] = []
    for step in steps:
        commit = decode_commit(store.get(marker_key(step)), marker_key(step))
        problem = _torn_file(commit, sizes_bytes)
        if problem is None:
            return commit
        _log.warning("checkpoint of step %d is left out: %s", step, problem)
        torn.append(problem)
    if torn:
        raise torn[0]
    return None


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
    problem = _torn_file(commit, sizes_bytes)
    if problem is not None:
        raise problem
    return commit


def discard_after(store: Store, commit: Commit | None) -> None:
    """Remove what claims to be later than `commit`: ledgers never committed and markers of torn checkpoints."""
    step = commit.step if commit else 0
    ledger.delete_after(store, step)
    for info in list(store.list(FOLDER)):
        marked = marker_step(info.key)
        if marked is not None and marked > step:
            store.delete(info.key)


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
        CheckpointError: The parameters differ, a file is corrupt, or an element is missing.
    """
    manifest = read_manifest(store, commit)
    _require_same_parameters(commit, manifest.shapes, shapes)
    loaded: Counter[tuple[str, str]] = Counter()
    for shard in manifest.shards:
        wanted = list(_overlaps(shard, targets))
        for kind, copies in _by_kind(wanted).items():
            _fill(store, commit, shard, kind, copies)
            for copy in copies:
                loaded[copy.name, kind] += copy.target.numel()
    for name, part in targets.items():
        for kind in part.tensors:
            if loaded[name, kind] != part.numel:
                raise CheckpointError(
                    f"the checkpoint of step {commit.step} does not hold {name} ({kind}) exactly once",
                    value=loaded[name, kind],
                    expected=f"{part.numel} elements",
                    remedy=_remedy(commit),
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
        CheckpointError: It is not the one that was committed.
    """
    key = commit.folder + MANIFEST_NAME
    data = store.get(key)
    if zlib.crc32(data) != commit.manifest_crc32:
        raise _corrupt(commit, key)
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


@torch.no_grad()
def _fill(store: Store, commit: Commit, shard: Shard, kind: str, copies: Sequence[_Copy]) -> None:
    """Fetch the blocks that hold `copies`, in runs, and copy out what is wanted."""
    key = commit.folder + shard.name
    data_start_byte = _tensor_start_byte(store, commit, shard, kind)
    blocks = {
        block for copy in copies for block in range(copy.start // BLOCK_ELEMENTS, math.ceil(copy.stop / BLOCK_ELEMENTS))
    }
    numel = sum(piece.numel for piece in shard.pieces)
    for first, last in _block_runs(sorted(blocks)):
        low, high = first * BLOCK_ELEMENTS, min((last + 1) * BLOCK_ELEMENTS, numel)
        data = store.get_range(key, data_start_byte + low * BYTES_PER_ELEMENT, (high - low) * BYTES_PER_ELEMENT)
        if block_checksums(memoryview(data)) != shard.crc32[kind][first : last + 1]:
            raise _corrupt(commit, key)
        values = torch.frombuffer(bytearray(data), dtype=torch.float32)
        for copy in copies:
            start, stop = max(copy.start, low), min(copy.stop, high)
            if start < stop:
                copy.target[start - copy.start : stop - copy.start].copy_(values[start - low : stop - low])


def _tensor_start_byte(store: Store, commit: Commit, shard: Shard, kind: str) -> int:
    """Where a flat tensor's data starts in a safetensors file: an 8-byte length, a JSON header, then the data."""
    key = commit.folder + shard.name
    header_bytes = int.from_bytes(store.get_range(key, 0, 8), "little")
    if header_bytes > shard.size_bytes:
        raise _corrupt(commit, key)
    try:
        header = json.loads(store.get_range(key, 8, header_bytes))
        return 8 + header_bytes + int(header[kind]["data_offsets"][0])
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(commit, key) from error


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


def _torn_file(commit: Commit, sizes_bytes: Mapping[str, int]) -> CheckpointError | None:
    for name, expected_bytes in commit.sizes_bytes.items():
        found_bytes = sizes_bytes.get(commit.folder + name)
        if found_bytes != expected_bytes:
            return CheckpointError(
                f"{commit.folder}{name} is {'missing' if found_bytes is None else 'truncated'}",
                value=found_bytes,
                expected=f"{expected_bytes} bytes",
                remedy=f"restore the file, or delete {FOLDER} and the ledger to start the run again",
            )
    return None


def _corrupt(commit: Commit, key: str) -> CheckpointError:
    return CheckpointError(f"{key} is corrupt: its checksum differs", remedy=_remedy(commit))


def _remedy(commit: Commit) -> str:
    return f"delete {marker_key(commit.step)} to resume from the commit before"
