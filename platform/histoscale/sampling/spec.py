"""What decides the plan beside the slides."""

from dataclasses import dataclass
from typing import Self

from histoscale.config.recipe import Recipe
from histoscale.errors import PlanError


@dataclass(frozen=True)
class PlanSpec:
    """What decides the plan beside the slides.

    Attributes:
        seed: Seed of the run.
        tiles_per_step: B, the global batch.
        replicas: V, the fixed shares of a step.
        chapter_steps: n, the steps of one chapter.
        tiles_per_visit: T, the tiles of one visit.
        region_px: Side of the region around a tile, at the tile's mpp.
        mix: (mpp, share) of each magnification; shares need not sum to one.
        max_upsample: How much a slide may be enlarged.
        min_tissue: Least share of tissue in a region.
    """

    seed: int
    tiles_per_step: int
    replicas: int
    chapter_steps: int
    tiles_per_visit: int
    region_px: int
    mix: tuple[tuple[float, float], ...]
    max_upsample: float
    min_tissue: float

    def __post_init__(self) -> None:
        for name, whole, part in (
            ("replicas must divide tiles_per_step", self.tiles_per_step, self.replicas),
            ("tiles_per_visit must divide chapter_steps", self.chapter_steps, self.tiles_per_visit),
        ):
            if part < 1 or whole < 1 or whole % part:
                raise PlanError(name, value=f"{part} and {whole}", expected="a divisor of 1 or more")
        if not self.mix or min(share for _, share in self.mix) <= 0.0:
            raise PlanError("every magnification of the mix needs a positive share", value=self.mix)

    @property
    def tiles_per_micro_batch(self) -> int:
        """b, the tiles of one replica of one step."""
        return self.tiles_per_step // self.replicas

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """The part of a recipe that decides the plan."""
        data, batch = recipe.data, recipe.batch
        return cls(
            seed=recipe.seed,
            tiles_per_step=batch.tiles,
            replicas=batch.replicas,
            chapter_steps=batch.chapter_steps,
            tiles_per_visit=batch.tiles_per_visit,
            region_px=data.region_px,
            mix=tuple((entry.mpp, entry.share) for entry in data.mix),
            max_upsample=data.max_upsample,
            min_tissue=data.min_tissue,
        )
