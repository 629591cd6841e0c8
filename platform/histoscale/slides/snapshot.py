"""The slide index on disk: immutable snapshots and the header that says which is current.

index.json                        format, version, the current snapshot, the history; written last: the commit
snapshots/F/snapshot.json         counts, strata columns and their values, parent, the bytes of every file
snapshots/F/slides/part-*         one row per slide: geometry, optics, tissue mask, strata (Parquet, sorted by slide id)
snapshots/F/refusals/part-*       slide id and reason of every slide that is not taken
snapshots/F/catalogue.npy         a fixed-width row per slide, see `sampling.rows`
snapshots/F/records.bin           layout and mask of every slide
pending/                          what an unfinished run has examined
exclusions/NNNN.json              slides that are withdrawn, see `exclusions`
report.html                       what is in the index, for people
protected/F/locations/part-*      slide id -> root URI, object keys, ETags: the only map to names
protected/F/locations.bin         the same by row of the catalogue
protected/refused.csv             slide id, URI, reason
protected/id_key                  the key of the slide ids

F is the snapshot id. A snapshot whose records are those of an earlier one, but whose objects moved or whose refusals
differ, has the same id and stands in the folder F-REVISION.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from histoscale.errors import SlideIndexError
from histoscale.slides.tables import torn
from histoscale.storage import ObjectInfo, Store, join, open_store

FORMAT = "histoscale-index"
VERSION = 2
HEADER = "index.json"
SNAPSHOTS, PENDING, EXCLUSIONS, PROTECTED, REPORT = "snapshots", "pending", "exclusions", "protected", "report.html"
SNAPSHOT_HEADER = "snapshot.json"
SLIDES, REFUSALS, LOCATIONS = "slides", "refusals", "locations"
CATALOGUE, RECORDS, LOCATIONS_BLOB = "catalogue.npy", "records.bin", "locations.bin"
REFUSED = "refused.csv"

_AGAIN = "run jobs/index.py again with this place as --out"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What stands in `snapshot.json`.

    Attributes:
        snapshot_id: A hash of the records: 16 hexadecimal digits.
        folder: Where it stands below `snapshots/`.
        revision: A hash of all else: where the objects lie, refusals, duplicates.
        parent: The folder of the snapshot that was current before, if any.
        created: Time of the commit, ISO 8601, UTC.
        slides: Number of slides.
        refused: Number of refused slides.
        unreachable: Number of slides that the storage did not give; the next run tries them.
        tissue_mm2: Area of all tissue.
        scales: Number of slides by um/px, rounded to two digits.
        reasons: Number of refused slides by reason.
        conflicts: Number of slides of which two origins give different um/px.
        duplicates: Number of slides that are probably copies or rescans of another.
        columns: Names of the strata columns.
        values: Values of each column; a code of the catalogue is a place in them.
        files: Bytes of every file, by its path below the snapshot's folder; `protected/...` lies below `protected/F/`.
    """

    snapshot_id: str
    folder: str
    revision: str
    parent: str | None
    created: str
    slides: int
    refused: int
    unreachable: int
    tissue_mm2: float
    scales: Mapping[str, int]
    reasons: Mapping[str, int]
    conflicts: int
    duplicates: int
    columns: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    files: Mapping[str, int] = field(repr=False)

    def to_json(self) -> bytes:
        """The content of `snapshot.json`."""
        return json.dumps({"format": f"{FORMAT}-snapshot", "version": VERSION} | asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Inverse of `to_json`.

        Raises:
            SlideIndexError: Not such a file, or one of another version.
        """
        try:
            content = json.loads(data)
            if content.pop("format") != f"{FORMAT}-snapshot" or content.pop("version") != VERSION:
                raise torn(f"{SNAPSHOT_HEADER} is of another format or version")
            content["columns"] = tuple(content["columns"])
            content["values"] = tuple(tuple(values) for values in content["values"])
            return cls(**content)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise torn(f"{SNAPSHOT_HEADER} is not that of a snapshot") from None

    def parts(self, kind: str) -> Iterator[ObjectInfo]:
        """The Parquet objects of a kind (`slides`, `refusals`, or of the protected part `locations`), in order."""
        prefix = f"{PROTECTED}/{kind}/" if kind == LOCATIONS else f"{kind}/"
        for name in sorted(name for name in self.files if name.startswith(prefix)):
            yield ObjectInfo(key_of(self.folder, name).removeprefix(f"{PROTECTED}/"), self.files[name], "")

    def file(self, name: str) -> ObjectInfo:
        """One of its objects outside of the protected part.

        Raises:
            SlideIndexError: It has no such file.
        """
        if name not in self.files:
            raise torn(f"{SNAPSHOT_HEADER} names no {name}")
        return ObjectInfo(key_of(self.folder, name), self.files[name], "")


def key_of(folder: str, name: str) -> str:
    """The key of a snapshot's file in the index."""
    if name.startswith(f"{PROTECTED}/"):
        return f"{PROTECTED}/{folder}/{name.removeprefix(f'{PROTECTED}/')}"
    return f"{SNAPSHOTS}/{folder}/{name}"


def protected(store: Store) -> Store:
    """The part of an index that names slides; in a folder, only its owner can read it."""
    return open_store(join(store.uri, PROTECTED), private=True)


def read_history(store: Store) -> list[dict[str, Any]]:
    """The snapshots of an index, oldest first: folder, snapshot_id, created, slides.

    Raises:
        SlideIndexError: No index, a damaged one, or one of another version.
    """
    if not store.exists(HEADER):
        raise SlideIndexError(
            f"no slide index: {HEADER} is missing",
            value=store.uri,
            expected="the --out of a finished jobs/index.py",
            remedy=_AGAIN,
        )
    try:
        header = json.loads(store.get(HEADER))
    except ValueError:
        raise torn(f"{HEADER} is not JSON") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise torn(f"{HEADER} is not that of a slide index")
    if header.get("version") != VERSION:
        raise SlideIndexError(
            "slide index of another version",
            value=header.get("version"),
            expected=str(VERSION),
            remedy="run jobs/index.py with a new place as --out",
        )
    history = header.get("history")
    if not isinstance(history, list) or not history or not all(isinstance(entry, dict) for entry in history):
        raise torn(f"{HEADER} has no history")
    return history


def read_snapshot(store: Store, snapshot_id: str | None = None) -> Snapshot:
    """The header of a snapshot: the current one, or the latest that has an id.

    Raises:
        SlideIndexError: No index, no such snapshot, or a damaged one.
    """
    history = read_history(store)
    folders = [str(entry.get("folder")) for entry in history if snapshot_id in (None, entry.get("snapshot_id"))]
    if not folders:
        raise SlideIndexError(
            "the index has no such snapshot",
            value=snapshot_id,
            expected=f"one of the {len(history)} in its history",
            remedy="give the index that the run began with",
        )
    key = key_of(folders[-1], SNAPSHOT_HEADER)
    if not store.exists(key):
        raise torn(f"there is no {key}")
    return Snapshot.from_json(store.get(key))


def write_header(store: Store, snapshot: Snapshot) -> None:
    """Make a snapshot the current one: the commit."""
    try:
        history = read_history(store)
    except SlideIndexError:
        history = []  # none yet, or torn: what it named can be found no more
    entry = {name: getattr(snapshot, name) for name in ("folder", "snapshot_id", "created", "slides", "refused")}
    header = {"format": FORMAT, "version": VERSION, "snapshot_id": snapshot.snapshot_id, "history": [*history, entry]}
    store.put(HEADER, json.dumps(header, indent=1).encode())


def is_ours(key: str) -> bool:
    """Whether an index has an object of this key."""
    return key in (HEADER, REPORT) or key.split("/", 1)[0] in (SNAPSHOTS, PENDING, EXCLUSIONS, PROTECTED)


def has_our_header(store: Store) -> bool:
    """Whether what stands in the header's place is one, be it of another version."""
    try:
        header = json.loads(store.get(HEADER))
    except ValueError:
        return True  # torn by a crash
    return isinstance(header, dict) and header.get("format") == FORMAT
