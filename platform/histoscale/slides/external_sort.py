"""Sorts the rows of millions of slides by slide id in bounded memory.

Slide ids are keyed hashes and so evenly spread: rows go to local files by the leading digits of their id, and each
file, which is then of a known size, is sorted in memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from histoscale.slides.likeness import LIKENESS_DTYPE
from histoscale.slides.records import EXAMINED_SCHEMA

ROWS_PER_PART = 8192
"""On the average; also the rows of a part of a snapshot."""

_PREFIX_DIGITS = 8


class SlideSorter:
    """Takes rows of `EXAMINED_SCHEMA` in any order, gives them back part by part, sorted by slide id.

    Args:
        folder: A local folder of its own.
        expected: About how many rows will come.
        rows_per_part: Rows of a part, on the average.
    """

    def __init__(self, folder: Path, expected: int, rows_per_part: int = ROWS_PER_PART) -> None:
        self._folder = folder
        self._parts = max(1, -(-expected // rows_per_part))
        self.rows = 0
        self._files: dict[int, tuple[IO[bytes], pa.RecordBatchStreamWriter]] = {}
        self._likeness = [np.empty(0, LIKENESS_DTYPE)]

    @property
    def likeness(self) -> NDArray[np.void]:
        """What is compared of all rows that were taken, without `content`: `LIKENESS_DTYPE`, sorted by slide id."""
        joined = np.concatenate(self._likeness)
        return joined[np.argsort(joined["slide_id"])]

    def add(self, batch: pa.RecordBatch) -> None:
        """Take rows."""
        part_of = _part_of(batch["slide_id"], self._parts)
        for part in np.unique(part_of):
            self._writer(int(part)).write_batch(batch.filter(pa.array(part_of == part)))
        likeness = np.zeros(batch.num_rows, LIKENESS_DTYPE)
        for name in ("slide_id", "width_px0", "height_px0", "mpp", "look", "tissue_px"):
            likeness[name] = batch[name].to_numpy(zero_copy_only=False)
        self._likeness.append(likeness)
        self.rows += batch.num_rows

    def parts(self) -> Iterator[pa.Table]:
        """All rows, a part at a time; each part's file goes as it is read, and no more rows are taken."""
        for file, writer in self._files.values():
            writer.close()
            file.close()
        for part in sorted(self._files):
            path = self._path(part)
            with pa.ipc.open_stream(path) as reader:
                table: pa.Table = reader.read_all()
            path.unlink()
            yield table.sort_by("slide_id").combine_chunks()

    def _writer(self, part: int) -> pa.RecordBatchStreamWriter:
        if part not in self._files:
            file = self._path(part).open("wb")
            self._files[part] = file, pa.ipc.new_stream(file, EXAMINED_SCHEMA)
        return self._files[part][1]

    def _path(self, part: int) -> Path:
        return self._folder / f"{part}.arrow"


def _part_of(slide_ids: pa.Array, parts: int) -> NDArray[np.uint64]:
    prefixes = np.array([int(name[:_PREFIX_DIGITS], 16) for name in slide_ids.to_pylist()], np.uint64)
    return prefixes * np.uint64(parts) >> np.uint64(4 * _PREFIX_DIGITS)
