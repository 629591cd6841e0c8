"""Chapters, the blocks of the feed: which there are, in which order they are dealt, how one is laid out in Arrow.

A chapter is up to n steps of one replica. Chapters start at multiples of n, so only the first and the last of a
stream can be shorter. One chapter is one row of one block: Ray never cuts or merges it, and the tiles reach the
rank without a copy. How large a block is does not depend on the size of a micro-batch: n is the recipe's to choose.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from histoscale.errors import StreamError
from histoscale.sampling.replicas import replicas_of
from histoscale.sampling.spec import PlanSpec
from histoscale.stream.faults import Fault

_PADDING = -1
_ROW_FIELDS = [
    ("chapter", pa.int64()),
    ("replica", pa.int32()),
    ("first_step", pa.int64()),
    ("last_step", pa.int64()),
]
_FAULT = pa.struct(
    [
        ("sample_id", pa.int64()),
        ("attempt", pa.int16()),
        ("slide_id", pa.string()),
        ("reason", pa.string()),
        ("whole_slide", pa.bool_()),
    ]
)
ROW_SCHEMA = pa.schema(_ROW_FIELDS)
BLOCK_SCHEMA = pa.schema(
    [
        *_ROW_FIELDS,
        ("sample_ids", pa.list_(pa.int64())),
        ("slides", pa.list_(pa.int32())),
        ("mpp", pa.list_(pa.float64())),
        ("faults", pa.list_(_FAULT)),
        ("tiles", pa.large_binary()),
    ]
)


@dataclass(frozen=True)
class Chapter:
    """One chapter, as it is planned.

    Attributes:
        number: Chapters are numbered through the run, alike for all replicas.
        replica: Whose tiles; None is padding, which keeps the ranks in step and holds no tiles.
        first_step: First step of it.
        last_step: Last step of it, included.
    """

    number: int
    replica: int | None
    first_step: int
    last_step: int

    @property
    def steps(self) -> range:
        """Its steps."""
        return range(self.first_step, self.last_step + 1)

    def sample_ids(self, spec: PlanSpec) -> NDArray[np.int64]:
        """Its sample ids in the plan: int64 [steps, b], empty for padding."""
        if self.replica is None:
            return np.empty((0, 0), np.int64)
        b = spec.tiles_per_micro_batch
        steps_S1 = np.arange(self.first_step, self.last_step + 1, dtype=np.int64)[:, None]
        return (steps_S1 * spec.replicas + self.replica) * b + np.arange(b, dtype=np.int64)

    def to_row(self) -> pa.Table:
        """One row of `ROW_SCHEMA`."""
        replica = _PADDING if self.replica is None else self.replica
        values = (self.number, replica, self.first_step, self.last_step)
        return pa.table([[value] for value in values], schema=ROW_SCHEMA)

    @classmethod
    def from_row(cls, row: pa.Table) -> "Chapter":
        """Inverse of `to_row`; columns beyond those of `ROW_SCHEMA` are ignored."""
        number, replica, first_step, last_step = (row[name][0].as_py() for name in ROW_SCHEMA.names)
        return cls(number, None if replica == _PADDING else replica, first_step, last_step)


@dataclass(frozen=True)
class ChapterTiles:
    """What a reader found for a chapter.

    Attributes:
        sample_ids: int64 [steps, b].
        slides: int32 [steps, b], rows of the catalogue.
        mpp: float64 [steps, b].
        tiles: uint8 [steps, b, R, R, 3].
        faults: Attempts that were given up for the next one, in the order of their sample ids.
    """

    sample_ids: NDArray[np.int64]
    slides: NDArray[np.int32]
    mpp: NDArray[np.float64]
    tiles: NDArray[np.uint8]
    faults: Sequence[Fault] = field(default=())

    @classmethod
    def padding(cls) -> "ChapterTiles":
        """No tiles at all."""
        return cls(
            np.empty((0, 0), np.int64),
            np.empty((0, 0), np.int32),
            np.empty((0, 0)),
            np.empty((0, 0, 0, 0, 3), np.uint8),
        )

    def to_block(self, chapter: Chapter) -> pa.Table:
        """One row of `BLOCK_SCHEMA` over the memory of `tiles`."""
        ends = np.array([0, self.tiles.nbytes], np.int64)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(self.tiles).reshape(-1))]
        columns = [
            *chapter.to_row().columns,
            pa.array([self.sample_ids.reshape(-1)], pa.list_(pa.int64())),
            pa.array([self.slides.reshape(-1)], pa.list_(pa.int32())),
            pa.array([self.mpp.reshape(-1)], pa.list_(pa.float64())),
            pa.array([[fault.to_dict() for fault in self.faults]], pa.list_(_FAULT)),
            pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers),
        ]
        return pa.table(columns, schema=BLOCK_SCHEMA)


def chapters(replica: int | None, start_step: int, steps: int, chapter_steps: int) -> Iterator[Chapter]:
    """Chapters of one replica from `start_step` up to, and without, step `steps`."""
    first = start_step
    while first < steps:
        number = first // chapter_steps
        last = min((number + 1) * chapter_steps, steps) - 1
        yield Chapter(number, replica, first, last)
        first = last + 1


def deal(spec: PlanSpec, workers: int, start_step: int, steps: int) -> Iterator[Chapter]:
    """Chapters of all replicas in the order in which a round-robin split gives each of `workers` ranks its own."""
    hands = [replicas_of(rank, workers, spec.replicas) for rank in range(workers)]
    for turn in chapters(None, start_step, steps, spec.chapter_steps):
        for replicas in zip(*hands, strict=True):
            for replica in replicas:
                yield Chapter(turn.number, replica, turn.first_step, turn.last_step)


def open_block(block: pa.Table, expected: Chapter, spec: PlanSpec) -> ChapterTiles:
    """The tiles of a block that must be the expected chapter; `tiles` is a read-only view of the block.

    Raises:
        StreamError: It is anything else.
    """
    if block.num_rows != 1 or block.schema.names != BLOCK_SCHEMA.names:
        raise _wrong("is not one chapter", f"{block.num_rows} rows of {block.schema.names}", "one row of a chapter")
    got = Chapter.from_row(block)
    if got != expected:
        raise _wrong("is another chapter", str(got), str(expected))
    sample_ids = expected.sample_ids(spec)
    got_ids = _list_of(block, "sample_ids")
    if not np.array_equal(got_ids, sample_ids.reshape(-1)):
        raise _wrong("holds other samples", f"{got_ids[:4]}...", f"{sample_ids.reshape(-1)[:4]}...")
    shape = (*sample_ids.shape, spec.region_px, spec.region_px, 3)
    tiles = _bytes_of(block["tiles"])
    if tiles.size != math.prod(shape):
        raise _wrong("has tiles of another size", f"{tiles.size} bytes", f"{math.prod(shape)} bytes")
    slides, mpp = _list_of(block, "slides"), _list_of(block, "mpp")
    if slides.size != sample_ids.size or mpp.size != sample_ids.size:
        raise _wrong("says too little of its tiles", f"{slides.size} slides, {mpp.size} scales", f"{sample_ids.size}")
    return ChapterTiles(
        sample_ids,
        slides.reshape(sample_ids.shape),
        mpp.reshape(sample_ids.shape),
        tiles.reshape(shape),
        tuple(Fault(**fault) for fault in block["faults"][0].as_py()),
    )


def _list_of(block: pa.Table, name: str) -> NDArray[Any]:
    values: NDArray[Any] = block[name].combine_chunks().flatten().to_numpy()
    return values


def _bytes_of(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """The one value of a large_binary column as a view; Arrow's own scalars would copy it."""
    chunk = next(chunk for chunk in column.chunks if len(chunk))
    _, offsets, data = chunk.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + 2]
    return np.frombuffer(data or b"", np.uint8)[start:stop]


def _wrong(what: str, value: str, expected: str) -> StreamError:
    return StreamError(
        f"a block of the feed {what}",
        value=value,
        expected=expected,
        remedy="nothing was trained on it: start the job again, which resumes at the last checkpoint",
    )
