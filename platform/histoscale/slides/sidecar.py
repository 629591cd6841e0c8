"""CSV files about slides: `slide,mpp` and strata columns, and lists of slides to exclude. Pure.

Diagnoses name lines and columns, never slides: a slide's name may be a record number.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from histoscale.errors import SlideIndexError
from histoscale.slides.locate import LocatedSlide
from histoscale.slides.scale import PLAUSIBLE_MPP

SLIDE, MPP, PATIENT = "slide", "mpp", "patient"
MAX_STRATA = 8
COLUMN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")

_EXPECTED = (
    f"columns slide and mpp, patient or up to {MAX_STRATA} strata such as site; slide = file name or path relative to "
    "SLIDES, or id, mpp in um/px"
)


@dataclass(frozen=True)
class Sidecar:
    """What a CSV says of slides, by slide path: protected.

    Attributes:
        mpp: Microns per pixel.
        values: Non-empty values of the other columns.
        columns: Names of the strata columns, in the order of the file.
    """

    mpp: dict[str, float] = field(default_factory=dict, repr=False)
    values: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Withdrawn:
    """Slides (by path) and patients that a CSV asks to exclude: protected."""

    paths: tuple[str, ...] = field(repr=False)
    patients: tuple[str, ...] = field(repr=False)


def read_sidecar(
    data: bytes,
    slides: Sequence[LocatedSlide],
    what: str = "the sidecar CSV",
    ids: Mapping[str, str] | None = None,
) -> Sidecar:
    """Scales and strata of slides.

    Args:
        data: The CSV, UTF-8, with a header: `slide` (file name or path) and any of `mpp`, `patient` and strata.
        slides: The slides that it may name.
        what: What diagnoses call the file.
        ids: Slide id -> path, where slides may be named by their ids, too.

    Raises:
        SlideIndexError: Every fault of the file at once, each with its line.
    """
    table = _Table(data, what, _EXPECTED)
    paths = {name: [path] for name, path in (ids or {}).items()} | _paths_by_name(slides)
    found = Sidecar(columns=tuple(name for name in table.columns if name not in (SLIDE, MPP, PATIENT)))
    table.check_header(_sidecar_header_faults(table.columns, found.columns))
    given: set[str] = set()
    for where, row in table.rows():
        path = _resolve(row.pop(SLIDE), paths, given, where, table.faults)
        mpp = row.pop(MPP, "")
        value = _mpp(mpp)
        # A table of strata may leave a scale open; a table of scales may not.
        if value is None and (mpp or table.columns == (SLIDE, MPP)):
            table.faults.append(f"{where}mpp is not a number from {PLAUSIBLE_MPP[0]:g} to {PLAUSIBLE_MPP[1]:g}")
        if path is not None:
            found.values[path] = {name: text for name, text in row.items() if text}
            if value is not None:
                found.mpp[path] = value
    table.check()
    return found


def read_withdrawn(data: bytes, slides: Sequence[LocatedSlide]) -> Withdrawn:
    """Slides and patients to exclude.

    Args:
        data: The CSV, UTF-8, with a header: `slide` (file name or path), `patient`, or both, one of them given in
            each line.
        slides: The slides that it may name.

    Raises:
        SlideIndexError: Every fault of the file at once, each with its line.
    """
    table = _Table(data, "the CSV of exclusions", "the columns slide, patient or both, and one of them in each line")
    unknown = [f"unknown column {n}" for n, name in enumerate(table.columns, 1) if name not in (SLIDE, PATIENT)]
    table.check_header(unknown or ([] if table.columns else ["no column slide or patient"]))
    names = _paths_by_name(slides)
    paths: set[str] = set()
    patients: set[str] = set()
    for where, row in table.rows():
        slide, patient = row.get(SLIDE, ""), row.get(PATIENT, "")
        if bool(slide) == bool(patient):
            table.faults.append(where + "one of slide and patient is to be given")
        elif patient:
            patients.add(patient)
        else:
            _resolve(slide, names, paths, where, table.faults)
    table.check()
    return Withdrawn(tuple(sorted(paths)), tuple(sorted(patients)))


class _Table:
    """A CSV with a header, and the faults that were found in it so far."""

    def __init__(self, data: bytes, what: str, expected: str) -> None:
        self.faults: list[str] = []
        self._what, self._expected = what, expected
        try:
            lines = data.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            self.check_header(["not UTF-8 text"])
        self._reader = csv.reader(lines, strict=True)
        try:
            self.columns = tuple(name.strip() for name in next(self._reader, []))
        except csv.Error:
            self.check_header(["line 1: not CSV"])

    def check_header(self, faults: Sequence[str]) -> None:
        """Refuse the file for faults that leave nothing to read."""
        self.faults += faults
        self.check()

    def check(self) -> None:
        """Refuse the file if faults were found.

        Raises:
            SlideIndexError: Holds all of them.
        """
        if self.faults:
            count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''} in {self._what}"
            raise SlideIndexError(
                f"{count}: {'; '.join(self.faults)}",
                expected=self._expected,
                remedy="correct the lines named here and submit the job again",
            )

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """(Where it is, as text; values by column) of each line; lines that are no rows become faults."""
        try:
            for values in self._reader:
                where = f"line {self._reader.line_num}: "
                if len(values) > len(self.columns):
                    self.faults.append(f"{where}more than {len(self.columns)} values")
                elif values:
                    padded = [*values, *[""] * (len(self.columns) - len(values))]
                    yield where, dict(zip(self.columns, (value.strip() for value in padded), strict=True))
        except csv.Error:
            self.faults.append(f"line {self._reader.line_num}: not CSV")


def _sidecar_header_faults(columns: Sequence[str], strata: Sequence[str]) -> list[str]:
    # A name that is no plain word is not shown: a file without a header has a slide's name there.
    faults = [f"unknown column {n}" for n, name in enumerate(columns, 1) if not COLUMN_NAME.fullmatch(name)]
    faults += [f"no column {SLIDE}"] if SLIDE not in columns else []
    words = dict.fromkeys(name for name in columns if COLUMN_NAME.fullmatch(name))
    faults += [f"column {name} twice" for name in words if list(columns).count(name) > 1]
    if len(strata) > MAX_STRATA:
        faults.append(f"{len(strata)} strata columns")
    if not faults and len(columns) < 2:
        faults.append("no column beside slide")
    return faults


def _paths_by_name(slides: Sequence[LocatedSlide]) -> dict[str, list[str]]:
    """Every name that a slide answers to (its path, its last part) and the paths that answer to it."""
    paths: dict[str, list[str]] = {}
    for slide in slides:
        for name in {slide.path, slide.path.rsplit("/", 1)[-1]}:
            paths.setdefault(name, []).append(slide.path)
    # A full path is never ambiguous, even if another slide's file has the same name.
    return paths | {slide.path: [slide.path] for slide in slides}


def _resolve(name: str, paths: Mapping[str, list[str]], given: set[str], where: str, faults: list[str]) -> str | None:
    """The path of the slide that a row names, noted in `given`; None and a fault where there is not exactly one."""
    found = paths.get(name.removesuffix("/"), [])
    if not found:
        faults.append(where + "no such slide in SLIDES")
    elif len(found) > 1:
        faults.append(f"{where}{len(found)} slides have this name: give the path")
    elif found[0] in given:
        faults.append(where + "slide given before")
    else:
        given.add(found[0])
        return found[0]
    return None


def _mpp(text: str) -> float | None:
    try:
        mpp = float(text)
    except ValueError:
        return None
    return mpp if PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] else None
