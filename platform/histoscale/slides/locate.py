"""Which objects of a listing are slides. Pure: works on names and sizes alone."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from histoscale.storage import ObjectInfo

SINGLE_FILE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".svslide")
DICOM_SUFFIX = ".dcm"


@dataclass(frozen=True)
class LocatedSlide:
    """One slide of a listing: protected.

    Attributes:
        path: The key of its object, or for a DICOM set its folder ("." for the root), relative to the root.
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

    A file with one of `SINGLE_FILE_SUFFIXES` is a slide; all `.dcm` of one folder are one slide, whose first
    object is the largest (the level with the most pixels), on a tie the first by key.
    """
    slides = []
    dicom: dict[str, list[ObjectInfo]] = {}
    ignored = 0
    for info in objects:
        key = PurePosixPath(info.key)
        suffix = key.suffix.lower()
        if suffix in SINGLE_FILE_SUFFIXES:
            slides.append(LocatedSlide(info.key, (info,)))
        elif suffix == DICOM_SUFFIX:
            dicom.setdefault(str(key.parent), []).append(info)
        else:
            ignored += 1
    for folder, instances in dicom.items():
        instances.sort(key=lambda info: (-info.size_bytes, info.key))
        slides.append(LocatedSlide(folder, tuple(instances)))
    return Located(tuple(sorted(slides, key=lambda slide: slide.path)), ignored)
