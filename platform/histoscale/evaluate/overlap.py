"""Whether a test set shares patients or slides with the slides that a network was trained on.

Names of slides are read from the protected part of an index and stay in `TrainingNames`. What leaves are counts, and
ids that tell nothing to whom has not the index's key.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import DatasetError
from histoscale.evaluate.datasets import LabelledTiles
from histoscale.slides.identity import index_key, patient_id
from histoscale.slides.records import LOCATIONS_SCHEMA, SLIDES_SCHEMA
from histoscale.slides.snapshot import LOCATIONS, SLIDES, protected, read_snapshot
from histoscale.slides.tables import read_rows
from histoscale.storage import Store

_SUFFIXES = re.compile(r"\.[A-Za-z]{2,8}")
# A TCGA barcode begins with the participant; a slide of Camelyon17 with the patient.
_PATIENTS = (
    re.compile(r"(?<![a-z0-9])(tcga-[a-z0-9]{2}-[a-z0-9]{4})(?![a-z0-9])"),
    re.compile(r"(?<![a-z0-9])(patient_[0-9]{3})(?![0-9])"),
)
# PCam names the slides of Camelyon16, which are called tumor_001, after their part.
_PREFIXES = re.compile(r"camelyon_(?:train|valid|test)_")
_NUMBER = re.compile(r"[0-9]{1,5}")  # short numbers repeat from archive to archive and name nothing


@dataclass(frozen=True)
class TrainingNames:
    """What the slides of an index may be known by: protected.

    Attributes:
        names: Names of slides and patients, as `names_of` gives them.
        patients: Keyed ids of the patients that the user told of.
        key: The index's id key.
    """

    names: frozenset[str] = field(repr=False)
    patients: frozenset[str] = field(repr=False)
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Overlap:
    """What a dataset shares with training slides.

    Attributes:
        groups: Number of the dataset's groups.
        shared: Keyed ids of the groups that are shared, sorted; they tell nothing without the index's key.
        tiles: bool [N], which tiles are of a shared group.
    """

    groups: int
    shared: tuple[str, ...]
    tiles: NDArray[np.bool_] = field(repr=False)

    def __str__(self) -> str:
        return (
            f"{len(self.shared)} of {self.groups} groups are of training slides or patients, "
            f"{int(self.tiles.sum())} of {len(self.tiles)} tiles"
        )


def training_names(index: Store, snapshot_id: str | None = None) -> TrainingNames:
    """What the slides of a snapshot, by default of the current one, may be known by.

    Raises:
        SlideIndexError: No index, no such snapshot, or one that is damaged.
        StorageError: Its protected part cannot be read.
    """
    snapshot = read_snapshot(index, snapshot_id)
    names = protected(index)
    rows = (row for part in snapshot.parts(LOCATIONS) for row in read_rows(names, part, LOCATIONS_SCHEMA, ["keys"]))
    slides = (row for part in snapshot.parts(SLIDES) for row in read_rows(index, part, SLIDES_SCHEMA, ["patient"]))
    return TrainingNames(
        frozenset(name for row in rows for key in row["keys"] for name in names_of(key)),
        frozenset(row["patient"] for row in slides if row["patient"]),
        index_key(names),
    )


def overlapping_groups(training: TrainingNames, groups: Iterable[str]) -> tuple[str, ...]:
    """The groups that training slides are of, each once, sorted: protected, for what they share with the index.

    A group is of a training slide where it has a name in common with it, or where its own keyed id is that of a
    patient of the index.
    """
    return tuple(
        sorted(
            group
            for group in set(groups)
            if names_of(group) & training.names or patient_id(training.key, group) in training.patients
        )
    )


def find_overlap(training: TrainingNames, tiles: LabelledTiles) -> Overlap:
    """What a dataset shares with training slides, without names.

    Raises:
        DatasetError: The dataset does not tell groups.
    """
    if tiles.groups is None:
        raise DatasetError(
            "the overlap with training slides cannot be told",
            value=tiles.name,
            expected="a dataset that tells the patient or the slide of each tile",
            remedy="give a table with the column group",
        )
    shared = overlapping_groups(training, tiles.groups.tolist())
    return Overlap(
        groups=len(np.unique(tiles.groups)),
        shared=tuple(sorted(patient_id(training.key, group) for group in shared)),
        tiles=np.isin(tiles.groups, np.array(shared, dtype=np.str_)),
    )


def names_of(name: str) -> frozenset[str]:
    """What a slide's path or a group's name may also be called, in lower case: itself without folders and suffixes.

    Of a TCGA barcode anywhere in it, the participant as well; of a slide of Camelyon17, its patient; of a slide as
    PCam names it, the slide of Camelyon16. A number of up to five digits is no name.
    """
    stem = PurePosixPath(name).name
    while suffix := _SUFFIXES.fullmatch(PurePosixPath(stem).suffix):
        stem = stem.removesuffix(suffix[0])
    stem = _PREFIXES.sub("", stem.lower(), count=1)
    found = {match[1] for pattern in _PATIENTS for match in pattern.finditer(name.lower())}
    return frozenset(found if not stem or _NUMBER.fullmatch(stem) else {stem, *found})
