"""Slides that are withdrawn from training: numbered objects of slide ids, which never change once they are written.

They hold no name, and apply without a new snapshot: whoever trains reads them when it starts.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from histoscale.errors import SlideIndexError
from histoscale.slides.identity import index_key, patient_id, slide_id
from histoscale.slides.locate import LocatedSlide, locate
from histoscale.slides.records import LOCATIONS_SCHEMA, SLIDES_SCHEMA, location_from_row
from histoscale.slides.sidecar import read_withdrawn
from histoscale.slides.snapshot import EXCLUSIONS, LOCATIONS, SLIDES, protected, read_snapshot
from histoscale.slides.tables import read_rows, torn
from histoscale.storage import Store

_FORMAT = "histoscale-exclusion"
_KEY = re.compile(rf"{EXCLUSIONS}/([0-9]{{4,}})\.json")
_TRIES = 100  # writers that append at the same moment


@dataclass(frozen=True)
class Exclusion:
    """One request to leave slides out.

    Attributes:
        number: Its place among the requests, from 1.
        created: When it was made, ISO 8601, UTC.
        slide_ids: The slides, sorted.
    """

    number: int
    created: str
    slide_ids: tuple[str, ...]


def require_alone(options: Mapping[str, object]) -> None:
    """Refuse options that would change nothing beside `--exclude`.

    Args:
        options: What was given for options of indexing, by name; what is false was not.

    Raises:
        SlideIndexError: One of them was given.
    """
    given = [f"--{name}" for name, value in options.items() if value]
    if given:
        raise SlideIndexError(
            f"--exclude indexes nothing and has no use for {given[0]}",
            value=" ".join(["--exclude", *given]),
            expected="--exclude alone",
            remedy="withdraw the slides first, then run the command again without --exclude",
        )


def read_exclusions(store: Store) -> tuple[Exclusion, ...]:
    """All exclusions of an index, in their order.

    Raises:
        SlideIndexError: One of them is damaged.
        StorageError: They cannot be read.
    """
    found = []
    for info in store.list(EXCLUSIONS):
        named = _KEY.fullmatch(info.key)
        try:
            content = json.loads(store.get(info.key))
            if named is None or content["format"] != _FORMAT or content["count"] != len(content["slide_ids"]):
                raise torn(f"{info.key} is no exclusion")
            found.append(Exclusion(int(named[1]), str(content["created"]), tuple(map(str, content["slide_ids"]))))
        except (ValueError, KeyError, TypeError):
            raise torn(f"{info.key} is no exclusion") from None
    return tuple(sorted(found, key=lambda exclusion: exclusion.number))


def append_exclusion(store: Store, slide_ids: Iterable[str]) -> Exclusion:
    """Write a new exclusion after the last one; of writers at the same moment, each gets a number of its own.

    Raises:
        SlideIndexError: Others append again and again.
        StorageError: The index cannot be written.
    """
    wanted = tuple(sorted(set(slide_ids)))
    for _ in range(_TRIES):
        number = max((exclusion.number for exclusion in read_exclusions(store)), default=0) + 1
        exclusion = Exclusion(number, datetime.now(UTC).isoformat(timespec="seconds"), wanted)
        content = {"format": _FORMAT, "created": exclusion.created, "count": len(wanted), "slide_ids": wanted}
        key = f"{EXCLUSIONS}/{number:04d}.json"
        data = json.dumps(content, indent=1).encode()
        # A server may let two writers have the same key: what stands there in the end says whose it is.
        if store.put_if_absent(key, data) and store.get(key) == data:
            return exclusion
    raise SlideIndexError("exclusions are appended by others again and again", remedy="try again")


def exclude(store: Store, root_uri: str, data: bytes) -> Exclusion:
    """Exclude the slides and the patients' slides that a CSV names; see `sidecar.read_withdrawn`.

    Args:
        store: The index.
        root_uri: Where the slides lie; it must be what was indexed.
        data: The CSV.

    Raises:
        SlideIndexError: No index, one of another place, faults in the CSV, or a patient without slides.
        StorageError: The index cannot be read or written.
    """
    snapshot = read_snapshot(store)
    names = protected(store)
    slides: list[LocatedSlide] = []
    for part in snapshot.parts(LOCATIONS):
        for row in read_rows(names, part, LOCATIONS_SCHEMA):
            location = location_from_row(row)
            if location.root_uri != root_uri:
                raise SlideIndexError(
                    "the index is of slides of another place",
                    value=store.uri,
                    expected="the SLIDES that it was made of",
                    remedy="give SLIDES as it was given when they were indexed",
                )
            slides += locate(location.objects).slides
    withdrawn = read_withdrawn(data, slides)
    key = index_key(names)
    ids = {slide_id(key, path) for path in withdrawn.paths}
    wanted = {patient_id(key, patient): None for patient in withdrawn.patients}
    met = set()
    for part in snapshot.parts(SLIDES) if wanted else ():
        for row in read_rows(store, part, SLIDES_SCHEMA, ["slide_id", "patient"]):
            if row["patient"] in wanted:
                ids.add(row["slide_id"])
                met.add(row["patient"])
    if len(met) < len(wanted):
        raise SlideIndexError(
            f"{len(wanted) - len(met)} of {len(wanted)} patients to exclude have no slide in the index",
            expected="patients as the column patient names them when the slides are indexed",
            remedy="correct the list, or name their slides in a column slide",
        )
    return append_exclusion(store, ids)
