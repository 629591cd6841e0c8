"""The sidecar CSV `slide,mpp`: microns per pixel of slides that do not say theirs. Pure.

Diagnoses name lines, never slides: a slide's name may be a record number.
"""

import csv
from collections.abc import Mapping, Sequence

from histoscale.errors import SlideIndexError
from histoscale.slides.locate import LocatedSlide
from histoscale.slides.openslide_reader import PLAUSIBLE_MPP

COLUMNS = ("slide", "mpp")


def read_sidecar(data: bytes, slides: Sequence[LocatedSlide]) -> dict[str, float]:
    """Microns per pixel by slide path.

    Args:
        data: The CSV, UTF-8, with a header of the columns `slide` (file name or path) and `mpp`.
        slides: The slides that it may name.

    Raises:
        SlideIndexError: Every fault of the file at once, each with its line.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise _error(["not UTF-8 text"]) from None
    reader = csv.DictReader(lines, restkey="", strict=True)
    paths = _paths_by_name(slides)
    mpp_by_path: dict[str, float] = {}
    try:
        faults = _header_faults(reader.fieldnames or ())
        for row in () if faults else reader:
            faults += _take(row, paths, mpp_by_path, f"line {reader.line_num}: ")
    except csv.Error:
        faults = [f"line {reader.line_num}: not CSV"]
    if faults:
        raise _error(faults)
    return mpp_by_path


def _error(faults: Sequence[str]) -> SlideIndexError:
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in the sidecar CSV"
    return SlideIndexError(
        f"{count}: {'; '.join(faults)}",
        expected="columns slide,mpp; slide = file name or path relative to SLIDES, mpp in um/px",
        remedy="correct the lines named here and submit the job again",
    )


def _paths_by_name(slides: Sequence[LocatedSlide]) -> dict[str, list[str]]:
    """Every name that a slide answers to (its path, its last part) and the paths that answer to it."""
    paths: dict[str, list[str]] = {}
    for slide in slides:
        for name in {slide.path, slide.path.rsplit("/", 1)[-1]}:
            paths.setdefault(name, []).append(slide.path)
    # A full path is never ambiguous, even if another slide's file has the same name.
    return paths | {slide.path: [slide.path] for slide in slides}


def _header_faults(columns: Sequence[str]) -> list[str]:
    faults = [f"unknown column {number}" for number, name in enumerate(columns, 1) if name not in COLUMNS]
    faults += [f"no column {name}" for name in COLUMNS if name not in columns]
    return faults + [f"column {name} twice" for name in COLUMNS if list(columns).count(name) > 1]


def _take(
    row: Mapping[str, str | None], paths: Mapping[str, list[str]], into: dict[str, float], where: str
) -> list[str]:
    """Read one row into `into`; return its faults."""
    if "" in row:
        return [where + "more than two values"]
    faults = []
    mpp = _mpp(row["mpp"] or "")
    if mpp is None:
        faults.append(f"{where}mpp is not a number from {PLAUSIBLE_MPP[0]:g} to {PLAUSIBLE_MPP[1]:g}")
    found = paths.get((row["slide"] or "").strip().removesuffix("/"), [])
    if not found:
        faults.append(where + "no such slide in SLIDES")
    elif len(found) > 1:
        faults.append(f"{where}{len(found)} slides have this name: give the path")
    elif found[0] in into:
        faults.append(where + "slide given before")
    else:
        into[found[0]] = mpp or 0.0
    return faults


def _mpp(text: str) -> float | None:
    try:
        mpp = float(text)
    except ValueError:
        return None
    return mpp if PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] else None
