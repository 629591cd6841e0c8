"""Trials: names, recipes, what is forked from what, and what each costs."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.unit.test_sweep_spec import PRICE, ROOT, SCALING

from histoscale.checkpoint.retention import Retention
from histoscale.config.archs import ARCHS
from histoscale.config.decode import fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import RecipeError
from histoscale.models import build_ssl_net
from histoscale.sweeps.spec import DistillationSpec, Price, ScalingSpec, load_distillation, load_scaling
from histoscale.sweeps.students import distillation_trials
from histoscale.sweeps.trial import Trial, trial_lines
from histoscale.sweeps.trials import scaling_trials, with_rate
from histoscale.train.flops import step_flops_per_tile
from histoscale.train.schedules import schedules_at

BASE: dict[str, Any] = yaml.safe_load((ROOT / "jobs/recipes/quickstart.yaml").read_text())
CONSTANT = {
    "constant_lr": {"cooldown_share": 0.25},
    "budgets_images": [1280, 2560],
    "set": {
        "optim.weight_decay": [0.04, 0.04],
        "optim.ema_momentum": [0.99, 0.99],
        "checkpoint.every_steps": 10,
    },
}


def trials_of(**values: Any) -> tuple[Trial, ...]:
    return scaling_trials(ScalingSpec.model_validate({**SCALING, **values}), BASE)


def test_every_combination_is_a_trial_with_a_name_of_its_own() -> None:
    values = {"grid": {"optim.lr": [1e-3, 2e-3], "data.balance": [[], ["site"]]}, "slides": [8, None], "seeds": [0, 5]}
    trials = trials_of(**values)
    assert len(trials) == len({trial.name for trial in trials}) == 2 * 2 * 4 * 2 * 2
    assert trials == trials_of(**values)
    first = trials[0]
    assert first.name.startswith("vit_nano14-64im-8sl-optim.lr=0.001-data.balance=")
    assert (first.recipe.data.slides, first.recipe.optim.lr, first.recipe.schedule.images) == (8, 1e-3, 64)
    assert len({fingerprint(trial.recipe) for trial in trials}) == len(trials)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"optim.rate": [1.0]}, r"optim.rate is not a field \(nearest: optim.*\)"),
        ({"optim.lr": [1e-3, -1.0]}, r"optim.lr = -1"),
        ({"batch.replicas": [5]}, "replicas must divide tiles"),
        ({"distill.teacher": ["/run"]}, "trains without a teacher"),
    ],
)
def test_a_field_or_value_that_is_not_valid_is_refused_by_name(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        trials_of(grid=grid)


def test_budgets_of_equal_work_give_equal_work() -> None:
    trials = trials_of(budgets_images=[], budgets_flops=[4e12])
    work = [trial.cost.flops_since_start for trial in trials]
    assert trials[0].images > 2 * trials[1].images
    assert work == pytest.approx([4e12, 4e12], rel=0.1)  # whole steps
    with pytest.raises(RecipeError, match="less than one step of vit_nano14"):
        trials_of(budgets_images=[], budgets_flops=[1.0])


def test_costs_are_those_of_the_network() -> None:
    trial = trials_of()[-1]
    net = build_ssl_net(trial.recipe)
    assert trial.cost.parameters == sum(parameter.numel() for parameter in net.backbone.parameters())
    work = step_flops_per_tile(trial.recipe, ARCHS["vit_micro14"])
    assert trial.cost.flops == trial.cost.flops_since_start == work * 128


def test_one_trunk_serves_all_budgets_from_commits_that_it_keeps() -> None:
    trials = trials_of(**CONSTANT)
    assert [trial.role for trial in trials] == ["trunk", "cooldown", "cooldown"] * 2
    trunk, *cooldowns = trials[:3]
    tiles, every = 32, trunk.recipe.checkpoint.every_steps
    commits = range(every, trunk.recipe.steps + 1, every)
    kept = Retention(1, trunk.recipe.checkpoint.keep_every_steps).kept(commits, None)
    for trial, budget in zip(cooldowns, [1280, 2560], strict=True):
        assert trial.parent is not None
        assert trial.parent.trial == trunk.name
        assert trial.parent.step in kept
        assert trial.parent.step == pytest.approx(0.75 * budget / tiles, abs=every / 2)
        assert trial.images == budget == (trial.parent.step + trial.recipe.steps) * tiles
        assert trial.cost.flops_since_start == trial.cost.flops * budget / (trial.recipe.steps * tiles)
        assert trial.recipe.seed != trunk.recipe.seed


def test_a_trunk_and_its_cooldown_have_the_schedules_of_one_run() -> None:
    trunk, short, _ = trials_of(**CONSTANT)[:3]
    assert short.parent is not None
    cut = short.parent.step * 32
    optim = {"decay": {"cooldown_images": short.images - cut}}
    values = trunk.recipe.model_dump()
    whole = Recipe.model_validate(
        {**values, "optim": {**values["optim"], **optim}, "schedule": {"images": short.images}}
    )
    for images in range(32, short.images + 1, 32):
        part, seen = (trunk.recipe, images) if images <= cut else (short.recipe, images - cut)
        ours, theirs = vars(schedules_at(part, seen)), vars(schedules_at(whole, images))
        assert ours == pytest.approx(theirs), images


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optim.ema_momentum", [0.9, 1.0], "optim.ema_momentum changes over the run"),
        ("optim.warmup_images", 1200, "optim.warmup_images is longer than the trunk"),
        ("checkpoint.every_steps", 100, "no commit of the trunk lies where the cooldown of 40 steps"),
    ],
)
def test_a_trunk_that_its_forks_could_not_share_is_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        trials_of(**{**CONSTANT, "set": {**CONSTANT["set"], field: value}})


def test_the_rate_follows_width_and_batch_as_the_rule_states() -> None:
    rule = {"base_arch": "vit_micro14", "check_factors": [0.5, 1, 2]}
    trials = trials_of(lr_rule=rule, grid={"batch.tiles": [32, 128]}, budgets_images=[1280])
    base = BASE["optim"]["lr"]
    for trial in trials:
        width = ARCHS[trial.recipe.model.arch].width
        expected = base * 128 / width * math.sqrt(trial.recipe.batch.tiles / 32) * trial.lr_factor
        assert trial.recipe.optim.lr == pytest.approx(expected)
    assert sum(trial.role == "lr_check" for trial in trials) == 2 * 2
    assert with_rate(trials[0].recipe, 32, None) == trials[0].recipe


def test_checks_of_the_rate_cool_down_like_the_runs_beside_them() -> None:
    rule = {"base_arch": "vit_micro14", "check_factors": [0.5, 1, 2]}
    trials = trials_of(**CONSTANT, lr_rule=rule)
    check = next(trial for trial in trials if trial.role == "lr_check")
    beside = next(trial for trial in trials if trial.role == "cooldown")
    assert check.images == beside.images == check.recipe.schedule.images
    assert check.recipe.optim.decay == beside.recipe.optim.decay


def test_the_runs_of_the_most_work_are_held_out_with_all_their_seeds() -> None:
    trials = trials_of(seeds=[0, 1])
    out = [trial.name for trial in trials if trial.held_out]
    assert out == ["vit_micro14-128im-s0", "vit_micro14-128im-s1"]
    assert not any(trial.held_out for trial in trials_of(held_out="none"))


def test_the_example_is_twelve_points_and_says_what_they_cost() -> None:
    spec = load_scaling(ROOT / "jobs/sweeps/scaling.yaml")
    trials = scaling_trials(spec, BASE)
    assert sum(trial.judged for trial in trials) == 12
    lines = list(trial_lines(trials, spec.price))
    assert len(lines) == len(trials) + 2
    assert "from vit_nano14-14336im-s0-trunk@56" in lines[2]
    assert "2.50" not in lines[-1]
    assert lines[-1].endswith("USD at the prices of 2026-11-01")
    assert sum("held out" in line for line in lines) == 1


def test_a_distillation_pairs_each_student_with_itself_from_scratch() -> None:
    spec = load_distillation(ROOT / "jobs/sweeps/distillation.yaml")
    teacher = Recipe.model_validate(BASE)
    trials = distillation_trials(spec, BASE, {"teacher": "/runs/teacher"}, teacher)
    assert len(trials) == 2 * 3 * 3
    taught, alone = trials[0], trials[1]
    assert (taught.role, alone.role) == ("student", "scratch")
    assert alone.name == f"{taught.name}-scratch"
    assert taught.recipe.distill is not None
    assert taught.recipe.distill.teacher == "/runs/teacher"
    assert taught.recipe.model_copy(update={"distill": None}) == alone.recipe
    assert taught.cost.flops > 0


def test_what_only_a_distilled_run_has_does_not_multiply_those_from_scratch() -> None:
    values = {
        **SCALING,
        "mode": "features",
        "set": {"crops.local_count": 0},
        "grid": {"distill.cls_weight": [0.5, 1.0], "batch.tiles": [32, 64]},
        "lr_rule": {"base_arch": "vit_nano14", "width_exponent": 0.0},
    }
    spec = DistillationSpec.model_validate(values)
    trials = distillation_trials(spec, BASE, {"teacher": "/exports/a"}, Recipe.model_validate(BASE))
    assert [sum(trial.role == role for trial in trials) for role in ("student", "scratch")] == [16, 8]
    rates = {trial.recipe.batch.tiles: trial.recipe.optim.lr for trial in trials}
    assert rates[64] == pytest.approx(rates[32] * math.sqrt(2))


def test_prices_are_work_over_what_a_gpu_does(tmp_path: Path) -> None:
    (trial, *_) = trials_of()
    price = Price.model_validate(PRICE)
    (_, line, total) = trial_lines([trial], price)
    hours = trial.cost.flops / (0.5 * 1e15 * 3600)
    assert f"{hours:.3g}" in line
    assert f"{hours:.3g} hours of a H100 at 50%" in total
