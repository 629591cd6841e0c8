"""Slides as their owner names them: found in the protected map of an index. Nothing of it goes into a report."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from histoscale.slides.identity import index_key, slide_id
from histoscale.slides.locate import locate
from histoscale.slides.records import LOCATIONS_SCHEMA, SLIDES_SCHEMA, location_from_row
from histoscale.slides.snapshot import LOCATIONS, SLIDES, protected, read_snapshot
from histoscale.slides.tables import read_rows
from histoscale.storage import Store, join


@dataclass(frozen=True)
class SlideNames:
    """What slides answer to: protected.

    Attributes:
        ids: Path, URI, or last part of either, with and without its suffix -> ids of the slides of this name.
        patients: Slide id -> keyed id of its patient, where it is known.
    """

    ids: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    patients: Mapping[str, str] = field(default_factory=dict, repr=False)


def read_names(store: Store) -> SlideNames:
    """The names of the slides of an index's current snapshot.

    Raises:
        SlideIndexError: The index is damaged.
        StorageError: It, or its protected part, cannot be read.
    """
    snapshot, names = read_snapshot(store), protected(store)
    key = index_key(names)
    ids: dict[str, set[str]] = {}
    for part in snapshot.parts(LOCATIONS):
        for row in read_rows(names, part, LOCATIONS_SCHEMA):
            location = location_from_row(row)
            for slide in locate(location.objects).slides:
                last = slide.path.rsplit("/", 1)[-1]
                full = {slide.path, join(location.root_uri, slide.path)}
                for name in {*full, last, last.rpartition(".")[0] or last}:
                    ids.setdefault(name, set()).add(slide_id(key, slide.path))
    patients = {
        row["slide_id"]: row["patient"]
        for part in snapshot.parts(SLIDES)
        for row in read_rows(store, part, SLIDES_SCHEMA, ["slide_id", "patient"])
        if row["patient"]
    }
    return SlideNames({name: tuple(sorted(found)) for name, found in ids.items()}, patients)


def resolver(names: SlideNames, known: Callable[[str], bool]) -> Callable[[str], tuple[str, ...]]:
    """What gives the ids of the slides that a text names: its own where it is one, else those of that name."""
    return lambda text: (text,) if known(text) else names.ids.get(text.rstrip("/"), ())
