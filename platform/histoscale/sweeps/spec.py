"""What a sweep tries: closed YAML specs for scaling and for distillation."""

import datetime
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from histoscale.config.archs import ARCHS
from histoscale.config.decode import invalid, read_yaml
from histoscale.config.section import Count, NonNegative, Positive, Section
from histoscale.errors import RecipeError
from histoscale.evaluate.probes import PROBES

Values = Annotated[tuple[Any, ...], Field(min_length=1)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
Archs = Annotated[tuple[str, ...], Field(min_length=1)]

_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# What has a place of its own in a spec -> that place.
_PLACES = {"model.arch": "archs", "schedule.images": "budgets_images", "seed": "seeds"}
_PLACES_OF_CONSTANT_LR = {"optim.decay": "constant_lr", "checkpoint.keep_every_steps": "constant_lr"}
_PLACES_OF_DISTILLATION = {"distill.teacher": "the command's --teacher", "distill.mode": "mode"}


class EvaluationSpec(Section):
    """What trials are judged by.

    Attributes:
        datasets: Name of a task -> labelled dataset, an absolute path or an s3:// URI; the first one decides.
        probe: As jobs/evaluate.py has it.
        embedding: Likewise.
    """

    datasets: Annotated[dict[str, str], Field(min_length=1)]
    probe: str = "ridge"
    embedding: Literal["cls", "patch_mean", "both"] = "both"

    @property
    def target(self) -> str:
        """Name of the task that decides."""
        return next(iter(self.datasets))

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name, uri in self.datasets.items():
            if not _TASK_NAME.fullmatch(name):
                raise ValueError(f"names of datasets are of letters, digits and _.-, got {name!r}")
            if "://" not in uri and not uri.startswith("/"):
                raise ValueError(f"datasets must be absolute paths or s3:// URIs, got {uri!r}")
        if self.probe not in PROBES:
            raise ValueError(f"probe must be one of {', '.join(PROBES)}, got {self.probe!r}")
        return self


class LrRule(Section):
    """How a rate that was tuned at one width and batch is taken to others.

    rate = optim.lr x (base width / width) ** width_exponent x (tiles / tiles of the base recipe) ** batch_exponent.
    An exponent of 1 for the width is what muP gives for the matrices of hidden layers under Adam (Yang et al., arXiv
    2203.03466); here it is applied to all parameters. The square root for the batch is DINOv2's.

    Attributes:
        base_arch: Whose width `optim.lr` was tuned at.
        width_exponent: 0 gives all widths one rate.
        batch_exponent: 0.5 is the square root.
        check_factors: Runs at the smallest budget with these multiples of the rule's rate, at every width: they show
            whether the best multiple is 1 at each. None leaves the rule untested, and the report says so.
    """

    base_arch: str
    width_exponent: NonNegative = 1.0
    batch_exponent: NonNegative = 0.5
    check_factors: tuple[Positive, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_archs((self.base_arch,))
        _require_distinct("check_factors", self.check_factors)
        if self.check_factors and (1.0 not in self.check_factors or len(self.check_factors) < 3):
            raise ValueError(
                f"check_factors must hold 1 and two others or more, to bracket it, got {list(self.check_factors)}"
            )
        return self


class ConstantLr(Section):
    """One run at a constant rate for each model; each budget is a fork of it whose rate falls to its end.

    Attributes:
        cooldown_share: Of a budget's images.
    """

    cooldown_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2


class Resources(Section):
    """What one trial takes, and how many run at a time."""

    cpus: Count = 1
    gpus: Annotated[int, Field(ge=0)] = 0
    max_concurrent: Count = 1


class Price(Section):
    """What an hour costs, and how fast it computes: the user's figures of a day, which no run has measured.

    Attributes:
        gpu: Its name, for the report.
        peak_tflops: Dense bf16, as its data sheet has it.
        mfu: Assumed share of the peak.
        usd_per_gpu_hour: The price.
        as_of: The day that the price is of.
    """

    gpu: str
    peak_tflops: Positive
    mfu: Annotated[float, Field(gt=0.0, le=1.0)]
    usd_per_gpu_hour: NonNegative
    as_of: datetime.date

    def gpu_hours(self, flops: float) -> float:
        """Hours of one GPU for so much work."""
        return flops / (self.peak_tflops * 1e12 * self.mfu * 3600.0)


class Range(Section):
    """Numbers that a search draws a field from.

    Attributes:
        low: Least.
        high: Greatest.
        log: Drawn evenly in the logarithm.
        whole: Whole numbers.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high or (self.log and self.low <= 0.0):
            raise ValueError(f"a range is from low to high, above 0 with log, got {self.low} to {self.high}")
        return self


class SearchSpec(Section):
    """A search by Optuna, at the first size, budget and seed of the spec; the best ones are then repeated.

    Attributes:
        trials: How many combinations are tried.
        ranges: Field of the recipe -> numbers to draw from.
        choices: Field of the recipe -> values to choose from.
        finalists: How many of the best are run again with other seeds: the best of many is partly luck.
        seeds: Of those runs.
    """

    trials: Count
    ranges: dict[str, Range] = Field(default_factory=dict)
    choices: dict[str, Values] = Field(default_factory=dict)
    finalists: Count = 3
    seeds: Seeds = (1, 2, 3)

    @model_validator(mode="after")
    def _check(self) -> Self:
        fields = [*self.ranges, *self.choices]
        if not fields:
            raise ValueError("ranges or choices must name a field to search, got none")
        _require_distinct("ranges and choices", tuple(fields))
        _require_distinct("seeds", self.seeds)
        return self


class SweepSpec(Section):
    """What both kinds of sweep have.

    Attributes:
        recipe: The base recipe, a YAML file as jobs/pretrain.py takes it.
        set: Field of the recipe -> value, for all trials.
        archs: Sizes of the model.
        budgets_images: Images seen.
        grid: Field of the recipe -> values; all combinations are tried.
        seeds: Each trial is run with each.
        evaluation: What decides.
        lr_rule: None runs all widths at the recipe's rate.
        resources: Of one trial.
        price: Of the work.
        search: Beside the grid; None searches nothing.
    """

    recipe: str
    set: dict[str, Any] = Field(default_factory=dict)
    archs: Archs
    budgets_images: tuple[Count, ...] = ()
    grid: dict[str, Values] = Field(default_factory=dict)
    seeds: Seeds = (0,)
    evaluation: EvaluationSpec
    lr_rule: LrRule | None = None
    resources: Resources = Resources()
    price: Price
    search: SearchSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require_archs(self.archs)
        for name in ("archs", "budgets_images", "seeds"):
            _require_distinct(name, getattr(self, name))
        for field, values in self.grid.items():
            _require_distinct(f"grid.{field}", tuple(json.dumps(value, default=str) for value in values))
        self._require_free(_PLACES)
        if twice := sorted({*self.grid} & {*self.set}):
            raise ValueError(f"{twice[0]} stands in grid and in set, of which one would change nothing")
        return self

    def _require_free(self, places: dict[str, str]) -> None:
        searched = (*self.search.ranges, *self.search.choices) if self.search else ()
        for field in (*self.grid, *self.set, *searched):
            for known, place in places.items():
                if field == known or field.startswith(f"{known}."):
                    raise ValueError(f"{field} is what {place} is for: take it out of grid, set and search")


class ScalingSpec(SweepSpec):
    """How the error falls with model, data and compute.

    Attributes:
        budgets_flops: Work of training: each gives every model its own number of images, an equal-compute slice.
        slides: Numbers of slides to draw from; a smaller number is part of a larger one. None is all of the index.
        constant_lr: One run serves all budgets of a model; None trains each from the start.
        held_out: The runs of the most work are predicted from the others, or nothing is.
    """

    budgets_flops: tuple[Positive, ...] = ()
    slides: Annotated[tuple[Count | None, ...], Field(min_length=1)] = (None,)
    constant_lr: ConstantLr | None = None
    held_out: Literal["largest", "none"] = "largest"

    @model_validator(mode="after")
    def _budgets(self) -> Self:
        if not self.budgets_images and not self.budgets_flops:
            raise ValueError("budgets_images or budgets_flops must name a budget, got none")
        self._require_free({"data.slides": "slides"} | (_PLACES_OF_CONSTANT_LR if self.constant_lr else {}))
        for name in ("budgets_flops", "slides"):
            _require_distinct(name, getattr(self, name))
        return self


class DistillationSpec(SweepSpec):
    """How small a student keeps how much of its teacher.

    Attributes:
        mode: What students learn from, as `distill.mode` has it.
        from_scratch: The same students are also trained without a teacher, on as many images.
    """

    mode: Literal["heads", "features"] = "heads"
    from_scratch: bool = True

    @model_validator(mode="after")
    def _budgets(self) -> Self:
        if not self.budgets_images:
            raise ValueError("budgets_images must name a budget, got none")
        self._require_free(_PLACES_OF_DISTILLATION)
        return self


def load_scaling(path: str | Path) -> ScalingSpec:
    """Spec of a YAML file.

    Raises:
        RecipeError: The file cannot be read, is no YAML mapping, or holds anything invalid; all problems at once.
    """
    try:
        return ScalingSpec.model_validate(read_yaml(path, "sweep"))
    except ValidationError as error:
        raise _invalid(error, ScalingSpec, path) from error


def load_distillation(path: str | Path) -> DistillationSpec:
    """Spec of a YAML file.

    Raises:
        RecipeError: As `load_scaling`.
    """
    try:
        return DistillationSpec.model_validate(read_yaml(path, "sweep"))
    except ValidationError as error:
        raise _invalid(error, DistillationSpec, path) from error


def _invalid(error: ValidationError, root: type[SweepSpec], path: str | Path) -> RecipeError:
    return invalid(error, root, str(path))


def _require_archs(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in ARCHS:
            raise ValueError(f"{name!r} is no architecture, expected one of {', '.join(ARCHS)}")


def _require_distinct(name: str, values: tuple[Any, ...]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"{name} names a value twice: {', '.join(map(str, values))}")
