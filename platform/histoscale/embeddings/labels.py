"""Labels of slides out of a CSV. Diagnoses name lines and never slides: a slide's name may be a record number. Pure."""

import csv
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import EmbeddingError
from histoscale.evaluate.splits import Labels

SLIDE_COLUMNS = ("slide_id", "slide")
LABEL, GROUP, SPLIT = "label", "group", "split"
PARTS = ("train", "val", "test")
_SHOWN = 20


@dataclass(frozen=True)
class SlideLabels:
    """Labelled slides that have embeddings, sorted by id.

    Attributes:
        slide_ids: The slides.
        classes: Names of the classes, sorted.
        labels: int64 [N], of each slide.
        groups: str [N], what is never divided, such as patients; None where nothing is known.
        parts: str [N] of `PARTS`, or None where the CSV does not divide them.
        without_file: How many labelled slides have no embeddings.
    """

    slide_ids: tuple[str, ...]
    classes: tuple[str, ...]
    labels: Labels
    groups: NDArray[np.str_] | None = field(repr=False)
    parts: NDArray[np.str_] | None
    without_file: int


def read_labels(
    data: bytes, resolve: Callable[[str], tuple[str, ...]], embedded: Collection[str], patients: dict[str, str]
) -> SlideLabels:
    """Labels of slides.

    Args:
        data: The CSV, UTF-8, with a header: `slide_id` or `slide`, `label`, and maybe `group` and `split`.
        resolve: From what a line says to the ids of the slides that it can mean.
        embedded: Slides that have a file.
        patients: Slide id -> patient; the groups where there is no column for them. A slide of an unknown patient is
            a group of its own.

    Raises:
        EmbeddingError: Every fault of the file at once, each with its line; or too few slides are left.
    """
    columns, rows = _table(data)
    slide_column = next((name for name in SLIDE_COLUMNS if name in columns), None)
    if slide_column is None or LABEL not in columns:
        raise _faulty([f"no column {LABEL if slide_column else ' or '.join(SLIDE_COLUMNS)}"])
    faults: list[str] = []
    found: dict[str, dict[str, str]] = {}
    for line, row in rows:
        ids = resolve(row[slide_column])
        reason = _fault_of(row, ids, found)
        if reason:
            faults.append(f"line {line}: {reason}")
        else:
            found[ids[0]] = row
    if faults:
        raise _faulty(faults)
    there = sorted(name for name in found if name in embedded)
    classes = tuple(sorted({found[name][LABEL] for name in there}))
    _require_classes(classes, Counter(found[name][LABEL] for name in there))
    groups = None
    if GROUP in columns:
        groups = np.array([found[name][GROUP] or f"\0{name}" for name in there])
    elif patients:
        groups = np.array([patients.get(name, f"\0{name}") for name in there])
    return SlideLabels(
        tuple(there),
        classes,
        np.array([classes.index(found[name][LABEL]) for name in there], np.int64),
        groups,
        np.array([found[name][SPLIT] for name in there]) if SPLIT in columns else None,
        len(found) - len(there),
    )


def _table(data: bytes) -> tuple[tuple[str, ...], list[tuple[int, dict[str, str]]]]:
    try:
        reader = csv.reader(data.decode("utf-8-sig").splitlines(), strict=True)
        columns = tuple(name.strip() for name in next(reader, []))
        rows = [
            (reader.line_num, dict(zip(columns, [*map(str.strip, row), *[""] * len(columns)], strict=False)))
            for row in reader
            if row
        ]
    except (UnicodeDecodeError, csv.Error):
        raise _faulty(["not CSV in UTF-8"]) from None
    return columns, rows


def _fault_of(row: dict[str, str], ids: tuple[str, ...], found: Collection[str]) -> str | None:
    if not ids:
        return "no such slide"
    if len(ids) > 1:
        return f"{len(ids)} slides have this name: give the path or the id"
    if ids[0] in found:
        return "slide given before"
    if not row[LABEL]:
        return "no label"
    if SPLIT in row and row[SPLIT] not in PARTS:
        return f"split is none of {', '.join(PARTS)}"
    return None


def _require_classes(classes: tuple[str, ...], counts: Counter[str]) -> None:
    if len(classes) < 2:
        raise EmbeddingError(
            "the labelled slides that have embeddings are not of two classes",
            value=f"{counts.total()} slides of {len(classes)} classes",
            expected="two classes or more",
            remedy="embed more of the labelled slides, or correct the labels",
        )
    few = {name: count for name, count in counts.items() if count < 2}
    if few:
        raise EmbeddingError(
            f"{len(few)} of {len(classes)} classes have one slide, which cannot be both learnt from and tested on",
            value=", ".join(sorted(few)),
            expected="two slides or more of each class",
            remedy="add slides of these classes, or leave them out",
        )


def _faulty(faults: list[str]) -> EmbeddingError:
    shown = "; ".join(faults[:_SHOWN]) + (f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else "")
    return EmbeddingError(
        f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in the CSV of labels: {shown}",
        expected="columns slide_id,label and maybe group,split; slides by id, or by name where --index is given",
        remedy="correct the lines named here",
    )
