"""The slide index as a whole, for archives that fit into memory; `catalogue` is the way to millions of slides."""

import csv
import io
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from histoscale.slides.commit import About, RecordsHash, commit
from histoscale.slides.external_sort import SlideSorter
from histoscale.slides.records import (
    EXAMINED_SCHEMA,
    LOCATIONS_SCHEMA,
    REFUSALS_SCHEMA,
    SLIDES_SCHEMA,
    Refusal,
    SlideIndex,
    SlideLocation,
    SlideRecord,
    location_from_row,
    record_from_row,
    record_to_row,
)
from histoscale.slides.snapshot import (
    LOCATIONS,
    PROTECTED,
    REFUSALS,
    REFUSED,
    SLIDES,
    Snapshot,
    protected,
    read_snapshot,
)
from histoscale.slides.tables import read_rows, torn
from histoscale.storage import Store

__all__ = [
    "Refusal",
    "RefusedSlide",
    "SlideIndex",
    "SlideLocation",
    "SlideRecord",
    "describe",
    "make_index",
    "protected",
    "read_index",
    "read_locations",
    "write_index",
    "write_refused",
]


@dataclass(frozen=True)
class RefusedSlide:
    """A refusal with the slide's URI: protected."""

    refusal: Refusal
    uri: str = field(repr=False)


def make_index(
    records: Iterable[SlideRecord], refusals: Iterable[Refusal], columns: tuple[str, ...] = ()
) -> SlideIndex:
    """An index in its canonical order, with its snapshot id; `columns` names the strata that the records have."""
    ordered = tuple(sorted(records, key=lambda record: record.slide_id))
    refused = tuple(sorted(refusals, key=lambda refusal: refusal.slide_id))
    content = RecordsHash(columns)
    for record in ordered:
        content.add(record_to_row(record))
    return SlideIndex(content.snapshot_id, ordered, refused, columns)


def write_index(store: Store, index: SlideIndex, locations: Mapping[str, SlideLocation]) -> Snapshot:
    """Write an index and the protected map of its records as a snapshot, and make it the current one."""
    by_id = {record.slide_id: record for record in index.records}
    about = About(
        index.columns,
        location=lambda name: locations[name],
        strata=lambda name: by_id[name].strata,
        patient=lambda name: by_id[name].patient,
    )
    rows = [record_to_row(record) for record in index.records]
    refused = [{"slide_id": refusal.slide_id, "reason": refusal.reason} for refusal in index.refusals]
    with tempfile.TemporaryDirectory(prefix="histoscale-sort-") as folder:
        sorter = SlideSorter(Path(folder), len(rows))
        for batch in pa.Table.from_pylist(rows, schema=EXAMINED_SCHEMA).to_batches():
            sorter.add(batch)
        return commit(store, sorter, refused, about)


def read_index(store: Store, snapshot_id: str | None = None) -> SlideIndex:
    """All slides of a snapshot, by default of the current one.

    Raises:
        SlideIndexError: No index, no such snapshot, or one whose parts are damaged.
    """
    snapshot = read_snapshot(store, snapshot_id)
    refused = [row for part in snapshot.parts(REFUSALS) for row in read_rows(store, part, REFUSALS_SCHEMA)]
    try:
        records = [
            record_from_row(row) for part in snapshot.parts(SLIDES) for row in read_rows(store, part, SLIDES_SCHEMA)
        ]
    except ValueError:
        raise torn("a mask cannot be unpacked") from None
    if (len(records), len(refused)) != (snapshot.slides, snapshot.refused):
        raise torn("there are more or fewer slides than its snapshot says")
    refusals = tuple(Refusal(row["slide_id"], row["reason"]) for row in refused)
    return SlideIndex(snapshot.snapshot_id, tuple(records), refusals, snapshot.columns)


def read_locations(store: Store, snapshot_id: str | None = None) -> dict[str, SlideLocation]:
    """The protected map of a snapshot, by default of the current one: slide id -> where its objects lie.

    Raises:
        SlideIndexError: As `read_index`.
    """
    snapshot = read_snapshot(store, snapshot_id)
    names = protected(store)
    rows = [row for part in snapshot.parts(LOCATIONS) for row in read_rows(names, part, LOCATIONS_SCHEMA)]
    if len(rows) != snapshot.slides:
        raise torn("there are more or fewer locations than its snapshot has slides")
    return {row["slide_id"]: location_from_row(row) for row in rows}


def write_refused(store: Store, refused: Sequence[RefusedSlide]) -> None:
    """Write the protected list of slides that were not taken, for the person who has to look at them."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["slide_id", "uri", "reason"])
    for slide in sorted(refused, key=lambda slide: slide.refusal.slide_id):
        writer.writerow([slide.refusal.slide_id, slide.uri, slide.refusal.reason])
    protected(store).put(REFUSED, text.getvalue().encode(errors="backslashreplace"))


def describe(snapshot: Snapshot) -> list[str]:
    """What is in a snapshot, as lines for a person to read: counts, reasons, tissue, scales; no names."""
    lines = [f"accepted: {snapshot.slides} slides, {snapshot.tissue_mm2:.1f} mm2 of tissue"]
    lines.append("um/px: " + ", ".join(f"{mpp} x {count}" for mpp, count in snapshot.scales.items()))
    if snapshot.conflicts:
        lines.append(f"um/px in doubt: {snapshot.conflicts} slides, of which two origins give different scales")
    if snapshot.duplicates:
        lines.append(f"duplicates: {snapshot.duplicates} slides are probably copies or rescans of others; all are kept")
    for name, values in zip(snapshot.columns, snapshot.values, strict=True):
        lines.append(f"{name}: {len(values)} values")
    if snapshot.refused:
        lines.append(f"refused: {snapshot.refused} slides, by name in {PROTECTED}/{REFUSED} of the index")
        lines += [f"  {count} x {reason}" for reason, count in snapshot.reasons.items()]
    if snapshot.unreachable:
        lines.append(f"unreachable: {snapshot.unreachable} slides; the same command again tries them")
    return [*lines, f"snapshot: {snapshot.snapshot_id}"]
