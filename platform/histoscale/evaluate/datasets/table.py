"""Any table of tiles: a CSV or Parquet file with the columns path and label, and group, center and part if known."""

import csv
import io
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets.folders import check_classes
from histoscale.evaluate.datasets.layout import list_place
from histoscale.evaluate.datasets.tiles import TEST, TRAIN, VAL, FileRow, LabelledTiles, from_files
from histoscale.storage import open_store

TABLE_SUFFIXES = (".csv", ".parquet")

_REQUIRED, _OPTIONAL = ("path", "label"), ("group", "center", "part")
_EXPECTED = "the columns path and label, and any of group, center and part; paths are relative to the table"
_MAX_NAMED = 10

_Rows = Sequence[Mapping[str, str]]


def open_table(uri: str) -> LabelledTiles:
    """The labelled tiles that a table names.

    Raises:
        DatasetError: The table is damaged, has other columns or fields that are empty, or names tiles that are not
            there; only one class, or a class with too few tiles to split.
        StorageError: The table cannot be read, or its folder not listed.
    """
    folder, _, file = uri.rstrip("/").rpartition("/")
    folder = folder or ("/" if uri.startswith("/") else ".")
    rows = _decode(open_store(folder, private=True).get(file), file)
    faults = [
        fault for number, row in enumerate(rows, 1) if (fault := _fault(row)) and (fault := f"row {number}: {fault}")
    ]
    if faults:
        raise _refusal(f"{len(faults)} rows of the table are not valid", _some(faults))
    if not rows:
        raise _refusal("the table has no rows", None)
    listing = list_place(folder)
    absent = [f"row {number}" for number, row in enumerate(rows, 1) if row["path"] not in listing.known]
    if absent:
        raise _refusal(f"{len(absent)} of {len(rows)} tiles of the table are not there", _some(absent))
    ordered = sorted(rows, key=lambda row: row["path"])
    tiles = [FileRow(row["path"], row["label"], *(row.get(name, "") for name in _OPTIONAL)) for row in ordered]
    check_classes(tiles, _EXPECTED, "add tiles of another class")
    return from_files(PurePosixPath(file).stem, sorted({tile.label for tile in tiles}), listing.store, tiles)


def _decode(data: bytes, file: str) -> _Rows:
    try:
        if file.lower().endswith(".csv"):
            reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True, restval="")
            _check_columns(reader.fieldnames or ())
            return [{name: value for name, value in row.items() if name} for row in reader]
        table = pq.read_table(pa.BufferReader(data))
        _check_columns(table.column_names)
        texts = [column.cast(pa.string()).to_pylist() for column in table.columns]
    except (UnicodeDecodeError, csv.Error, pa.ArrowException):
        raise _refusal("the table is no whole CSV or Parquet file", None) from None
    return [
        dict(zip(table.column_names, (text or "" for text in row), strict=True)) for row in zip(*texts, strict=True)
    ]


def _check_columns(columns: Sequence[str]) -> None:
    absent = [name for name in _REQUIRED if name not in columns]
    if absent:
        raise _refusal("the table lacks columns", ", ".join(absent))
    # A misspelt column must not be overlooked: without groups, patients are parted.
    known = (*_REQUIRED, *_OPTIONAL)
    unknown = [name for name in columns if name not in known]
    if unknown:
        near = [f"{name} (nearest: {get_close_matches(name, known, n=1, cutoff=0.0)[0]})" for name in unknown]
        raise _refusal("the table has columns that are not known", _some(near))
    if len(set(columns)) < len(columns):
        raise _refusal("the table has a column twice", None)


def _fault(row: Mapping[str, str]) -> str | None:
    empty = [name for name, value in row.items() if not value]
    if empty:
        return f"no {' and no '.join(empty)}"
    if row.get("part", TRAIN) not in (TRAIN, VAL, TEST):
        return f"part is not {TRAIN}, {VAL} or {TEST}"
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else "")


def _refusal(what: str, value: str | None) -> DatasetError:
    return DatasetError(what, value=value, expected=_EXPECTED, remedy="correct the table")
