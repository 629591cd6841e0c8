"""How much of an embedding is about the center (laboratory, scanner, stain) rather than about the tissue.

Two questions, both on tiles that are balanced, so that neither class nor center can be told from the other: does a
tile lie nearer to its own tissue of other centers, or to other tissue of its own center; and how well does a linear
probe tell the center?
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from histoscale.errors import DatasetError
from histoscale.evaluate.features import FloatArray
from histoscale.evaluate.figures import Robustness
from histoscale.evaluate.intervals import RESAMPLES, Interval, bootstrap, interval, values_of
from histoscale.evaluate.linear import Ridge
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.probes import probe_features
from histoscale.evaluate.splits import Labels, Rows, Split, Units, splits_of, units_of
from histoscale.seeding import key, uniforms

NEIGHBOURS = 20
_CHUNK_ROWS = 2048
_MIN_TILES = 2  # of each class at each center


@dataclass(frozen=True)
class CenterDesign:
    """Tiles on which class and center are independent, and how they are divided to tell the center.

    Attributes:
        rows: Tiles of the dataset: every class that is kept stands at every center that is kept, equally often.
        labels: int64 [len(rows)], classes, numbered from 0.
        centers: int64 [len(rows)], centers, numbered from 0.
        units: int64 [len(rows)], what is drawn as a whole.
        splits: Of positions in `rows`, whole groups on one side, every center on both.
    """

    rows: Rows
    labels: Labels
    centers: Labels
    units: Units
    splits: tuple[Split, ...]


def center_design(
    labels: Labels, centers: NDArray[np.str_], groups: NDArray[np.str_] | None, seeds: int
) -> CenterDesign:
    """Choose and divide the tiles.

    Raises:
        DatasetError: No two classes have tiles at the same two centers, or the groups of a center cannot be divided.
    """
    numbers = np.unique(centers, return_inverse=True)[1].astype(np.int64)
    rows = balanced_rows(labels, numbers)
    kept = np.unique(numbers[rows], return_inverse=True)[1].astype(np.int64)
    names = [f"center {number + 1}" for number in range(int(kept.max()) + 1)]
    some_groups = None if groups is None else groups[rows]
    return CenterDesign(
        rows=rows,
        labels=np.unique(labels[rows], return_inverse=True)[1].astype(np.int64),
        centers=kept,
        units=units_of(some_groups, len(rows)),
        splits=splits_of(kept, names, seeds, some_groups),
    )


def balanced_rows(labels: Labels, centers: Labels, seed: int = 0) -> Rows:
    """Tiles of a full grid of classes and centers, as many in each of its cells: sorted.

    Classes are taken in the order of the centers that they stand at, and of their tiles; of all such choices, the grid
    with the most tiles is kept. Which tiles of a cell, the seed decides.

    Args:
        labels: int64 [N], classes from 0.
        centers: int64 [N], centers from 0.
        seed: Of the draw.

    Raises:
        DatasetError: There is no grid of two classes and two centers with two tiles in each cell.
    """
    cells = np.zeros((int(labels.max()) + 1, int(centers.max()) + 1), dtype=np.int64)
    np.add.at(cells, (labels, centers), 1)
    filled = cells >= _MIN_TILES
    order = np.lexsort((-cells.sum(axis=1), -filled.sum(axis=1)))
    best: tuple[int, list[int], NDArray[np.int64], int] | None = None
    for count in range(2, len(order) + 1):
        classes = order[:count]
        at = np.flatnonzero(filled[classes].all(axis=0))
        if len(at) < 2:
            break
        size = int(cells[np.ix_(classes, at)].min())
        if best is None or size * count * len(at) > best[0]:
            best = (size * count * len(at), classes.tolist(), at, size)
    if best is None:
        raise DatasetError(
            "classes and centers are not crossed, so neither can be told from the other",
            value=f"{len(cells)} classes at {cells.shape[1]} centers, {int(filled.sum())} of {cells.size} pairs filled",
            expected=f"two classes with {_MIN_TILES} tiles or more at each of the same two centers",
            remedy="add tiles of these classes from a second center",
        )
    _, chosen_classes, at, size = best
    draws = uniforms(key(seed, "balanced grid"), np.arange(len(labels), dtype=np.int64), 1)[:, 0]
    chosen = []
    for label in chosen_classes:
        for center in at:
            rows = np.flatnonzero((labels == label) & (centers == center))
            chosen.append(rows[np.argsort(draws[rows], kind="stable")[:size]])
    return np.sort(np.concatenate(chosen))


def neighbour_kinds(
    features: FloatArray, labels: Labels, centers: Labels, units: Units, neighbours: int = NEIGHBOURS
) -> NDArray[np.int64]:
    """Of each tile's nearest neighbours, how many tell for the tissue and how many for the center: int64 [N, 2].

    The first column counts neighbours of the same class from another center, the second those of another class from
    the same center; neighbours that agree or differ in both tell nothing. Near is by cosine. Tiles of the same unit
    are no neighbours: what a slide shares, its center shares.

    Args:
        features: float32 [N, D].
        labels: int64 [N].
        centers: int64 [N].
        units: int64 [N].
        neighbours: How many; of a tile with fewer tiles outside of its unit, those.
    """
    # So many are looked up that the tile's own unit cannot hide its neighbours.
    lookups = min(len(labels), neighbours + int(np.bincount(units).max()))
    index = NearestNeighbors(n_neighbors=lookups, metric="cosine", algorithm="brute").fit(features)
    counts = []
    for start in range(0, len(labels), _CHUNK_ROWS):
        rows = np.arange(start, min(start + _CHUNK_ROWS, len(labels)))
        near = index.kneighbors(features[rows], return_distance=False)
        outside = units[near] != units[rows][:, None]
        counted = outside & (np.cumsum(outside, axis=1) <= neighbours)
        same_class = labels[near] == labels[rows][:, None]
        same_center = centers[near] == centers[rows][:, None]
        tissue = (counted & same_class & ~same_center).sum(axis=1)
        counts.append(np.stack([tissue, (counted & ~same_class & same_center).sum(axis=1)], axis=1))
    return np.concatenate(counts)


def robustness_index(kinds: NDArray[np.int64], units: Units, seed: int = 0) -> tuple[float, Interval]:
    r"""The robustness index of PathoROB and its 95 % interval over units.

    With SO the neighbours of the same class from another center and OS those of another class from the same center,
    summed over all tiles, it is SO / (SO + OS): 1 where tissue alone decides what is near, 0 where the center does
    (Koemen et al., "Towards robust foundation models for digital pathology", arXiv 2507.17845; first as SO / OS by de
    Jong et al., arXiv 2501.18055). Here k is fixed, where PathoROB takes the k of the best kNN accuracy of each
    dataset, so values compare between models on one dataset and not with its board.

    Args:
        kinds: int64 [N, 2], as from `neighbour_kinds`.
        units: int64 [N], what is drawn as a whole.
        seed: Of the bootstrap.

    Raises:
        DatasetError: No tile has a neighbour of either kind.
    """
    total = kinds.sum(axis=0)
    if not total.sum():
        raise DatasetError(
            "no tile has a neighbour that tells tissue from center",
            value=f"{len(kinds)} tiles in {len(np.unique(units))} groups",
            expected="neighbours of the same class from another center, or of another class from the same one",
            remedy="give tiles of more patients at each center",
        )
    sums_U2 = np.stack([np.bincount(units, weights=column) for column in kinds.T], axis=1)
    draws = uniforms(key(seed, "robustness"), np.arange(RESAMPLES, dtype=np.int64), len(sums_U2))
    sampled_R2 = sums_U2[(draws * len(sums_U2)).astype(np.int64)].sum(axis=1)
    with np.errstate(invalid="ignore"):
        samples = sampled_R2[:, 0] / sampled_R2.sum(axis=1)
    return float(total[0] / total.sum()), interval(samples)


def assess_robustness(name: str, embedding: str, features: FloatArray, design: CenterDesign) -> Robustness:
    """Both figures for one kind of feature: float32 [N, D], of the whole dataset.

    Raises:
        DatasetError: No tile has a neighbour that tells tissue from center.
    """
    some = features[design.rows]
    kinds = neighbour_kinds(some, design.labels, design.centers, design.units)
    index, index_interval = robustness_index(kinds, design.units)
    told = probe_features(Ridge(), some, design.centers, design.splits)
    classes, centers = len(np.unique(design.labels)), len(np.unique(design.centers))
    return Robustness(
        features=name,
        embedding=embedding,
        tiles=len(design.rows),
        neighbours=min(NEIGHBOURS, len(design.rows) - 1),
        index=index,
        index_interval=index_interval,
        index_chance=(centers - 1) / (centers - 1 + classes - 1),
        center_values=values_of(design.centers, told)[BALANCED_ACCURACY],
        center_interval=interval(bootstrap(design.centers, design.units, told)[BALANCED_ACCURACY]),
        center_chance=1.0 / centers,
    )
