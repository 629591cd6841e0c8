"""The slide index on disk: written by `build`, read by everything after it.

index.json                     format, version, snapshot id, counts; written last, so it is the commit
slides.parquet                 one row per slide: geometry, optics, tissue mask
refusals.parquet               slide id and reason of every slide that is not taken
protected/locations.parquet    slide id -> root URI, object keys, ETags: the only map to names
protected/refused.csv          slide id, URI, reason
protected/id_key               the key of the slide ids
"""

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from histoscale.errors import SlideIndexError
from histoscale.slides.records import (
    LOCATIONS_SCHEMA,
    REFUSALS_SCHEMA,
    SLIDES_SCHEMA,
    Refusal,
    SlideIndex,
    SlideLocation,
    SlideRecord,
    location_from_row,
    location_to_row,
    record_from_row,
    record_to_row,
)
from histoscale.storage import Store, join, open_store

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

FORMAT = "histoscale-index"
VERSION = 1
HEADER = "index.json"
SLIDES = "slides.parquet"
REFUSALS = "refusals.parquet"
PROTECTED = "protected"
LOCATIONS = "locations.parquet"
REFUSED = "refused.csv"
_SNAPSHOT = b"snapshot_id"


@dataclass(frozen=True)
class RefusedSlide:
    """A refusal with the slide's URI: protected."""

    refusal: Refusal
    uri: str = field(repr=False)


def protected(store: Store) -> Store:
    """The part of an index that names slides; in a folder, only its owner can read it."""
    return open_store(join(store.uri, PROTECTED), private=True)


def make_index(records: Iterable[SlideRecord], refusals: Iterable[Refusal]) -> SlideIndex:
    """An index in its canonical order, with its snapshot id."""
    ordered = tuple(sorted(records, key=lambda record: record.slide_id))
    refused = tuple(sorted(refusals, key=lambda refusal: refusal.slide_id))
    return SlideIndex(_snapshot_id(ordered), ordered, refused)


def write_index(store: Store, index: SlideIndex, locations: Mapping[str, SlideLocation]) -> None:
    """Write an index and the protected map of its records; committed by the last object written."""
    location_rows = [location_to_row(record.slide_id, locations[record.slide_id]) for record in index.records]
    refusal_rows = [{"slide_id": refusal.slide_id, "reason": refusal.reason} for refusal in index.refusals]
    header = {
        "format": FORMAT,
        "version": VERSION,
        "snapshot_id": index.snapshot_id,
        "slides": len(index.records),
        "refused": len(index.refusals),
    }
    slide_rows = [record_to_row(record) for record in index.records]
    protected(store).put(LOCATIONS, _parquet(location_rows, LOCATIONS_SCHEMA, index.snapshot_id))
    store.put(SLIDES, _parquet(slide_rows, SLIDES_SCHEMA, index.snapshot_id))
    store.put(REFUSALS, _parquet(refusal_rows, REFUSALS_SCHEMA, index.snapshot_id))
    store.put(HEADER, json.dumps(header, indent=2).encode())


def write_refused(store: Store, refused: Sequence[RefusedSlide]) -> None:
    """Write the protected list of refused slides, for the person who has to look at them."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["slide_id", "uri", "reason"])
    for slide in sorted(refused, key=lambda slide: slide.refusal.slide_id):
        writer.writerow([slide.refusal.slide_id, slide.uri, slide.refusal.reason])
    protected(store).put(REFUSED, text.getvalue().encode(errors="backslashreplace"))


def read_index(store: Store) -> SlideIndex:
    """The committed index in `store`.

    Raises:
        SlideIndexError: No index, one of another version, or one whose parts do not belong together.
    """
    snapshot_id = str(_header(store).get("snapshot_id"))
    refusals = [Refusal(**row) for row in _rows(store, REFUSALS, REFUSALS_SCHEMA, snapshot_id)]
    records = [record_from_row(row) for row in _rows(store, SLIDES, SLIDES_SCHEMA, snapshot_id)]
    return SlideIndex(snapshot_id, tuple(records), tuple(refusals))


def read_locations(store: Store) -> dict[str, SlideLocation]:
    """The protected map of the committed index: slide id -> where its objects lie.

    Raises:
        SlideIndexError: As `read_index`.
    """
    rows = _rows(protected(store), LOCATIONS, LOCATIONS_SCHEMA, str(_header(store).get("snapshot_id")))
    return {row["slide_id"]: location_from_row(row) for row in rows}


def describe(index: SlideIndex) -> list[str]:
    """What is in an index, as lines for a person to read: counts, reasons, tissue, scales; no names."""
    lines = [f"accepted: {len(index.records)} slides, {sum(r.tissue_mm2 for r in index.records):.1f} mm2 of tissue"]
    scales = Counter(f"{record.mpp:.2f}" for record in index.records)
    lines.append(
        "um/px: "
        + ", ".join(f"{mpp} x {count}" for mpp, count in sorted(scales.items(), key=lambda item: float(item[0])))
    )
    if index.refusals:
        lines.append(f"refused: {len(index.refusals)} slides, by name in {PROTECTED}/{REFUSED} of the index")
        reasons = Counter(refusal.reason for refusal in index.refusals)
        lines += [f"  {count} x {reason}" for reason, count in reasons.most_common()]
    return [*lines, f"snapshot: {index.snapshot_id}"]


def _snapshot_id(records: Sequence[SlideRecord]) -> str:
    content = hashlib.sha256(f"{FORMAT} {VERSION}".encode())
    for record in records:
        row = record_to_row(record)
        row["mask"] = hashlib.sha256(row["mask"]).hexdigest()
        content.update(json.dumps(row, sort_keys=True).encode())
    return content.hexdigest()[:16]


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema, snapshot_id: str) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({_SNAPSHOT: snapshot_id}))
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _rows(store: Store, key: str, schema: pa.Schema, snapshot_id: str) -> list[dict[str, Any]]:
    if not store.exists(key):
        raise _torn(f"the index has no {key}")
    try:
        table = pq.read_table(io.BytesIO(store.get(key)))
    except (pa.ArrowException, OSError):
        raise _torn(f"{key} of the index is not Parquet") from None
    if table.schema.names != schema.names:
        raise _torn(f"{key} of the index has other columns than version {VERSION}")
    if (table.schema.metadata or {}).get(_SNAPSHOT) != str(snapshot_id).encode():
        raise _torn(f"{key} of the index is not of the snapshot in {HEADER}")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def is_ours(key: str) -> bool:
    """Whether an index has an object of this key."""
    return key in (HEADER, SLIDES, REFUSALS) or key.startswith(f"{PROTECTED}/")


def has_our_header(store: Store) -> bool:
    """Whether what stands in the header's place is one, be it of another version."""
    try:
        header = json.loads(store.get(HEADER))
    except ValueError:
        return True  # torn by a crash
    return isinstance(header, dict) and header.get("format") == FORMAT


def _header(store: Store) -> dict[str, Any]:
    again = "run jobs/index.py again with this place as --out"
    if not store.exists(HEADER):
        raise SlideIndexError(
            f"no slide index: {HEADER} is missing",
            value=store.uri,
            expected="the --out of a finished jobs/index.py",
            remedy=again,
        )
    try:
        header = json.loads(store.get(HEADER))
    except ValueError:
        raise _torn(f"{HEADER} is not JSON") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _torn(f"{HEADER} is not that of a slide index")
    if header.get("version") != VERSION:
        raise SlideIndexError(
            "slide index of another version", value=header.get("version"), expected=str(VERSION), remedy=again
        )
    return header


def _torn(what: str) -> SlideIndexError:
    return SlideIndexError(
        what, expected="what jobs/index.py wrote", remedy="run jobs/index.py again with this place as --out"
    )
