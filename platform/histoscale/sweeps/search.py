"""A search beside the grid: what a suggestion is as a trial, and which suggestions are repeated with other seeds.

Who suggests is not decided here: each suggestion is a mapping from fields to values of `SearchSpec`.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from histoscale.config.recipe import Recipe
from histoscale.sweeps.fits import Interval, t_interval
from histoscale.sweeps.rows import TrialRow
from histoscale.sweeps.spec import DistillationSpec, ScalingSpec, SearchSpec
from histoscale.sweeps.students import student_of
from histoscale.sweeps.trial import Role, Trial, estimate, name_of
from histoscale.sweeps.trials import Variant, budgets_of, recipe_of

Suggestion = Mapping[str, Any]
Build = Callable[[Suggestion, int], Trial]
"""From a suggestion and a seed to a trial, whose name and role are still those of a grid."""


def scaling_build(spec: ScalingSpec, base: Mapping[str, Any]) -> Build:
    """Suggestions at the first size, budget and number of slides of a scaling spec."""

    def build(suggestion: Suggestion, seed: int) -> Trial:
        variant = Variant(spec.archs[0], spec.slides[0], dict(suggestion), seed)
        images = budgets_of(spec, base, variant)[0]
        recipe = recipe_of(spec, base, variant, images)
        return Trial(
            name=name_of(variant.arch, images, variant.slides, {}, seed),
            role="search",
            recipe=recipe,
            parent=None,
            seed=seed,
            images=images,
            slides=variant.slides,
            settings=variant.settings,
            lr_factor=1.0,
            held_out=False,
            cost=estimate(recipe),
        )

    return build


def distillation_build(
    spec: DistillationSpec, base: Mapping[str, Any], distill: Mapping[str, Any], teacher: Recipe
) -> Build:
    """Suggestions at the first size and budget of a distillation spec; arguments as `distillation_trials` has them."""

    def build(suggestion: Suggestion, seed: int) -> Trial:
        arch, images = spec.archs[0], spec.budgets_images[0]
        fields = {**spec.set, **suggestion, "model.arch": arch, "schedule.images": images, "seed": seed}
        taught = {**base, "distill": {**distill, "mode": spec.mode}}
        trial = student_of(spec, taught, fields, suggestion, teacher)
        return replace(trial, name=name_of(arch, images, None, {}, seed))

    return build


def search_trial(build: Build, suggestion: Suggestion, number: int, seed: int) -> Trial:
    """The trial of a suggestion, the `number`th of its search."""
    return _called(build(suggestion, seed), "search", number)


def require_searchable(search: SearchSpec, build: Build, seed: int) -> None:
    """Refuse, before anything starts, fields and values that no recipe can have: both ends of ranges, every choice.

    Raises:
        RecipeError: One of them is not valid.
    """
    for suggestion in _corners(search):
        build(suggestion, seed)


def finalists(search: SearchSpec, build: Build, rows: Sequence[TrialRow], target: str) -> tuple[Trial, ...]:
    """The best suggestions, again with the seeds of `SearchSpec`.

    Args:
        search: How many, and which seeds.
        build: As for the suggestions.
        rows: Of all trials; those of role `search` that have a score are ranked.
        target: The task that decides.
    """
    done = [row for row in rows if row.role == "search" and not row.reason and target in row.scores]
    best = sorted(done, key=lambda row: (row.error(target), row.name))[: search.finalists]
    return tuple(
        _called(build({field: json.loads(value) for field, value in row.settings.items()}, seed), "finalist", number)
        for row in best
        for number in [int(row.name.rpartition("search")[2])]
        for seed in search.seeds
    )


@dataclass(frozen=True)
class SearchResult:
    """One suggestion, and what became of it with other seeds.

    Attributes:
        settings: Field -> value, as text.
        found: Its error in the search.
        again: Mean error with other seeds; None where it was not repeated.
        again_interval: 95 % interval of the mean, by Student's t; None for fewer than two seeds.
        seeds: How many.
    """

    settings: Mapping[str, str]
    found: float
    again: float | None
    again_interval: Interval | None
    seeds: int


def search_results(rows: Sequence[TrialRow], shown: int = 10) -> tuple[SearchResult, ...]:
    """The best suggestions by the first task, those that were repeated first."""
    results = []
    for row in rows:
        if row.role != "search" or row.reason or not row.scores:
            continue
        task = next(iter(row.scores))
        again = [
            other.error(task)
            for other in rows
            if other.role == "finalist" and not other.reason and other.settings == row.settings
        ]
        mean = statistics.fmean(again) if again else None
        results.append(SearchResult(row.settings, row.error(task), mean, t_interval(again), len(again)))
    results.sort(key=lambda result: (result.again is None, result.found if result.again is None else result.again))
    return tuple(results[:shown])


def _called(trial: Trial, role: Role, number: int) -> Trial:
    return replace(trial, name=f"{trial.name}-{role}{number:04d}", role=role)


def _corners(search: SearchSpec) -> Iterator[dict[str, Any]]:
    """Suggestions that together hold every end and every choice, each once."""
    options = {
        field: [_number(each.low, each.whole), _number(each.high, each.whole)] for field, each in search.ranges.items()
    }
    options |= {field: list(values) for field, values in search.choices.items()}
    for place in range(max(map(len, options.values()))):
        yield {field: values[min(place, len(values) - 1)] for field, values in options.items()}


def _number(value: float, whole: bool) -> float | int:
    return round(value) if whole else value
