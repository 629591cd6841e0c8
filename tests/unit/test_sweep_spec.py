"""Specs of sweeps: what is refused, and with which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from histoscale.errors import RecipeError
from histoscale.sweeps.spec import DistillationSpec, Price, ScalingSpec, load_distillation, load_scaling

ROOT = Path(__file__).parents[2]
PRICE = {"gpu": "H100", "peak_tflops": 1000, "mfu": 0.5, "usd_per_gpu_hour": 3, "as_of": "2026-01-02"}
SCALING: dict[str, Any] = {
    "recipe": "recipe.yaml",
    "archs": ["vit_nano14", "vit_micro14"],
    "budgets_images": [64, 128],
    "evaluation": {"datasets": {"tissue": "/data/tiles"}},
    "price": PRICE,
}


def loaded(tmp_path: Path, values: dict[str, Any]) -> ScalingSpec:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SCALING, **values}))
    return load_scaling(path)


def test_the_specs_that_come_along_are_valid() -> None:
    scaling = load_scaling(ROOT / "jobs/sweeps/scaling.yaml")
    students = load_distillation(ROOT / "jobs/sweeps/distillation.yaml")
    assert len(scaling.archs) * len(scaling.budgets_images) == 12
    assert scaling.evaluation.target == students.evaluation.target == "tissue"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch": ["vit_s14"]}, r"arch is not a field \(nearest: archs\)"),
        ({"archs": ["vit_s15"]}, "'vit_s15' is no architecture"),
        ({"archs": ["vit_s14", "vit_s14"]}, "archs names a value twice"),
        ({"budgets_images": []}, "must name a budget"),
        ({"budgets_flops": [1e9, 1e9]}, "budgets_flops names a value twice"),
        ({"grid": {"optim.lr": []}}, r"grid.optim.lr = \[\]"),
        ({"grid": {"data.mix": [[1], [1]]}}, "grid.data.mix names a value twice"),
        ({"grid": {"model.arch": ["vit_s14"]}}, "model.arch is what archs is for"),
        ({"grid": {"data.slides": [4]}}, "data.slides is what slides is for"),
        ({"set": {"schedule.images": 4}}, "schedule.images is what budgets_images is for"),
        ({"set": {"optim.decay": "cosine"}, "constant_lr": {}}, "optim.decay is what constant_lr is for"),
        ({"set": {"optim.lr": 1}, "grid": {"optim.lr": [1]}}, "optim.lr stands in grid and in set"),
        ({"constant_lr": {"cooldown_share": 1.0}}, "cooldown_share = 1.0"),
        ({"lr_rule": {"base_arch": "vit"}}, "'vit' is no architecture"),
        ({"lr_rule": {"base_arch": "vit_s14", "check_factors": [0.5, 2, 4]}}, "must hold 1 and two others"),
        ({"evaluation": {"datasets": {}}}, "evaluation.datasets"),
        ({"evaluation": {"datasets": {"a b": "/data"}}}, "names of datasets are of letters"),
        ({"evaluation": {"datasets": {"a": "data"}}}, "must be absolute paths"),
        ({"evaluation": {"datasets": {"a": "/d"}, "probe": "svm"}}, "probe must be one of"),
        ({"price": {**PRICE, "mfu": 1.5}}, "price.mfu = 1.5"),
    ],
)
def test_what_is_not_valid_is_refused_by_name(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        loaded(tmp_path, values)


def test_a_distillation_names_budgets_and_leaves_the_teacher_to_the_command(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    for values, message in (
        ({"budgets_images": []}, "must name a budget"),
        ({"set": {"distill.teacher": "/run"}}, "distill.teacher is what the command's --teacher is for"),
        ({"mode": "logits"}, "mode = 'logits'"),
    ):
        path.write_text(yaml.safe_dump({**SCALING, **values}))
        with pytest.raises(RecipeError, match=message):
            load_distillation(path)
    assert DistillationSpec.model_validate({**SCALING, "grid": {"data.slides": [4]}}).from_scratch


def test_a_spec_that_cannot_be_read_names_where_to_find_some(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="jobs/sweeps"):
        load_scaling(tmp_path / "none.yaml")


def test_hours_of_a_gpu_are_work_over_its_rate() -> None:
    price = Price.model_validate(PRICE)
    assert price.gpu_hours(1000e12 * 0.5 * 3600) == pytest.approx(1.0)
    with pytest.raises(ValidationError):
        Price.model_validate({**PRICE, "as_of": "soon"})
