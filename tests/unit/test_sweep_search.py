"""Searches: suggestions as trials, what is refused before the first, and which are repeated."""

from typing import Any

import pytest
from tests.unit.test_sweep_spec import SCALING
from tests.unit.test_sweep_trials import BASE

from histoscale.config.recipe import Recipe
from histoscale.errors import RecipeError
from histoscale.sweeps.report import failed_and_all
from histoscale.sweeps.rows import TrialRow, row_of
from histoscale.sweeps.search import (
    Build,
    distillation_build,
    finalists,
    require_searchable,
    scaling_build,
    search_results,
    search_trial,
)
from histoscale.sweeps.spec import DistillationSpec, ScalingSpec, SearchSpec

SEARCH: dict[str, Any] = {
    "trials": 10,
    "ranges": {
        "optim.lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "crops.local_count": {"low": 2, "high": 6, "whole": True},
    },
    "choices": {"loss.centering": ["sinkhorn", "center"]},
    "finalists": 2,
    "seeds": [7, 8],
}


def build_of(**search: Any) -> tuple[SearchSpec, Build]:
    spec = ScalingSpec.model_validate({**SCALING, "search": {**SEARCH, **search}})
    assert spec.search is not None
    return spec.search, scaling_build(spec, BASE)


def test_a_suggestion_is_a_trial_of_the_first_size_and_budget() -> None:
    _, build = build_of()
    trial = search_trial(build, {"optim.lr": 3e-3, "crops.local_count": 5}, 12, seed=0)
    assert (trial.name, trial.role) == ("vit_nano14-64im-s0-search0012", "search")
    assert (trial.recipe.optim.lr, trial.recipe.crops.local_count) == (3e-3, 5)
    assert not trial.judged


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"choices": {"loss.centring": ["sinkhorn"]}}, "loss.centring is not a field"),
        ({"choices": {"loss.centering": ["sinkhorn", "none"]}}, "loss.centering = 'none'"),
        ({"ranges": {"augment.hue": {"low": 0.1, "high": 0.9}}}, "augment.hue = 0.9"),
        ({"ranges": {"augment.hue": {"low": -0.1, "high": 0.2}}}, "augment.hue = -0.1"),
    ],
)
def test_what_no_recipe_can_have_is_refused_before_the_first_trial(search: dict[str, Any], message: str) -> None:
    parsed, build = build_of(**search)
    with pytest.raises(RecipeError, match=message):
        require_searchable(parsed, build, seed=0)
    require_searchable(*build_of(), seed=0)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"ranges": {}, "choices": {}}, "must name a field"),
        ({"choices": {"optim.lr": [1.0]}}, "ranges and choices names a value twice"),
        ({"ranges": {"optim.lr": {"low": 2, "high": 1}}}, "from low to high"),
        ({"ranges": {"optim.lr": {"low": 0, "high": 1, "log": True}}}, "above 0 with log"),
        ({"choices": {"seed": [1, 2]}}, "seed is what seeds is for"),
    ],
)
def test_a_search_that_says_nothing_is_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_of(**search)


def test_the_best_are_repeated_with_their_values_and_other_seeds() -> None:
    search, build = build_of()
    rows: list[TrialRow] = []
    for number, (rate, score) in enumerate([(1e-3, 0.5), (2e-3, 0.9), (4e-3, 0.7), (8e-3, 0.8)]):
        trial = search_trial(build, {"optim.lr": rate}, number, seed=0)
        rows.append(row_of(trial, scores={"tissue": score}, reason="lost" if number == 3 else ""))
    found = finalists(search, build, rows, "tissue")
    assert [(trial.recipe.optim.lr, trial.recipe.seed) for trial in found] == [
        (2e-3, 7),
        (2e-3, 8),
        (4e-3, 7),
        (4e-3, 8),
    ]
    assert found[0].name == "vit_nano14-64im-s7-finalist0001"
    assert {trial.role for trial in found} == {"finalist"}


def test_what_was_found_stands_beside_what_other_seeds_reached() -> None:
    search, build = build_of()
    rows = [
        row_of(search_trial(build, {"optim.lr": rate}, number, seed=0), scores={"tissue": score})
        for number, (rate, score) in enumerate([(1e-3, 0.75), (2e-3, 0.9)])
    ]
    assert [each.found for each in search_results(rows)] == pytest.approx([0.1, 0.25])
    again = finalists(search.model_copy(update={"finalists": 1}), build, rows, "tissue")
    rows += [row_of(trial, scores={"tissue": score}) for trial, score in zip(again, [0.6, 0.8], strict=True)]
    best, other = search_results(rows)
    assert (best.settings, best.seeds, other.seeds) == ({"optim.lr": "0.002"}, 2, 0)
    assert best.again == pytest.approx(0.3)
    assert best.again_interval == pytest.approx((0.3 - 12.7062 * 0.1, 0.3 + 12.7062 * 0.1), abs=1e-4)
    sections = dict(failed_and_all(rows))
    assert "optim.lr=0.002" in sections["Search"]
    assert "not repeated" in sections["Search"]


def test_students_are_searched_likewise() -> None:
    search = {"trials": 4, "ranges": {"loss.student_temperature": {"low": 0.05, "high": 0.2}}}
    spec = DistillationSpec.model_validate({**SCALING, "search": search})
    build = distillation_build(spec, BASE, {"teacher": "/run"}, Recipe.model_validate(BASE))
    trial = search_trial(build, {"loss.student_temperature": 0.07}, 3, seed=0)
    assert trial.name == "vit_nano14-64im-s0-search0003"
    assert trial.recipe.distill is not None
    assert trial.recipe.loss.student_temperature == 0.07
    assert trial.cost.flops > 0
