"""One trial of a sweep: an ordinary run, its name, and what it will cost."""

import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.sweeps.spec import Price
from histoscale.train.flops import step_flops_per_tile
from histoscale.train.memory import backbone_parameters, forecast

Role = Literal["run", "trunk", "cooldown", "lr_check", "student", "scratch", "search", "finalist"]

_UNFIT = re.compile(r"[^A-Za-z0-9_.=-]")


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a trial is forked from: the name of another trial, and a step that it commits and keeps."""

    trial: str
    step: int


@dataclass(frozen=True)
class Cost:
    """What a trial takes.

    Attributes:
        parameters: Of the backbone, which is what users get.
        flops: Of the trial itself.
        flops_since_start: With what its trunk did before it.
        memory_bytes: Of one worker at its peak.
    """

    parameters: int
    flops: float
    flops_since_start: float
    memory_bytes: int


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: Of its folder below trials/; the same spec gives the same names.
        role: "run" and "cooldown" answer the question; a "trunk" is what cooldowns are forked from; "lr_check" tests
            the rule of the rate; "student" and "scratch" learn with and without the teacher; "search" is a suggestion,
            and a "finalist" a good one with another seed.
        recipe: Of the run.
        parent: What it is forked from.
        seed: Of the spec; the recipe of a cooldown has another, so that its tiles are not its trunk's first ones.
        images: Seen since new weights, those of its trunk among them.
        slides: That it draws from; None is all.
        settings: Fields of the grid -> values.
        lr_factor: Multiple of the rule's rate.
        held_out: Not fitted, but predicted.
        cost: What it will take.
    """

    name: str
    role: Role
    recipe: Recipe
    parent: Origin | None
    seed: int
    images: int
    slides: int | None
    settings: Mapping[str, Any]
    lr_factor: float
    held_out: bool
    cost: Cost

    @property
    def judged(self) -> bool:
        """Whether it is a point of the scaling fits."""
        return self.role in ("run", "cooldown")


def override(field: str, value: object) -> str:
    """`field=value` as `--set` takes it."""
    return f"{field}={json.dumps(value)}"


def name_of(arch: str, images: int, slides: int | None, settings: Mapping[str, Any], seed: int, tag: str = "") -> str:
    """Name of a trial: what it differs in, fit for a folder and a bucket; `tag` tells those of other roles apart."""
    parts = [arch, f"{images}im", *(() if slides is None else (f"{slides}sl",))]
    parts += [f"{field}={_short(value)}" for field, value in settings.items()]
    return _UNFIT.sub("_", "-".join([*parts, f"s{seed}", *([tag] if tag else [])]))


def _short(value: object) -> str:
    """A plain value as it is; a checksum of what has parts."""
    if isinstance(value, str | int | float | bool) or value is None:
        text = str(value)
        return text if not _UNFIT.search(text) else f"{zlib.crc32(text.encode()):08x}"
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def estimate(recipe: Recipe, teacher: Recipe | None = None, images_before: int = 0) -> Cost:
    """What a run will take, from its shapes.

    Args:
        recipe: Of the run.
        teacher: See `step_flops_per_tile`.
        images_before: Seen by its trunk.
    """
    arch, cluster = ARCHS[recipe.model.arch], recipe.cluster
    work = step_flops_per_tile(recipe, arch, teacher)
    on: Literal["cpu", "cuda"] = "cpu" if cluster.device == "cpu" else "cuda"
    dtype = torch.float32 if recipe.precision == "fp32" or on == "cpu" else torch.bfloat16
    own = work * recipe.steps * recipe.batch.tiles
    return Cost(
        parameters=backbone_parameters(arch, recipe.crops.global_px, recipe.model.qk_norm),
        flops=own,
        flops_since_start=own + work * images_before,
        memory_bytes=forecast(recipe, cluster.worker_bounds[0], cluster.zero_stage, dtype, on, teacher).total_bytes,
    )


def trial_lines(trials: Sequence[Trial], price: Price) -> Iterator[str]:
    """A table for people, before anything starts."""
    width = max((len(trial.name) for trial in trials), default=5)
    yield f"{'trial':<{width}}  {'images':>13}  {'parameters':>13}  {'FLOP':>9}  {'GB':>7}  {'GPU-h':>9}  {'USD':>9}"
    for trial in trials:
        cost, hours = trial.cost, price.gpu_hours(trial.cost.flops)
        origin = f"  from {trial.parent.trial}@{trial.parent.step}" if trial.parent else ""
        yield (
            f"{trial.name:<{width}}  {trial.images:>13,}  {cost.parameters:>13,}  {cost.flops:>9.3g}  "
            f"{cost.memory_bytes / 1e9:>7.2f}  {hours:>9.3g}  {hours * price.usd_per_gpu_hour:>9.2f}"
            f"{'  held out' if trial.held_out else ''}{origin}"
        )
    flops = sum(trial.cost.flops for trial in trials)
    hours = price.gpu_hours(flops)
    yield (
        f"{len(trials)} trials, {flops:.3g} FLOP: {hours:.3g} hours of a {price.gpu} at {price.mfu:.0%} of "
        f"{price.peak_tflops:g} TFLOP/s, {hours * price.usd_per_gpu_hour:,.2f} USD at the prices of {price.as_of}"
    )
