"""Which tiles a probe is fitted on, which it is tuned by and which it is tested on.

Tiles of one patient, or of one slide, resemble each other far more than tiles of two: where a dataset tells such
groups, a group stands on one side of a split. Pure functions of labels, groups, parts and a seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from histoscale.errors import DatasetError
from histoscale.seeding import key, uniforms

TEST_SHARE = 0.3
VAL_SHARE = 0.2  # of the training part
_ATTEMPTS = 20

Labels = NDArray[np.int64]  # [N], positions in the classes
Rows = NDArray[np.int64]  # sorted positions of tiles in the dataset
Units = NDArray[np.int64]  # [N], the group of each tile, or each tile its own


@dataclass(frozen=True)
class Split:
    """One division of a dataset.

    Attributes:
        train: Tiles that a probe may be fitted on at last.
        fit: Tiles that it is fitted on while its strength is chosen; all of `train`, or `train` without `val`.
        val: Tiles that the choice is made by.
        test: Tiles that it is measured on; no probe sees them before.
    """

    train: Rows
    fit: Rows
    val: Rows
    test: Rows


def units_of(groups: NDArray[np.str_] | None, count: int) -> Units:
    """What is drawn as a whole, numbered from 0: groups where the dataset tells them, else the tiles themselves."""
    if groups is None:
        return np.arange(count, dtype=np.int64)
    numbers: Units = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    return numbers


def splits_of(
    labels: Labels,
    classes: Sequence[str],
    seeds: int,
    groups: NDArray[np.str_] | None = None,
    parts: NDArray[np.str_] | None = None,
) -> tuple[Split, ...]:
    """The splits that a dataset is evaluated on: its own one, or one for each seed.

    Args:
        labels: int64 [N].
        classes: Their names.
        seeds: How many splits are drawn where the dataset has none of its own.
        groups: str [N], or None where it tells none.
        parts: str [N] of "train", "val" and "test", or None where it comes undivided.

    Raises:
        DatasetError: A class is missing in a part, or too small or too little spread to be divided; or the dataset's
            own parts share groups.
    """
    if parts is not None:
        return (_own_split(labels, classes, units_of(groups, len(labels)), parts, groups is not None),)
    return tuple(_drawn_split(labels, classes, groups, seed) for seed in range(seeds))


def divide_tiles(labels: Labels, share: float, draw_key: int) -> NDArray[np.bool_]:
    """A share of each class's tiles, one at least: bool [N]."""
    draws = uniforms(draw_key, np.arange(len(labels), dtype=np.int64), 1)[:, 0]
    taken = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(share * len(rows)))
        taken[rows[np.argsort(draws[rows], kind="stable")[:count]]] = True
    return taken


def divide_groups(labels: Labels, units: Units, share: float, draw_key: int) -> NDArray[np.bool_] | None:
    """About a share of each class's tiles in whole groups: bool [N].

    None where no draw leaves every class on both sides.
    """
    if _groups_of_classes(labels, units)[np.unique(labels)].min() < 2:
        return None
    # Every class has two groups and so two tiles: scikit-learn takes no more folds than tiles of a class, or groups.
    most = min(round(1.0 / share), int(np.bincount(labels)[np.unique(labels)].min()), len(np.unique(units)))
    for folds in range(most, 1, -1):
        for attempt in range(_ATTEMPTS):
            state = key(draw_key, folds, attempt) & 0xFFFFFFFF  # what scikit-learn takes
            folding = StratifiedGroupKFold(folds, shuffle=True, random_state=state)
            for _, test in folding.split(labels, labels, units):
                taken = np.zeros(len(labels), dtype=np.bool_)
                taken[test] = True
                if _classes_in(labels[taken]) == _classes_in(labels[~taken]) == _classes_in(labels):
                    return taken
    return None


def _drawn_split(labels: Labels, classes: Sequence[str], groups: NDArray[np.str_] | None, seed: int) -> Split:
    _require(classes, np.bincount(labels, minlength=len(classes)), 2, "tiles", "the dataset")
    units = units_of(groups, len(labels))
    draw_key = key(seed, "probe split")
    if groups is None:
        taken: NDArray[np.bool_] | None = divide_tiles(labels, TEST_SHARE, draw_key)
    else:
        _require(classes, _groups_of_classes(labels, units), 2, "groups", "the dataset")
        taken = divide_groups(labels, units, TEST_SHARE, draw_key)
    if taken is None:
        raise DatasetError(
            "the groups cannot be divided so that every class stands on both sides",
            value=f"{len(np.unique(units))} groups for {len(classes)} classes",
            expected="groups (patients or slides) that each hold a part of the dataset",
            remedy="add patients of the rare classes, or leave these classes out",
        )
    return _with_inner_part(labels, units, np.flatnonzero(~taken), np.flatnonzero(taken), draw_key)


def _own_split(
    labels: Labels, classes: Sequence[str], units: Units, parts: NDArray[np.str_], told_groups: bool
) -> Split:
    """The dataset's own parts; where it has no test part, its validation part is the test."""
    has_test = bool((parts == "test").any())
    train, test = np.flatnonzero(parts == "train"), np.flatnonzero(parts == ("test" if has_test else "val"))
    for name, rows in (("training", train), ("test", test)):
        _require(classes, np.bincount(labels[rows], minlength=len(classes)), 1, "tiles", f"its {name} part")
    _require(classes, np.bincount(labels[train], minlength=len(classes)), 2, "tiles", "its training part")
    seen = np.flatnonzero((parts == "train") | (parts == "val")) if has_test else train
    if told_groups:
        require_apart(units, seen, test)
    if has_test and (parts == "val").any():
        return Split(train, train, np.flatnonzero(parts == "val"), test)
    return _with_inner_part(labels, units, train, test, key(0, "own split"))


def require_apart(units: Units, seen: Rows, test: Rows) -> None:
    """Refuse a split whose test part shares groups with what a probe sees before.

    Raises:
        DatasetError: It does; with how many groups and tiles, and no names.
    """
    shared = np.intersect1d(units[seen], units[test])
    if len(shared):
        tiles = int(np.isin(units[test], shared).sum())
        raise DatasetError(
            f"{len(shared)} of {len(np.unique(units[test]))} groups of the test part are in the training part as well",
            value=f"{tiles} of {len(test)} test tiles belong to them",
            expected="every group (patient or slide) on one side: others would be recognised, not classified",
            remedy="correct the groups or the parts of the dataset",
        )


def _with_inner_part(labels: Labels, units: Units, train: Rows, test: Rows, draw_key: int) -> Split:
    """Divide the training part once more; by tiles where its groups cannot be, since no test tile depends on that."""
    inner_key = key(draw_key, "inner")
    taken = None
    if len(np.unique(units[train])) < len(train):
        taken = divide_groups(labels[train], units[train], VAL_SHARE, inner_key)
    if taken is None:
        taken = divide_tiles(labels[train], VAL_SHARE, inner_key)
        # The one tile of a class stays where the probe is fitted.
        only = np.bincount(labels[train])[labels[train]] == 1
        taken &= ~only
    if not taken.any():
        return Split(train, train, train, test)
    return Split(train, train[~taken], train[taken], test)


def _groups_of_classes(labels: Labels, units: Units) -> NDArray[np.int64]:
    """In how many groups each class stands."""
    return np.bincount(np.unique(np.stack([labels, units]), axis=1)[0])


def _classes_in(labels: Labels) -> list[int]:
    found: list[int] = np.unique(labels).tolist()
    return found


def _require(classes: Sequence[str], counts: NDArray[np.int64], least: int, what: str, where: str) -> None:
    few = {name: int(count) for name, count in zip(classes, counts, strict=True) if count < least}
    if few:
        raise DatasetError(
            f"{len(few)} of {len(classes)} classes have too few {what} in {where}",
            value=", ".join(f"{name}: {count}" for name, count in few.items()),
            expected=f"{least} {what} or more of each class",
            remedy="add to these classes, or leave them out",
        )
