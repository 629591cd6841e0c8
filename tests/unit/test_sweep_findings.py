"""Findings of scaling sweeps: planted laws, failed trials, the rule of the rate, effects, and what the report says."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.unit.test_sweep_spec import SCALING
from tests.unit.test_sweep_trials import BASE

from histoscale.errors import SweepError
from histoscale.sweeps.fits import t_interval
from histoscale.sweeps.report import scaling_page
from histoscale.sweeps.rows import TrialRow, from_parquet, row_of, to_csv, to_parquet
from histoscale.sweeps.rules import check_lr
from histoscale.sweeps.scaling import (
    COMPUTE,
    ERROR,
    IMAGES,
    LOSS,
    PARAMETERS,
    ScalingFindings,
    analyse_scaling,
    rounded,
)
from histoscale.sweeps.spec import LrRule, ScalingSpec
from histoscale.sweeps.trials import scaling_trials

ARCHS = ["vit_nano14", "vit_micro14", "vit_mini14", "vit_ti14"]
SPEC = ScalingSpec.model_validate({**SCALING, "archs": ARCHS, "budgets_images": [2240, 4480, 8960, 17920]})


def planted(parameters: float, images: float) -> float:
    return 0.05 + 0.15 * (parameters / 3e5) ** -0.5 + 0.2 * (images / 2240) ** -0.6


def rows_of(spec: ScalingSpec = SPEC, change: Callable[[TrialRow], TrialRow] = lambda row: row) -> list[TrialRow]:
    """Rows of all trials, as if each had reached what was planted, with one percent of scatter."""
    rows = []
    for n, trial in enumerate(scaling_trials(spec, BASE)):
        noise = 0.01 * np.sin(37.0 * n)
        error = planted(trial.cost.parameters, trial.images) * float(np.exp(noise))
        row = row_of(trial, scores={"tissue": 1.0 - error}, chance={"tissue": 0.25}, loss=5.0 * error)
        rows.append(change(row))
    return rows


@pytest.fixture(scope="module")
def rows() -> list[TrialRow]:
    return rows_of()


@pytest.fixture(scope="module")
def findings(rows: list[TrialRow]) -> ScalingFindings:
    return analyse_scaling(SPEC, rows, resamples=10)


def test_planted_exponents_come_back_from_the_rows(findings: ScalingFindings) -> None:
    law = findings.laws[0]
    assert (law.of, law.along) == (ERROR, (PARAMETERS, IMAGES))
    assert law.fit is not None
    assert law.fit.exponents == pytest.approx((0.5, 0.6), abs=0.2)
    assert len(law.fit.points.labels) == 15  # of sixteen, one is held out
    assert {(each.of, each.along) for each in findings.laws} >= {(ERROR, (COMPUTE,)), (LOSS, (COMPUTE,))}


def test_the_held_out_run_is_foretold_better_than_by_the_null_model(findings: ScalingFindings) -> None:
    assert findings.check is not None
    assert findings.check.error < findings.check.null_error
    assert "so the fit foretells more than that" in findings.sentence


def test_the_sentence_names_size_data_and_error_with_intervals(findings: ScalingFindings) -> None:
    best = findings.best
    assert best is not None
    assert f"{rounded(best.parameters)} parameters ({rounded(best.parameters_interval[0])} to " in findings.sentence
    assert f"{rounded(best.images)} images" in findings.sentence
    grid = np.geomspace(1e5, 2e7, 400)
    errors = [planted(size, float(findings.work.images(best.flops, np.array(size)))) for size in grid]
    assert best.parameters == pytest.approx(grid[np.argmin(errors)], rel=0.6)


def test_extrapolations_are_of_the_published_sizes_and_cost_what_their_work_does(findings: ScalingFindings) -> None:
    small, large = findings.extrapolations
    assert small.parameters == pytest.approx(632e6, rel=0.01)
    assert large.parameters == pytest.approx(1.85e9, rel=0.01)
    assert small.usd == pytest.approx(small.gpu_hours * 3)
    assert small.gpu_hours == pytest.approx(small.flops / (0.5e15 * 3600))
    assert small.factor > 1e6
    assert small.error is not None


def test_failed_trials_stay_out_of_the_fits_and_in_the_report(rows: list[TrialRow]) -> None:
    broken = [replace(rows[0], reason="the loss is not finite", scores={}), *rows[1:]]
    found = analyse_scaling(SPEC, broken, resamples=2)
    assert found.laws[0].fit is not None
    assert rows[0].name not in found.laws[0].fit.points.labels
    html = scaling_page(found, broken, "<test>", "today")
    assert f"<td>{rows[0].name}</td><td>the loss is not finite</td>" in html
    assert "&lt;test&gt;" in html


def test_a_sweep_of_few_runs_says_that_it_cannot_tell(rows: list[TrialRow]) -> None:
    found = analyse_scaling(SPEC, rows[:2], resamples=2)
    assert found.best is None
    assert found.sentence.startswith("This sweep cannot say which model is best: A power law in parameters") or (
        "a power law in parameters needs more values" in found.sentence
    )
    assert "vit_nano14 after 4,480 images" in found.sentence
    html = scaling_page(found, rows[:2], "few", "today")
    assert "No curve: " in html
    assert "Not checked. No held-out run has ended" in html


def test_a_sweep_in_which_all_failed_is_refused(rows: list[TrialRow]) -> None:
    with pytest.raises(SweepError, match=r"no trial has ended with a score \(got '16 of 16 failed'"):
        analyse_scaling(SPEC, [replace(row, reason="lost", scores={}) for row in rows])


def test_a_fit_that_foretells_no_better_says_so(rows: list[TrialRow]) -> None:
    largest = max(rows, key=lambda row: row.flops)
    fitted = max((row for row in rows if not row.held_out), key=lambda row: row.flops)
    stuck = [replace(row, scores=fitted.scores) if row is largest else row for row in rows]
    found = analyse_scaling(SPEC, stuck, resamples=2)
    assert found.check is not None
    assert found.check.null_error == pytest.approx(0.0)
    assert "do not rely on it beyond the runs" in found.sentence


def test_what_a_value_of_the_grid_changes_is_a_mean_over_pairs() -> None:
    grid = {"data.temperature": [1.0, 4.0]}
    spec = ScalingSpec.model_validate({**SCALING, "grid": grid, "slides": [None, 100]})

    def worse(row: TrialRow) -> TrialRow:
        error = 0.3 + 0.02 * (row.settings["data.temperature"] == "4.0") + 0.1 * (row.slides == 100)
        return replace(row, scores={"tissue": 1.0 - error})

    found = analyse_scaling(spec, rows_of(spec, worse), resamples=2)
    by_field = {effect.field: effect for effect in found.effects}
    assert by_field["data.temperature"].difference == pytest.approx(0.02)
    assert by_field["slides"].difference == pytest.approx(0.1)
    assert by_field["slides"].pairs == 2 * 2 * 2
    assert "4.0 instead of 1.0" in scaling_page(found, [], "grid", "today")


def test_numbers_are_rounded_for_people() -> None:
    assert [rounded(value) for value in (36_123.0, 3.941e6, 1.7e9, 12.0)] == [
        "36,100",
        "3.94 million",
        "1.7 billion",
        "12",
    ]


def test_laws_in_one_variable_are_of_runs_that_agree_in_the_other(findings: ScalingFindings) -> None:
    by_along = {law.along: law.fit for law in findings.laws if law.of == ERROR}
    images, parameters = by_along[(IMAGES,)], by_along[(PARAMETERS,)]
    assert images is not None
    assert parameters is not None
    assert {label.split("-")[0] for label in images.points.labels} == {"vit_mini14"}  # one run of vit_ti14 is held out
    assert {label.split("-")[1] for label in parameters.points.labels} == {"8960im"}


def test_students_t_is_wider_than_the_normal_interval() -> None:
    assert t_interval([0.1]) is None
    assert t_interval([1.0, 3.0]) == pytest.approx((2.0 - 12.7062, 2.0 + 12.7062), abs=1e-3)


def lr_rows(best_of: dict[str, float]) -> list[TrialRow]:
    rule = {"base_arch": "vit_micro14", "check_factors": [0.5, 1, 2]}
    spec = ScalingSpec.model_validate({**SCALING, "archs": list(best_of), "lr_rule": rule})

    def scored(row: TrialRow) -> TrialRow:
        distance = np.log2(row.lr_factor / best_of[row.arch])
        return replace(row, scores={"tissue": 0.7 - 0.05 * float(distance**2)})

    return rows_of(spec, scored)


def test_a_rule_whose_own_rate_is_best_at_every_width_holds() -> None:
    found = check_lr(LrRule(base_arch="vit_micro14"), lr_rows({"vit_nano14": 1.0, "vit_mini14": 1.0}), "tissue")
    assert found.holds
    assert found.exponent == pytest.approx(1.0)
    assert "holds" in found.sentence()
    assert list(found.errors["vit_nano14"]) == [0.5, 1.0, 2.0]


def test_a_rule_that_does_not_hold_names_the_exponent_that_would() -> None:
    """The best rate doubles from width 64 to 128 beyond the rule: the exponent is less by one."""
    found = check_lr(LrRule(base_arch="vit_micro14"), lr_rows({"vit_nano14": 1.0, "vit_micro14": 2.0}), "tissue")
    assert not found.holds
    assert found.exponent == pytest.approx(0.0, abs=1e-9)
    assert found.at_an_end == ("vit_micro14",)
    assert "does not hold" in found.sentence()
    assert "vit_micro14 the best may lie beyond" in found.sentence()


def test_a_rule_without_runs_beside_it_was_not_tested(rows: list[TrialRow]) -> None:
    found = check_lr(LrRule(base_arch="vit_micro14"), rows, "tissue")
    assert not found.holds
    assert "was not tested" in found.sentence()


def test_the_report_marks_what_is_extrapolated_and_shows_every_trial(
    findings: ScalingFindings, rows: list[TrialRow]
) -> None:
    html = scaling_page(findings, rows, "planted", "today")
    assert "EXTRAPOLATION" in html
    assert "at the prices of 2026-01-02" in html
    assert all(f"<td>{row.name}</td>" in html for row in rows)
    assert "equal to the largest fitted run" in html
    assert html.count("<svg") == 2  # there is no equal-compute slice among budgets of images
    assert html.count("<polygon") == 1


def test_equal_compute_slices_are_drawn() -> None:
    spec = ScalingSpec.model_validate({**SCALING, "archs": ARCHS, "budgets_images": [], "budgets_flops": [4e13, 1e14]})
    rows = rows_of(spec)
    found = analyse_scaling(spec, rows, resamples=2)
    assert [len(each.parameters_N) for each in found.slices] == [4, 4]
    assert sum(row.held_out for row in rows) == 4
    assert scaling_page(found, rows, "slices", "today").count("<svg") == 3


def test_rows_come_back_from_parquet_and_csv_has_a_column_for_each_task_and_field(rows: list[TrialRow]) -> None:
    some: list[Any] = [
        replace(rows[0], settings={"optim.lr": "0.1"}, latency_ms=1.5, slides=7),
        replace(rows[1], scores={"b": 0.5}, reason="lost,\nand more"),
    ]
    assert list(from_parquet(to_parquet(some))) == some
    head, *lines = to_csv(some).splitlines()
    assert {"name", "score:tissue", "score:b", "chance:tissue", "set:optim.lr"} <= set(head.split(","))
    assert lines[0].startswith(f"{rows[0].name},run,vit_nano14,0,2240,7,")
