"""Groups of tiles whose losses are told apart: those of a magnification, and those of a stratum.

A rank knows of a tile its scale and the row of its slide. Which stratum a row is of, the driver finds out once and
gives to all ranks, one byte a slide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histoscale.config.recipe import Recipe
from histoscale.sampling.supply import Strata

MOST_TOLD = 64  # strata by name; the smaller ones together are one more
OTHERS = "others"
BY_MPP, BY_STRATUM = "loss_by_mpp/", "loss_by_stratum/"
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class SlideStrata:
    """The strata of a run's slides; none where the recipe balances nothing, or there is but one.

    Attributes:
        names: How to call each, such as `site=A, stain=H&E`.
        of_row: uint8 [N], the stratum of each row of the catalogue.
    """

    names: tuple[str, ...] = ()
    of_row: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))

    @classmethod
    def of(cls, strata: Strata) -> Self:
        """The strata as the recipe cuts them, whatever their slides are read from."""
        whole, first = np.unique(strata.whole, return_index=True)
        if len(whole) < 2:
            return cls()
        names = [strata.names[place].removesuffix(", copied") for place in first.tolist()]
        of_row = strata.whole[strata.of_row]
        largest = np.argsort(-np.bincount(of_row), kind="stable")[:MOST_TOLD]
        new = np.full(len(whole), len(largest), np.uint8)
        new[largest] = np.arange(len(largest), dtype=np.uint8)
        told = [names[place] for place in largest.tolist()]
        return cls((*told, OTHERS) if len(whole) > len(told) else tuple(told), new[of_row])


@dataclass(frozen=True)
class TileGroups:
    """The groups that a tile can be in.

    Attributes:
        mix: The scale, or (finest, coarsest) range of scales, of each magnification, um/px.
        strata: Those of the slides.
    """

    mix: Sequence[float | tuple[float, float]]
    strata: SlideStrata = SlideStrata()

    @classmethod
    def from_recipe(cls, recipe: Recipe, strata: SlideStrata) -> Self:
        """The groups of a run."""
        return cls([entry.mpp for entry in recipe.data.mix], strata)

    @property
    def names(self) -> tuple[str, ...]:
        """What metrics call each group."""
        scales = ["-".join(f"{mpp:g}" for mpp in _bounds(entry)) for entry in self.mix]
        return (*(BY_MPP + scale for scale in scales), *(BY_STRATUM + name for name in self.strata.names))

    def of(self, mpp: NDArray[np.float64], rows: NDArray[np.int32]) -> NDArray[np.int64]:
        """The two groups of each tile, [b, 2], as places in `names`; where it is in none, their number.

        Args:
            mpp: [b], um/px.
            rows: [b], of the catalogue.
        """
        groups = np.full((len(mpp), 2), len(self.names), np.int64)
        # A single scale goes before a range that holds it, too.
        for place in sorted(range(len(self.mix)), key=lambda place: isinstance(self.mix[place], tuple), reverse=True):
            finest, coarsest = min(_bounds(self.mix[place])), max(_bounds(self.mix[place]))
            groups[(mpp >= finest * (1 - _TOLERANCE)) & (mpp <= coarsest * (1 + _TOLERANCE)), 0] = place
        if self.strata.names:
            groups[:, 1] = len(self.mix) + self.strata.of_row[rows].astype(np.int64)
        return groups


def _bounds(mpp: float | tuple[float, float]) -> tuple[float, ...]:
    return mpp if isinstance(mpp, tuple) else (mpp,)
