"""Which objects of a listing are slides. Pure: works on names and sizes alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from histoscale.storage import ObjectInfo

SINGLE_FILE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".svslide")
DICOM_SUFFIX = ".dcm"
MIRAX_SUFFIX = ".mrxs"
HAMAMATSU_SUFFIXES = (".vms", ".vmu")
ENTRY_SUFFIXES = (*SINGLE_FILE_SUFFIXES, MIRAX_SUFFIX, *HAMAMATSU_SUFFIXES)
"""Suffixes of the files that open a slide, each a slide of its own."""

_MIRAX_INDEX = "slidedat.ini"
_HAMAMATSU_MEMBERS = (".jpg", ".jpeg", ".opt", ".ngr")


@dataclass(frozen=True, slots=True)
class LocatedSlide:
    """One slide of a listing: protected.

    Attributes:
        path: The key of the object that opens it, or for a DICOM set its folder ("." for the root), relative to the
            root.
        objects: Its objects; the first opens the slide.
    """

    path: str = field(repr=False)
    objects: tuple[ObjectInfo, ...] = field(repr=False)


@dataclass(frozen=True)
class Located:
    """The slides of a listing, sorted by path, and how many objects belong to none."""

    slides: tuple[LocatedSlide, ...]
    ignored: int


def locate(objects: Iterable[ObjectInfo]) -> Located:
    """Group the objects of a listing into slides.

    * A file with one of `SINGLE_FILE_SUFFIXES` is a slide.
    * All `.dcm` of one folder are one slide, whose first object is the largest (the level with the most pixels), on
      a tie the first by key.
    * MIRAX: `x.mrxs` with the files of the folder `x/` beside it, if that holds a Slidedat.ini.
    * Hamamatsu: a `.vms` or `.vmu` with every `.jpg`, `.opt` and `.ngr` of its folder; `only_named` narrows that to
      the files that it names.
    """
    entries: list[ObjectInfo] = []
    dicom: dict[str, list[ObjectInfo]] = {}
    others: dict[str, list[ObjectInfo]] = {}
    for info in objects:
        key = PurePosixPath(info.key)
        suffix = key.suffix.lower()
        if suffix in ENTRY_SUFFIXES:
            entries.append(info)
        else:
            group = dicom if suffix == DICOM_SUFFIX else others
            group.setdefault(str(key.parent), []).append(info)
    slides = [LocatedSlide(info.key, (info, *_members(info, others))) for info in entries]
    for folder, instances in dicom.items():
        instances.sort(key=lambda info: (-info.size_bytes, info.key))
        slides.append(LocatedSlide(folder, tuple(instances)))
    taken = {info.key for slide in slides if is_set(slide) for info in slide.objects[1:]}
    ignored = sum(info.key not in taken for folder in others.values() for info in folder)
    return Located(tuple(sorted(slides, key=lambda slide: slide.path)), ignored)


def is_set(slide: LocatedSlide) -> bool:
    """Whether a slide's files find each other by their names, so that a copy must keep these."""
    return PurePosixPath(slide.objects[0].key).suffix.lower() in (MIRAX_SUFFIX, *HAMAMATSU_SUFFIXES)


def only_named(slide: LocatedSlide, content: bytes) -> LocatedSlide:
    """A Hamamatsu slide with those of its files only that the content of its `.vms` or `.vmu` names.

    The photograph of the whole slide, label included, is left out.
    """
    lines = content.decode(errors="surrogateescape").splitlines()
    values = {value.strip() for key, _, value in (line.partition("=") for line in lines) if key.strip() != "MacroImage"}
    first, *rest = slide.objects
    named = [info for info in rest if PurePosixPath(info.key).name in values]
    return LocatedSlide(slide.path, (first, *named))


def _members(entry: ObjectInfo, others: Mapping[str, Sequence[ObjectInfo]]) -> list[ObjectInfo]:
    key = PurePosixPath(entry.key)
    suffix = key.suffix.lower()
    if suffix in HAMAMATSU_SUFFIXES:
        beside = others.get(str(key.parent), ())
        members = [info for info in beside if PurePosixPath(info.key).suffix.lower() in _HAMAMATSU_MEMBERS]
    elif suffix == MIRAX_SUFFIX:
        inside = others.get(str(key.with_suffix("")), ())
        names = {PurePosixPath(info.key).name.lower() for info in inside}
        members = [info for info in inside if PurePosixPath(info.key).suffix.lower() in (".dat", ".ini")]
        members = members if _MIRAX_INDEX in names else []
    else:
        members = []
    return sorted(members, key=lambda info: info.key)
