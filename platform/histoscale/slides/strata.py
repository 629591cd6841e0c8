"""Strata of slides: what a user says of where they come from, out of CSV files and patterns on their paths. Pure.

Strata are public: they stand in the index in clear text and balance the plan. Patients are not: of a patient,
only a keyed id goes into the index.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from histoscale.errors import SlideIndexError
from histoscale.slides.locate import LocatedSlide
from histoscale.slides.sidecar import COLUMN_NAME, MAX_STRATA, MPP, PATIENT, SLIDE, Sidecar

MAX_VALUES = 10_000
_REMEDY = "leave the column out, or give coarser values"


@dataclass(frozen=True)
class Strata:
    """Strata of an archive, by slide path: protected, for the paths.

    Attributes:
        columns: Names of the strata columns.
        of: Values in the order of the columns; "" where one is not known.
        patients: Patients, as the user names them, of the slides whose patient is given.
    """

    columns: tuple[str, ...]
    of: Mapping[str, tuple[str, ...]] = field(repr=False)
    patients: Mapping[str, str] = field(repr=False)


def parse_pattern(text: str) -> re.Pattern[str]:
    """A pattern on slide paths whose named groups are strata.

    Raises:
        SlideIndexError: Not a regular expression, or without named groups that can be columns.
    """
    expected = "a regular expression with named groups, such as (?P<site>[^/]+)/(?P<stain>HE|IHC)/.*"
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise SlideIndexError("--pattern is not a regular expression", value=str(error), expected=expected) from None
    names = list(pattern.groupindex)
    if not names or any(name in (SLIDE, MPP) or not COLUMN_NAME.fullmatch(name) for name in names):
        raise SlideIndexError("--pattern names no strata", value=names or None, expected=expected)
    return pattern


def gather_strata(
    slides: Sequence[LocatedSlide],
    tables: Sequence[Sidecar],
    pattern: re.Pattern[str] | None,
) -> Strata:
    """Strata of every slide out of all that was given; of two values for one, the first table's wins.

    Args:
        slides: The slides.
        tables: What CSV files say, the most trusted first.
        pattern: Matched from the start of a slide's path; the least trusted.

    Raises:
        SlideIndexError: Too many columns, a pattern that fits no slide, or a column that could identify slides.
    """
    sources = [table.values for table in tables]
    names = [name for table in tables for name in table.columns]
    if pattern is not None:
        matched = {slide.path: match for slide in slides if (match := pattern.match(slide.path))}
        if not matched:
            raise SlideIndexError("--pattern fits the path of no slide", expected="paths relative to SLIDES")
        sources.append({path: match.groupdict(default="") for path, match in matched.items()})
        names += [name for name in pattern.groupindex if name != PATIENT]
    columns = tuple(dict.fromkeys(names))
    if len(columns) > MAX_STRATA:
        raise SlideIndexError("too many strata columns", value=len(columns), expected=f"at most {MAX_STRATA}")
    of = {}
    patients = {}
    for slide in slides:
        given: dict[str, str] = {}
        for source in reversed(sources):
            given |= {name: value for name, value in source.get(slide.path, {}).items() if value}
        of[slide.path] = tuple(given.get(name, "") for name in columns)
        if patient := given.get(PATIENT):
            patients[slide.path] = patient
    for number, name in enumerate(columns):
        _refuse_identifying(name, {path: values[number] for path, values in of.items() if values[number]})
    return Strata(columns, of, patients)


def _refuse_identifying(column: str, values: Mapping[str, str]) -> None:
    """Refuse a column that tells slides apart: it would carry their names, or patients', into the public part."""
    distinct = len(set(values.values()))
    if distinct > MAX_VALUES:
        raise SlideIndexError(
            f"the strata column {column} has {distinct} values", expected=f"at most {MAX_VALUES}", remedy=_REMEDY
        )
    if len(values) > 1 and distinct == len(values):
        raise SlideIndexError(
            f"the strata column {column} has another value for each of {distinct} slides",
            expected="values that slides share, since a value of one slide alone can identify it",
            remedy=_REMEDY,
        )
    if any(value in _names(path) for path, value in values.items()):
        raise SlideIndexError(
            f"the strata column {column} holds names of slides",
            expected="values that say nothing of a single slide",
            remedy=_REMEDY,
        )


def _names(path: str) -> tuple[str, ...]:
    name = path.rsplit("/", 1)[-1]
    return path, name, name.rsplit(".", 1)[0]
