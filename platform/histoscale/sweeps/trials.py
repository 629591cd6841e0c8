"""From a scaling spec to its trials: recipes with deterministic names, and what each will cost.

A trial is an ordinary run: its recipe, and, for a cooldown, the checkpoint of another trial that it is forked from.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from histoscale.config.archs import ARCHS
from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.errors import RecipeError
from histoscale.seeding import key
from histoscale.sweeps.spec import LrRule, ScalingSpec, SweepSpec
from histoscale.sweeps.trial import Origin, Role, Trial, estimate, name_of, override
from histoscale.train.flops import step_flops_per_tile

_SEED_BITS = 31
_ALIKE = 0.9  # of the work of the largest run


@dataclass(frozen=True)
class Variant:
    """One model on one part of the data with one combination of the grid, for one seed; of any length."""

    arch: str
    slides: int | None
    settings: Mapping[str, Any]
    seed: int

    def overrides(self, spec: SweepSpec) -> list[str]:
        """Of the base recipe, as `--set` takes them."""
        fields = {**spec.set, **self.settings, "model.arch": self.arch, "seed": self.seed}
        if self.slides is not None:
            fields["data.slides"] = self.slides
        return [override(name, value) for name, value in fields.items()]


def scaling_trials(spec: ScalingSpec, base: Mapping[str, Any]) -> tuple[Trial, ...]:
    """All trials of a spec; a trunk comes before what is forked from it.

    Args:
        spec: What to try.
        base: What the file of the base recipe holds.

    Raises:
        RecipeError: A field or a value of `set` or `grid` is not valid, or does not fit the others; nothing has begun.
    """
    trials: dict[str, Trial] = {}
    for variant in _variants(spec):
        for trial in _of_variant(spec, base, variant):
            trials.setdefault(trial.name, trial)
    for trial in _lr_checks(spec, base):
        trials.setdefault(trial.name, trial)
    return _with_held_out(spec, tuple(trials.values()))


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of a grid; one without settings for an empty grid."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def with_rate(recipe: Recipe, base_tiles: int, rule: LrRule | None, factor: float = 1.0) -> Recipe:
    """The recipe with the rate of the rule: see `LrRule`.

    Args:
        recipe: Its `optim.lr` is that of the base width and batch.
        base_tiles: `batch.tiles` of the base recipe.
        rule: None leaves the rate as it is.
        factor: Multiple of it.
    """
    rate = recipe.optim.lr * factor
    if rule is not None:
        width, base_width = ARCHS[recipe.model.arch].width, ARCHS[rule.base_arch].width
        rate *= (base_width / width) ** rule.width_exponent
        rate *= (recipe.batch.tiles / base_tiles) ** rule.batch_exponent
    return recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": rate})})


def _variants(spec: ScalingSpec) -> Iterator[Variant]:
    for arch, slides, settings, seed in itertools.product(spec.archs, spec.slides, combinations(spec.grid), spec.seeds):
        yield Variant(arch, slides, settings, seed)


def _of_variant(spec: ScalingSpec, base: Mapping[str, Any], variant: Variant) -> Iterator[Trial]:
    budgets = budgets_of(spec, base, variant)
    if spec.constant_lr is not None:
        yield from _trunk_and_cooldowns(spec, base, variant, budgets, spec.constant_lr.cooldown_share)
        return
    for images in budgets:
        yield _trial(variant, "run", recipe_of(spec, base, variant, images), images)


def budgets_of(spec: ScalingSpec, base: Mapping[str, Any], variant: Variant) -> list[int]:
    """Images of each budget, ascending, whole steps."""
    recipe = recipe_of(spec, base, variant, None)
    tiles, work = recipe.batch.tiles, step_flops_per_tile(recipe, ARCHS[variant.arch])
    steps = [images // tiles for images in spec.budgets_images]
    steps += [round(flops / work / tiles) for flops in spec.budgets_flops]
    if min(steps) < 1:
        raise RecipeError(
            f"a budget is less than one step of {variant.arch}",
            value=min(spec.budgets_images, default=0) or min(spec.budgets_flops),
            expected=f"{tiles} images, {work * tiles:.3g} FLOP, or more",
            remedy="raise the budget, or lower batch.tiles",
        )
    return sorted({count * tiles for count in steps})


def recipe_of(
    spec: ScalingSpec,
    base: Mapping[str, Any],
    variant: Variant,
    images: int | None,
    fields: Mapping[str, Any] | None = None,
    factor: float = 1.0,
) -> Recipe:
    """The recipe of a variant, with its rate.

    Args:
        spec: What to try.
        base: What the file of the base recipe holds.
        variant: The model, its data and its settings.
        images: To see; None leaves the base recipe's.
        fields: What this run alone has.
        factor: Multiple of the rule's rate.

    Raises:
        RecipeError: It is not valid, or distils.
    """
    overrides = variant.overrides(spec)
    if images is not None:
        overrides.append(override("schedule.images", images))
    overrides += [override(name, value) for name, value in (fields or {}).items()]
    source = f"trial of {name_of(variant.arch, images or 0, variant.slides, variant.settings, variant.seed)}"
    recipe = decode_recipe(dict(base), overrides, source=source)
    if recipe.distill is not None:
        raise RecipeError(
            "a scaling sweep trains without a teacher",
            value=f"distill.teacher={recipe.distill.teacher}",
            expected="a base recipe without the section distill",
            remedy="take another recipe, or use a distillation sweep",
        )
    tiles = decode_recipe(dict(base), [override(name, value) for name, value in spec.set.items()]).batch.tiles
    return with_rate(recipe, tiles, spec.lr_rule, factor)


def _trial(
    variant: Variant, role: Role, recipe: Recipe, images: int, parent: Origin | None = None, factor: float = 1.0
) -> Trial:
    tag = {"trunk": "trunk", "lr_check": f"lr_x{factor:g}"}.get(role, "")
    name = name_of(variant.arch, images, variant.slides, variant.settings, variant.seed, tag)
    before = parent.step * recipe.batch.tiles if parent else 0
    return Trial(
        name=name,
        role=role,
        recipe=recipe,
        parent=parent,
        seed=variant.seed,
        images=images,
        slides=variant.slides,
        settings=variant.settings,
        lr_factor=factor,
        held_out=False,
        cost=estimate(recipe, images_before=before),
    )


def _trunk_and_cooldowns(
    spec: ScalingSpec, base: Mapping[str, Any], variant: Variant, budgets: Sequence[int], share: float
) -> Iterator[Trial]:
    """A run at a constant rate, and a fork of it for each budget, whose steps together are the budget's."""
    shape = recipe_of(spec, base, variant, budgets[-1])
    tiles, every = shape.batch.tiles, shape.checkpoint.every_steps
    cuts = [_cut(images // tiles, share, every, variant) for images in budgets]
    _require_constant(shape, min(cuts) * tiles)
    trunk_fields = {
        "optim.decay": {"cooldown_images": 0},
        "checkpoint.keep_every_steps": math.gcd(*cuts),
    }
    last = max(cuts) * tiles
    trunk = _trial(variant, "trunk", recipe_of(spec, base, variant, last, trunk_fields), last)
    yield trunk
    for images, cut in zip(budgets, cuts, strict=True):
        left = images - cut * tiles
        fields = {
            "seed": key(variant.seed, "cooldown", cut) % (1 << _SEED_BITS),
            "optim.decay": {"cooldown_images": left},
            "optim.warmup_images": 0,
            "optim.freeze_last_layer_images": 0,
            "loss.teacher_temperature": [shape.loss.teacher_temperature[1]] * 2,
            "loss.teacher_temperature_warmup_images": 0,
            "model.weights": None,
        }
        yield _trial(variant, "cooldown", recipe_of(spec, base, variant, left, fields), images, Origin(trunk.name, cut))


def _cut(steps: int, share: float, every: int, variant: Variant) -> int:
    """The commit of the trunk at which a budget's cooldown begins."""
    cut = round(steps * (1.0 - share) / every) * every
    if not 0 < cut < steps:
        raise RecipeError(
            f"no commit of the trunk lies where the cooldown of {steps} steps of {variant.arch} begins",
            value=f"checkpoint.every_steps={every}",
            expected=f"a divisor of about {max(1, round(steps * (1.0 - share)))}",
            remedy="lower checkpoint.every_steps in set",
        )
    return cut


def _require_constant(recipe: Recipe, first_images: int) -> None:
    """Refuse schedules that a trunk of any length would not share with its forks."""
    for name, (start, end) in {
        "optim.weight_decay": recipe.optim.weight_decay,
        "optim.ema_momentum": recipe.optim.ema_momentum,
    }.items():
        if start != end:
            raise RecipeError(
                f"{name} changes over the run, and constant_lr needs runs of all lengths to agree until they cool down",
                value=[start, end],
                expected="one value twice",
                remedy=f"set {name} to [{start}, {start}], or leave constant_lr out",
            )
    optim, loss = recipe.optim, recipe.loss
    for name, images in {
        "optim.warmup_images": optim.warmup_images,
        "optim.freeze_last_layer_images": optim.freeze_last_layer_images,
        "loss.teacher_temperature_warmup_images": loss.teacher_temperature_warmup_images,
    }.items():
        if images > first_images:
            raise RecipeError(
                f"{name} is longer than the trunk up to its first cooldown",
                value=images,
                expected=f"at most {first_images}",
                remedy="shorten it in set, or raise the smallest budget",
            )


def _lr_checks(spec: ScalingSpec, base: Mapping[str, Any]) -> Iterator[Trial]:
    """Runs at multiples of the rule's rate: smallest budget, first combination, from new weights."""
    rule = spec.lr_rule
    factors = [factor for factor in (rule.check_factors if rule else ()) if factor != 1.0]
    for arch, seed, factor in itertools.product(spec.archs, spec.seeds, factors):
        variant = Variant(arch, spec.slides[0], combinations(spec.grid)[0], seed)
        images = budgets_of(spec, base, variant)[0]
        fields: dict[str, Any] = {}
        if spec.constant_lr is not None:
            shape = recipe_of(spec, base, variant, images)
            tiles, every = shape.batch.tiles, shape.checkpoint.every_steps
            cut = _cut(images // tiles, spec.constant_lr.cooldown_share, every, variant)
            fields = {"optim.decay": {"cooldown_images": images - cut * tiles}}
        recipe = recipe_of(spec, base, variant, images, fields, factor)
        yield _trial(variant, "lr_check", recipe, images, factor=factor)


def _with_held_out(spec: ScalingSpec, trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """The same trials, those of the most work marked, and those of alike work, which would give it away."""
    judged = [trial for trial in trials if trial.judged]
    if spec.held_out == "none" or not judged:
        return trials
    most = max(trial.cost.flops_since_start for trial in judged)
    return tuple(
        replace(trial, held_out=trial.judged and trial.cost.flops_since_start >= _ALIKE * most) for trial in trials
    )
