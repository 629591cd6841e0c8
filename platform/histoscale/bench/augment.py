"""The share of a training step that goes into crops, colours and masks. Nothing here needs Ray."""

from collections.abc import Iterator
from pathlib import Path

import torch

from histoscale.bench.figure import Figure
from histoscale.bench.step import (
    CPU_TILES,
    DTYPES,
    GPU_TILES,
    all_views,
    fastest,
    only_rank,
    random_tiles,
    step_recipe,
    trainer_of,
)
from histoscale.config.recipe import Recipe


def augment(device: str = "cpu") -> Iterator[Figure]:
    """`step.augment_share` of the steps that `step` measures, and nothing else of these."""
    recipes = [step_recipe("vit_s14", CPU_TILES, 4096, precision) for precision in DTYPES]
    if device == "cuda":
        recipes = [step_recipe(arch, tiles, 131_072, "bf16") for arch, tiles in GPU_TILES.items()]
    with only_rank(device) as folder:
        for number, recipe in enumerate(recipes):
            seconds = _seconds(recipe, torch.device(device), folder / str(number))
            details = {"arch": recipe.model.arch, "precision": recipe.precision, "seconds": seconds}
            yield Figure("step.augment_share", seconds["augment"] / seconds["step"], "share", details=details)


def _seconds(recipe: Recipe, device: torch.device, run: Path) -> dict[str, float]:
    tiles, steps = random_tiles(recipe), iter(range(10**9))
    with trainer_of(recipe, device, run) as trainer:
        return fastest(
            {
                "step": lambda: trainer.step(next(steps), [tiles]),
                "augment": lambda: all_views(recipe, tiles, device),
            }
        )
