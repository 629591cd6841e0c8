"""What decides the plan beside the slides."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from histoscale.config.recipe import Recipe
from histoscale.errors import PlanError

_BINS_PER_OCTAVE = 8  # within a bin, a tile is at most 9 % smaller than the cell of the grid that it lies in
_MPP_DECIMALS = 9
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Magnification:
    """One scale, or one narrow bin of a range of scales, with a grid of places of its own.

    Attributes:
        finest_mpp: The finest scale drawn; a slide must serve it.
        coarsest_mpp: The coarsest scale drawn; the cells of the grid have its size.
        share: Share of the tiles; shares need not sum to one.
    """

    finest_mpp: float
    coarsest_mpp: float
    share: float


@dataclass(frozen=True)
class PlanSpec:
    """What decides the plan beside the slides.

    Attributes:
        seed: Seed of the run.
        tiles: Tiles of the whole run.
        tiles_per_step: B, the global batch.
        replicas: V, the fixed shares of a step.
        chapter_steps: n, the steps of one chapter.
        tiles_per_visit: T, the tiles of one visit.
        region_px: Side of the region around a tile, at the tile's mpp.
        mix: (mpp, share) of each magnification, mpp being one scale or (finest, coarsest); shares need not sum to one.
        max_upsample: How much a slide may be enlarged.
        min_tissue: Least share of tissue in a region.
        balance: Columns of the index whose values, combined, make the strata.
        temperature: A stratum of n slides weighs n ** (1 / temperature).
        weights: Column of `balance` -> value -> what a stratum's weight is multiplied by (1 where absent).
        slides: The first so many rows, of those that `weights` leaves in, are drawn from; None draws from all.
        max_tiles_per_slide: Most tiles that the run may be expected to take from one slide; None is no limit.
        resident_slides: S, the slides of a stratum and magnification that visits go to in turn, where slides are read
            from copies.
        resident_visits: R, the visits to each of them before others take their place.
    """

    seed: int
    tiles: int
    tiles_per_step: int
    replicas: int
    chapter_steps: int
    tiles_per_visit: int
    region_px: int
    mix: tuple[tuple[float | tuple[float, float], float], ...]
    max_upsample: float
    min_tissue: float
    balance: tuple[str, ...] = ()
    temperature: float = 1.0
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    slides: int | None = None
    max_tiles_per_slide: int | None = None
    resident_slides: int = 64
    resident_visits: int = 64

    def __post_init__(self) -> None:
        for name, whole, part in (
            ("replicas must divide tiles_per_step", self.tiles_per_step, self.replicas),
            ("tiles_per_visit must divide chapter_steps", self.chapter_steps, self.tiles_per_visit),
        ):
            if part < 1 or whole < 1 or whole % part:
                raise PlanError(name, value=f"{part} and {whole}", expected="a divisor of 1 or more")
        if not self.mix or min(share for _, share in self.mix) <= 0.0:
            raise PlanError("every magnification of the mix needs a positive share", value=self.mix)
        if min(self.resident_slides, self.resident_visits) < 1:
            raise PlanError(
                "a stratum needs a resident slide and a visit to it",
                value=f"{self.resident_slides} slides, {self.resident_visits} visits",
                expected="1 or more of each",
            )
        if foreign := sorted(set(self.weights) - set(self.balance)):
            raise PlanError(
                "weights are given for columns that are not balanced",
                value=", ".join(foreign),
                expected=f"columns of data.balance ({', '.join(self.balance) or 'none'})",
                remedy="name these columns in data.balance too, or take them out of data.weights",
            )

    @property
    def tiles_per_micro_batch(self) -> int:
        """b, the tiles of one replica of one step."""
        return self.tiles_per_step // self.replicas

    @property
    def magnifications(self) -> tuple[Magnification, ...]:
        """The mix, each range of scales cut into bins of at most 1/8 octave, alike in width and share."""
        found = []
        for mpp, share in self.mix:
            finest, coarsest = mpp if isinstance(mpp, tuple) else (mpp, mpp)
            octaves = math.log2(coarsest / finest)
            bins = max(1, math.ceil(octaves * _BINS_PER_OCTAVE - _TOLERANCE))
            edges = [round(finest * 2.0 ** (octaves * edge / bins), _MPP_DECIMALS) for edge in range(bins + 1)]
            found += [Magnification(edges[i], edges[i + 1], share / bins) for i in range(bins)]
        return tuple(found)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """The part of a recipe that decides the plan."""
        data, batch = recipe.data, recipe.batch
        return cls(
            seed=recipe.seed,
            tiles=recipe.steps * batch.tiles,
            tiles_per_step=batch.tiles,
            replicas=batch.replicas,
            chapter_steps=batch.chapter_steps,
            tiles_per_visit=batch.tiles_per_visit,
            region_px=data.region_px,
            mix=tuple((entry.mpp, entry.share) for entry in data.mix),
            max_upsample=data.max_upsample,
            min_tissue=data.min_tissue,
            balance=data.balance,
            temperature=data.temperature,
            weights=data.weights,
            slides=data.slides,
            max_tiles_per_slide=data.max_tiles_per_slide,
            resident_slides=data.resident_slides,
            resident_visits=data.resident_visits,
        )
