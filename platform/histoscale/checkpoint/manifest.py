"""What a checkpoint is on disk, and the names of its objects.

    checkpoints/step-00000100.json              the commit marker: without it there is no checkpoint
    checkpoints/step-00000100.<attempt>/        one folder for each attempt to write it
        rank-0-of-2.safetensors ...             one flat fp32 tensor per kind: that rank's fragments, end to end
        manifest.json                           which range of which parameter lies where, and checksums

The world size and the ZeRO stage that wrote a checkpoint show only in how the ranges are cut.
"""

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from histoscale.errors import CheckpointError
from histoscale.stream.faults import Quarantined

FORMAT_VERSION = 1
FOLDER = "checkpoints/"
MANIFEST_NAME = "manifest.json"

# Checksums cover blocks of this many elements (64 KiB), so that a rank can verify the part it reads and reads little
# beside it, even where it needs half of each parameter.
BLOCK_ELEMENTS = 1 << 14
BYTES_PER_ELEMENT = 4
_BLOCK_ELEMENTS_BEFORE = 1 << 20  # of shards that do not say it

_MARKER = re.compile(r"checkpoints/step-(\d{8,})\.json")


class CorruptCheckpoint(CheckpointError):
    """A checkpoint whose files are not, or not all, those that were committed: an earlier one may be whole."""


START_AGAIN = f"restore the file, or delete {FOLDER} and the ledger to start the run again"
"""The remedy where no checkpoint is whole."""


@dataclass(frozen=True)
class Piece:
    """One fragment inside a shard: parameter `name` from `offset` on, at element `start` of each flat tensor."""

    name: str
    offset: int
    numel: int
    start: int


@dataclass(frozen=True)
class Shard:
    """One rank's file.

    Attributes:
        size_bytes: Of the file.
        pieces: What each flat tensor holds.
        crc32: kind -> checksum of each block of that flat tensor.
        block_elements: How long these blocks are.
    """

    name: str
    size_bytes: int
    pieces: tuple[Piece, ...]
    crc32: dict[str, tuple[int, ...]]
    block_elements: int


@dataclass(frozen=True)
class Manifest:
    """The content of one checkpoint: whole shapes of all parameters, and the shards that hold them."""

    shapes: dict[str, tuple[int, ...]]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint.

    Attributes:
        step: Optimiser steps done; the next one is `step`.
        images_seen: Tiles that entered them.
        fingerprint: Of the recipe.
        folder: Key prefix of its files.
        sizes_bytes: Name of each file in the folder, the manifest included -> size.
        manifest_crc32: Checksum of the manifest.
        ledger: Key of the ledger of the steps since the commit before.
        quarantine: Slides that have given no tiles from a step on, since the run began.
        written_by: World size, ZeRO stage and versions, for people.
        teacher: Fingerprint of the frozen teacher, where there is one.
    """

    step: int
    images_seen: int
    fingerprint: str
    folder: str
    sizes_bytes: dict[str, int]
    manifest_crc32: int
    ledger: str | None
    written_by: dict[str, str]
    quarantine: tuple[Quarantined, ...] = ()
    teacher: str | None = None


def folders_below(prefix: str, keys: Iterable[str]) -> set[str]:
    """The key prefixes of the folders below `prefix` that hold one of the keys, which all begin with it."""
    return {key[: key.index("/", len(prefix)) + 1] for key in keys if "/" in key[len(prefix) :]}


def marker_key(step: int) -> str:
    """Key of the commit marker of a step."""
    return f"{FOLDER}step-{step:08d}.json"


def marker_step(key: str) -> int | None:
    """The step that a key is the commit marker of, or None."""
    match = _MARKER.fullmatch(key)
    return int(match[1]) if match else None


def folder_prefix(step: int, attempt: str) -> str:
    """Key prefix of the files of one attempt."""
    return f"{FOLDER}step-{step:08d}.{attempt}/"


def block_checksums(data: memoryview, block_elements: int) -> tuple[int, ...]:
    """crc32 of each block of a flat tensor's bytes; the last block may be short."""
    block_bytes = block_elements * BYTES_PER_ELEMENT
    return tuple(zlib.crc32(data[start : start + block_bytes]) for start in range(0, len(data), block_bytes))


def encode(record: Commit | Manifest) -> bytes:
    """A commit or a manifest as JSON; a commit, which nothing else vouches for, with a checksum of itself."""
    values = asdict(record)
    if isinstance(record, Commit):
        values["crc32"] = _checksum(values)
    return json.dumps({"format": FORMAT_VERSION, **values}, separators=(",", ":")).encode()


def decode_commit(data: bytes, key: str) -> Commit:
    """The commit that a marker holds.

    Raises:
        CorruptCheckpoint: It is damaged.
        CheckpointError: It is of another version.
    """
    values = _decode(data, key)
    checksum = values.pop("crc32", None)
    if checksum is not None and checksum != _checksum(values):
        raise _damaged(key)
    commit = commit_of(values, key)
    if marker_step(key) not in (None, commit.step):
        raise _damaged(key)
    return commit


def _checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def commit_of(values: dict[str, Any], key: str) -> Commit:
    """The commit that decoded JSON describes.

    Raises:
        CorruptCheckpoint: It is damaged.
    """
    try:
        quarantine = tuple(Quarantined(**slide) for slide in values.pop("quarantine", ()))
        return Commit(**values, quarantine=quarantine)
    except TypeError as error:
        raise _damaged(key) from error


def decode_manifest(data: bytes, key: str) -> Manifest:
    """The manifest that a file holds.

    Raises:
        CorruptCheckpoint: It is damaged.
        CheckpointError: It is of another version.
    """
    values = _decode(data, key)
    try:
        return Manifest(
            shapes={name: tuple(shape) for name, shape in values["shapes"].items()},
            shards=tuple(_shard(shard) for shard in values["shards"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(key) from error


def _shard(values: dict[str, Any]) -> Shard:
    return Shard(
        name=values["name"],
        size_bytes=values["size_bytes"],
        pieces=tuple(Piece(**piece) for piece in values["pieces"]),
        crc32={kind: tuple(sums) for kind, sums in values["crc32"].items()},
        block_elements=values.get("block_elements", _BLOCK_ELEMENTS_BEFORE),
    )


def _decode(data: bytes, key: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError as error:
        raise _damaged(key) from error
    if not isinstance(values, dict):
        raise _damaged(key)
    version = values.pop("format", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{key} was written by another version of histoscale",
            value=version,
            expected=f"format {FORMAT_VERSION}",
            remedy="resume with the version that wrote it",
        )
    return values


def _damaged(key: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{key} is damaged", expected="what was written", remedy=START_AGAIN)
