"""From a distillation spec to its trials: students of one teacher, and the same students without it."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.sweeps.spec import DistillationSpec
from histoscale.sweeps.trial import Trial, estimate, name_of, override
from histoscale.sweeps.trials import combinations, with_rate

_DISTILL = "distill."


def distillation_trials(
    spec: DistillationSpec, base: Mapping[str, Any], distill: Mapping[str, Any], teacher: Recipe
) -> tuple[Trial, ...]:
    """All trials of a spec.

    Args:
        spec: What to try.
        base: What the file of the base recipe holds.
        distill: The section `distill` that names the teacher; fields of `set` and `grid` change it.
        teacher: A recipe with the teacher's model and heads.

    Raises:
        RecipeError: A field or a value of `set` or `grid` is not valid, or does not fit the others; nothing has begun.
    """
    trials: dict[str, Trial] = {}
    for arch, images, seed in itertools.product(spec.archs, spec.budgets_images, spec.seeds):
        for settings in combinations(spec.grid):
            for trial in _pair(spec, base, distill, teacher, arch, images, seed, settings):
                trials.setdefault(trial.name, trial)
    return tuple(trials.values())


def _pair(
    spec: DistillationSpec,
    base: Mapping[str, Any],
    distill: Mapping[str, Any],
    teacher: Recipe,
    arch: str,
    images: int,
    seed: int,
    settings: Mapping[str, Any],
) -> Iterator[Trial]:
    """A student, and the same one from scratch: what only a distilled run has is left out there."""
    fields = {**spec.set, **settings, "model.arch": arch, "schedule.images": images, "seed": seed}
    taught = {**base, "distill": {**distill, "mode": spec.mode}}
    yield student_of(spec, taught, fields, settings, teacher)
    if spec.from_scratch:
        alone = {name: value for name, value in base.items() if name != "distill"}
        fields = {name: value for name, value in fields.items() if not name.startswith(_DISTILL)}
        settings = {name: value for name, value in settings.items() if not name.startswith(_DISTILL)}
        yield student_of(spec, alone, fields, settings, None)


def student_of(
    spec: DistillationSpec,
    values: Mapping[str, Any],
    fields: Mapping[str, Any],
    settings: Mapping[str, Any],
    teacher: Recipe | None,
) -> Trial:
    """One student, or, without a teacher, the same from scratch.

    Args:
        spec: What to try.
        values: What the base recipe holds, with the section `distill` where there is a teacher.
        fields: Of the recipe -> values, `settings` among them.
        settings: Those that are tried.
        teacher: A recipe with the teacher's model and heads.
    """
    name = name_of(
        fields["model.arch"],
        fields["schedule.images"],
        None,
        settings,
        fields["seed"],
        "" if teacher else "scratch",
    )
    recipe = decode_recipe(
        dict(values), [override(field, value) for field, value in fields.items()], source=f"trial {name}"
    )
    base_tiles = decode_recipe(
        dict(values), [override(field, value) for field, value in fields.items() if field not in settings]
    ).batch.tiles
    recipe = with_rate(recipe, base_tiles, spec.lr_rule)
    return Trial(
        name=name,
        role="student" if teacher else "scratch",
        recipe=recipe,
        parent=None,
        seed=fields["seed"],
        images=recipe.steps * recipe.batch.tiles,
        slides=recipe.data.slides,
        settings=settings,
        lr_factor=1.0,
        held_out=False,
        cost=estimate(recipe, teacher),
    )
