"""Makes a snapshot of the index out of examined slides: staged on the local disk, uploaded, then named in the header.

Bounded memory: a part of the slides at a time; of all of them, only ids, likeness and codes.
"""

import hashlib
import json
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from histoscale.errors import SlideIndexError
from histoscale.sampling.rows import COPIED, ROW_DTYPE, sealed
from histoscale.slides.catalogue import (
    DUPLICATE,
    MPP_CONFLICT,
    ORIGIN_SHIFT,
    ORIGINS,
    catalogue_head,
    join_record,
)
from histoscale.slides.external_sort import SlideSorter
from histoscale.slides.likeness import duplicates
from histoscale.slides.records import (
    LOCATIONS_SCHEMA,
    REFUSALS_SCHEMA,
    SLIDES_SCHEMA,
    SlideLocation,
    kind_of,
    location_to_row,
)
from histoscale.slides.snapshot import (
    CATALOGUE,
    FORMAT,
    LOCATIONS,
    LOCATIONS_BLOB,
    PROTECTED,
    RECORDS,
    REFUSALS,
    SLIDES,
    SNAPSHOT_HEADER,
    VERSION,
    Snapshot,
    key_of,
    protected,
    read_history,
    read_snapshot,
    write_header,
)
from histoscale.slides.tables import write_table
from histoscale.storage import Store

REFUSALS_PER_PART = 65536
_NOT_RECORDS = ("fingerprint", "mask", "picture", "duplicate_of")


@dataclass(frozen=True)
class About:
    """What a commit asks about a slide, by id, beside its examination.

    Attributes:
        columns: Names of the strata columns.
        location: Where it lies.
        strata: Its values of the columns.
        patient: Its keyed patient id, where one is known.
    """

    columns: tuple[str, ...]
    location: Callable[[str], SlideLocation] = field(repr=False)
    strata: Callable[[str], tuple[str, ...]] = field(repr=False)
    patient: Callable[[str], str | None] = field(repr=False)


class RecordsHash:
    """Names a snapshot by what its records say, whatever stands beside them.

    Args:
        columns: Names of the strata columns.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self._hash = hashlib.sha256(f"{FORMAT} {VERSION} {list(columns)}".encode())

    def add(self, row: Mapping[str, Any]) -> None:
        """Take the next row of `SLIDES_SCHEMA`, in the order of the slide ids."""
        content = {name: row[name] for name in SLIDES_SCHEMA.names if name not in _NOT_RECORDS}
        content["layout"] = hashlib.sha256(row["layout"]).hexdigest()
        self._hash.update(json.dumps(content, sort_keys=True).encode())

    @property
    def snapshot_id(self) -> str:
        """The id of a snapshot of the rows so far."""
        return str(self._hash.hexdigest()[:16])


def commit(
    store: Store,
    sorter: SlideSorter,
    refusals: Sequence[Mapping[str, Any]],
    about: About,
    *,
    unreachable: int = 0,
) -> Snapshot:
    """Write a snapshot and make it the current one; what the current one says already is not written again.

    Args:
        store: The index.
        sorter: The examined slides.
        refusals: Rows of `REFUSALS_SCHEMA`.
        about: What else is known of each slide.
        unreachable: Slides that the storage did not give.
    """
    with tempfile.TemporaryDirectory(prefix="histoscale-commit-") as name:
        staging = Path(name)
        codes = _codes(sorter, about)
        with _Parts(staging, sorter.rows, about, codes) as parts:
            for part in sorter.parts():
                parts.write(part)
        refused = sorted(refusals, key=lambda row: str(row["slide_id"]))
        for number, start in enumerate(range(0, len(refused), REFUSALS_PER_PART)):
            rows = refused[start : start + REFUSALS_PER_PART]
            _write(staging / REFUSALS / _part_name(number), pa.Table.from_pylist(rows, schema=REFUSALS_SCHEMA))
        rest = [sorted(codes.twins.items()), unreachable, [[row["slide_id"], row["reason"]] for row in refused]]
        parts.rest_hash.update(json.dumps(rest).encode())
        return _publish(
            store,
            staging,
            snapshot_id=parts.records_hash.snapshot_id,
            revision=parts.rest_hash.hexdigest()[:8],
            slides=sorter.rows,
            refused=len(refused),
            unreachable=unreachable,
            tissue_mm2=round(parts.tissue_mm2, 3),
            scales=dict(sorted(parts.scales.items(), key=lambda item: float(item[0]))),
            reasons=dict(Counter(kind_of(row["reason"]) for row in refused).most_common()),
            conflicts=parts.conflicts,
            duplicates=len(codes.twins),
            columns=about.columns,
            values=codes.values,
        )


def _publish(store: Store, staging: Path, **content: Any) -> Snapshot:  # noqa: ANN401 - the fields of a Snapshot
    """Upload what is staged and name it in the header; the current snapshot where it is the same."""
    try:
        taken = [str(entry.get("folder")) for entry in read_history(store)]
        parent = read_snapshot(store)
    except SlideIndexError:
        taken, parent = [], None  # none yet, or torn: it is replaced
    name, revision = content["snapshot_id"], content["revision"]
    if parent is not None and (parent.snapshot_id, parent.revision) == (name, revision):
        return parent
    paths = sorted(path for path in staging.rglob("*") if path.is_file())
    snapshot = Snapshot(
        folder=f"{name}-{revision}" if name in taken else name,
        parent=parent.folder if parent else None,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={path.relative_to(staging).as_posix(): path.stat().st_size for path in paths},
        **content,
    )
    names = protected(store)
    for path in paths:
        key = key_of(snapshot.folder, path.relative_to(staging).as_posix())
        if key.startswith(f"{PROTECTED}/"):
            names.upload(path, key.removeprefix(f"{PROTECTED}/"))
        else:
            store.upload(path, key)
    store.put(key_of(snapshot.folder, SNAPSHOT_HEADER), snapshot.to_json())
    write_header(store, snapshot)
    return snapshot


@dataclass(frozen=True)
class _Codes:
    """What is known of a slide only from all of them: codes of strata and patients, and what it resembles."""

    values: tuple[tuple[str, ...], ...]
    places: tuple[dict[str, int], ...]
    patients: dict[str, int]
    twins: dict[str, str]


def _codes(sorter: SlideSorter, about: About) -> _Codes:
    likeness = sorter.likeness
    found: list[set[str]] = [set() for _ in about.columns]
    known: dict[str, str] = {}
    for entry in likeness:
        name = entry["slide_id"].decode()
        for seen, value in zip(found, about.strata(name), strict=True):
            seen.add(value)
        if patient := about.patient(name):
            known[name] = patient
        objects = sorted((info.size_bytes, info.etag) for info in about.location(name).objects)
        entry["content"] = hashlib.sha256(json.dumps(objects).encode()).hexdigest()[:16]
    groups = {patient: code for code, patient in enumerate(sorted(set(known.values())))}
    alone = (name for name in map(bytes.decode, likeness["slide_id"].tolist()) if name not in known)
    patients = {name: groups[patient] for name, patient in known.items()}
    patients |= {name: code for code, name in enumerate(alone, len(groups))}
    values = tuple(tuple(sorted(column)) for column in found)
    places = tuple({value: place for place, value in enumerate(column)} for column in values)
    return _Codes(values, places, patients, duplicates(likeness))


class _Parts:
    """Writes the slides of a snapshot, part by part in the order of their ids, and counts what is in them.

    Args:
        staging: Local folder of the snapshot.
        slides: How many slides there will be.
        about: What else is known of each slide.
        codes: Codes of strata and patients.
    """

    def __init__(self, staging: Path, slides: int, about: About, codes: _Codes) -> None:
        self._staging, self._about, self._codes = staging, about, codes
        self._number = 0
        # The first names the snapshot: what a training run depends on. The second tells apart what stands beside.
        self.records_hash = RecordsHash(about.columns)
        self.rest_hash = hashlib.sha256()
        self.tissue_mm2 = 0.0
        self.conflicts = 0
        self.scales: Counter[str] = Counter()
        (staging / PROTECTED).mkdir()
        self._files = ExitStack()
        self._records = self._files.enter_context((staging / RECORDS).open("wb"))
        self._locations = self._files.enter_context((staging / PROTECTED / LOCATIONS_BLOB).open("wb"))
        self._catalogue = self._files.enter_context((staging / CATALOGUE).open("wb"))
        self._catalogue.write(catalogue_head(slides))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def write(self, part: pa.Table) -> None:
        """Write the next slides, `EXAMINED_SCHEMA`."""
        rows = part.to_pylist()
        catalogue = np.zeros(len(rows), ROW_DTYPE)
        places = []
        for row, entry in zip(rows, catalogue, strict=True):
            name = row["slide_id"]
            row |= {
                "patient": self._about.patient(name),
                "strata": list(self._about.strata(name)),
                "duplicate_of": self._codes.twins.get(name),
            }
            location = self._about.location(name)
            places.append(location_to_row(name, location))
            self._fill(entry, row, location.to_bytes())
            self._count(row, places[-1])
        catalogue["check"] = sealed(catalogue)
        self._catalogue.write(catalogue.tobytes())
        name = _part_name(self._number)
        _write(self._staging / SLIDES / name, pa.Table.from_pylist(rows, schema=SLIDES_SCHEMA))
        _write(self._staging / PROTECTED / LOCATIONS / name, pa.Table.from_pylist(places, schema=LOCATIONS_SCHEMA))
        self._number += 1

    def _fill(self, entry: np.void, row: Mapping[str, Any], location: bytes) -> None:
        for name in ("mpp", "width_px0", "height_px0", "mask_rows", "mask_columns", "size_bytes"):
            entry[name] = row[name]
        record = join_record(row["layout"], row["mask"])
        entry["slide_id"] = bytes.fromhex(row["slide_id"])
        entry["mask_um"] = row["mask_px0"] * row["mpp"]
        entry["patient"] = self._codes.patients[row["slide_id"]]
        for column, value in enumerate(row["strata"]):
            entry["strata"][column] = self._codes.places[column][value]
        entry["record_check"] = zlib.crc32(record)
        entry["record_at"], entry["record_bytes"] = self._records.tell(), len(record)
        entry["location_at"], entry["location_bytes"] = self._locations.tell(), len(location)
        entry["flags"] = (
            (DUPLICATE if row["duplicate_of"] else 0)
            | (MPP_CONFLICT if row["mpp_conflict"] is not None else 0)
            | (0 if row["layout"] else COPIED)
            | ORIGINS.index(row["mpp_origin"]) << ORIGIN_SHIFT
        )
        self._records.write(record)
        self._locations.write(location)

    def _count(self, row: Mapping[str, Any], place: Mapping[str, Any]) -> None:
        self.tissue_mm2 += row["tissue_px"] * (row["mask_px0"] * row["mpp"] / 1000) ** 2
        self.conflicts += row["mpp_conflict"] is not None
        self.scales[f"{row['mpp']:.2f}"] += 1
        self.records_hash.add(row)
        self.rest_hash.update(json.dumps(place, sort_keys=True).encode())


def _write(path: Path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, table)


def _part_name(number: int) -> str:
    return f"part-{number:05d}.parquet"
