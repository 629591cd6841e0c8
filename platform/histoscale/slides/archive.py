"""What there is to index: the slides of a listing, their ids, and what the user says of them. Protected."""

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from histoscale.errors import SlideIndexError
from histoscale.slides.commit import About
from histoscale.slides.identity import fingerprint, patient_id, slide_id
from histoscale.slides.locate import ENTRY_SUFFIXES, HAMAMATSU_SUFFIXES, LocatedSlide, locate, only_named
from histoscale.slides.records import SlideLocation
from histoscale.slides.sidecar import Sidecar, read_sidecar
from histoscale.slides.strata import Strata, gather_strata
from histoscale.storage import Store, join, open_store

DEFAULT_SIDECAR = "slides.csv"
_READS_AT_ONCE = 16


@dataclass(frozen=True)
class Source:
    """The listed slides of a place.

    Attributes:
        store: Where they are; ids are relative to its root.
        slides: All of them, sorted by path.
        only: The path of the only one wanted, where the user named one.
    """

    store: Store
    slides: Sequence[LocatedSlide] = field(repr=False)
    only: str | None = field(repr=False)


@dataclass(frozen=True)
class Archive:
    """Slides by id.

    Attributes:
        root_uri: Root of their paths.
        slides: Slide id -> slide.
        mpp: Slide path -> um/px that the user gives.
        strata: What the user says of where they come from.
        key: The id key.
    """

    root_uri: str
    slides: Mapping[str, LocatedSlide] = field(repr=False)
    mpp: Mapping[str, float] = field(repr=False)
    strata: Strata
    key: bytes = field(repr=False)

    def uri(self, name: str) -> str:
        """The URI of a slide."""
        return join(self.root_uri, self.slides[name].path)

    def location(self, name: str) -> SlideLocation:
        """Where a slide lies."""
        slide = self.slides[name]
        return SlideLocation(self.root_uri, slide.objects, self.mpp.get(slide.path))

    def fingerprint(self, name: str) -> bytes:
        """A keyed hash of all that the examination of a slide depends on: its objects and the scale given for it."""
        location = self.location(name)
        objects = [[info.key, info.size_bytes, info.etag] for info in location.objects]
        return fingerprint(self.key, json.dumps([objects, location.mpp_override]))

    def about(self) -> About:
        """What the commit of the index asks."""
        patients = self.strata.patients

        def patient(name: str) -> str | None:
            path = self.slides[name].path
            return patient_id(self.key, patients[path]) if path in patients else None

        return About(
            self.strata.columns,
            location=self.location,
            strata=lambda name: self.strata.of[self.slides[name].path],
            patient=patient,
        )


def list_slides(slides_uri: str) -> Source:
    """The slides of a folder, a bucket's prefix, or one of its files.

    Raises:
        SlideIndexError: There are none.
        StorageError: The place cannot be read.
    """
    store, only = slides_root(slides_uri)
    located = locate(store.list())
    if not located.slides:
        raise SlideIndexError(
            "no slides found",
            value=f"{located.ignored} other objects",
            expected=f"objects ending in {' '.join(ENTRY_SUFFIXES)}, or folders of .dcm",
            remedy="give the folder, the bucket's prefix or the file that holds slides",
        )
    sets = [slide for slide in located.slides if PurePosixPath(slide.path).suffix.lower() in HAMAMATSU_SUFFIXES]
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        contents = pool.map(lambda slide: store.get(slide.path), sets)
        named = {slide.path: only_named(slide, content) for slide, content in zip(sets, contents, strict=True)}
    return Source(store, [named.get(slide.path, slide) for slide in located.slides], only)


def describe_slides(source: Source, key: bytes, tables: Sequence[Sidecar], pattern: re.Pattern[str] | None) -> Archive:
    """Give the listed slides their ids, scales and strata.

    Args:
        source: The listing.
        key: The id key of the index.
        tables: What CSV files say, the most trusted first.
        pattern: A pattern on paths whose named groups are strata.

    Raises:
        SlideIndexError: Strata that do not fit, or could identify slides.
    """
    wanted = [slide for slide in source.slides if source.only in (None, slide.path)]
    strata = gather_strata(source.slides, tables, pattern)
    mpp: dict[str, float] = {}
    for table in reversed(tables):
        mpp |= table.mpp
    return Archive(source.store.uri, {slide_id(key, slide.path): slide for slide in wanted}, mpp, strata, key)


def read_tables(source: Source, sidecar: str | None, strata: Sequence[str], key: bytes | None = None) -> list[Sidecar]:
    """The CSV files about the slides, the most trusted first: `strata`, then `sidecar` or slides.csv beside the slides.

    Args:
        source: The slides.
        sidecar: URI of the sidecar.
        strata: URIs of tables of strata.
        key: The id key, where slides have ids already by which tables may name them.

    Raises:
        SlideIndexError: A file that was named is not there, or has faults.
        StorageError: One cannot be read.
    """
    ids = {} if key is None else {slide_id(key, slide.path): slide.path for slide in source.slides}
    what = "the CSV of --strata"
    tables = [read_sidecar(read_csv(uri, what), source.slides, what, ids) for uri in strata]
    if sidecar is not None:
        tables.append(read_sidecar(read_csv(sidecar, "the sidecar CSV"), source.slides, ids=ids))
    elif source.store.exists(DEFAULT_SIDECAR):
        tables.append(read_sidecar(source.store.get(DEFAULT_SIDECAR), source.slides, ids=ids))
    return tables


def read_csv(uri: str, what: str) -> bytes:
    """The content of a file that the user named.

    Raises:
        SlideIndexError: It is not there.
        StorageError: It cannot be read.
    """
    folder, _, name = uri.rpartition("/")
    store = open_store(folder or ("/" if uri.startswith("/") else "."))
    if not store.exists(name):
        raise SlideIndexError(f"{what} is not there", expected="the path or URI of a CSV file with a header")
    return store.get(name)


def slides_root(slides_uri: str) -> tuple[Store, str | None]:
    """The store that slides are listed in, and the path of the only one wanted where the URI names one.

    Raises:
        StorageError: The place cannot be read.
    """
    root, _, name = slides_uri.rstrip("/").rpartition("/")
    if root and PurePosixPath(name).suffix.lower() in ENTRY_SUFFIXES:
        parent = open_store(root, private=True)
        if parent.exists(name):
            return parent, name
    return open_store(slides_uri, private=True), None
