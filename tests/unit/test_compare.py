"""Runs beside each other: what they differ in, and what may be claimed of it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.run_folders import RECIPE, STEPS, commit_of, evaluation, write_evaluations, write_provenance, write_run

from histoscale.cluster.compare import compare_runs
from histoscale.config.recipe import Recipe
from histoscale.errors import RunError
from histoscale.evaluate.report import EvaluationReport
from histoscale.observe.comparison import RunRecord, difference, names_of, read_record, recipe_rows
from histoscale.observe.comparison_page import comparison_page
from histoscale.observe.goodput import worker_s
from histoscale.observe.timeline import Event, Kind
from histoscale.storage import open_store


def recipe_with(**fields: Any) -> Recipe:
    return Recipe.model_validate({**RECIPE.model_dump(), **fields})


def record(folder: Path, recipe: Recipe = RECIPE, accuracy: float = 0.7, **packages: str) -> RunRecord:
    store = open_store(folder)
    write_run(store, recipe, accuracy)
    write_provenance(store, **packages)
    return read_record(store, recipe, commit_of(recipe, STEPS))


def with_report(of: RunRecord, report: EvaluationReport) -> RunRecord:
    return replace(of, reports={report.dataset: [report]})


def test_recipes_differ_field_by_field() -> None:
    other = recipe_with(seed=3, cluster={"workers": 2})
    assert recipe_rows([RECIPE, other]) == [("cluster.workers", "1", "2"), ("seed", "0", "3")]
    assert recipe_rows([RECIPE, RECIPE]) == []
    taught = recipe_with(
        distill={"teacher": "/runs/teacher"}, model={"arch": "vit_s14", "drop_path": 0.0}, loss={"kde_weight": 0.1}
    )
    rows = {row[0]: row[1:] for row in recipe_rows([RECIPE, taught])}
    assert rows["distill.teacher"] == ("none", "/runs/teacher")


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["/runs/a", "/runs/b"], ["a", "b"]),
        (["/runs/a/run", "s3://bucket/b/run"], ["a/run", "b/run"]),
        (["/run", "/x/run"], ["//run", "x/run"]),
    ],
)
def test_runs_are_called_by_what_tells_them_apart(uris: list[str], names: list[str]) -> None:
    assert names_of(uris) == names


@pytest.mark.parametrize(("half", "established"), [(0.04, True), (0.06, False)])
def test_a_difference_is_established_where_intervals_do_not_meet(half: float, established: bool) -> None:
    ours, theirs = (evaluation(60, accuracy, half).figures[0] for accuracy in (0.8, 0.7))
    found, reverse = difference(ours, theirs), difference(theirs, ours)
    assert found.value == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1 - 2 * half, 0.1 + 2 * half))
    assert (found.established, reverse.established) == (established, established)


def test_the_page_tells_what_differs_and_what_is_established(tmp_path: Path) -> None:
    first = with_report(record(tmp_path / "a", torch="2.12"), evaluation(60, 0.7, 0.02))
    other = recipe_with(seed=3, batch={"tiles": 2048, "replicas": 256})
    second = with_report(record(tmp_path / "b", other, torch="2.13"), replace(evaluation(60, 0.8, 0.02), images_seen=9))
    paired = replace(evaluation(60, 0.7).gains[0], baseline="a step 60", difference=0.1, interval=(0.08, 0.12))
    second = with_report(second, replace(second.reports["crc"][-1], gains=(paired,)))
    third = with_report(record(tmp_path / "c", torch="2.12"), evaluation(60, 0.71, 0.02))
    page = comparison_page([first, second, third], ["/gone: why"])
    for text in (
        "The recipes differ in 3 fields of the experiment: batch.replicas, batch.tiles, seed.",
        "crc, kNN (k=20), both: b is +10.0 points against a (6.0 to 14.0), which is established; they have seen 9 and",
        "crc, kNN (k=20), both: c is +1.0 points against a (-3.0 to 5.0), which is not established.",
        "The losses of these runs cannot be compared with each other: they differ in batch.replicas, batch.tiles.",
        "<td class=s>torch</td><td class=s>2.12</td><td class=s>2.13</td><td class=s>2.12</td><td class=s>differs</td>",
        "<td class=s>/data/my index</td>",
        "Left out: /gone: why",
        "<td class=s>a step 60</td><td class=s>kNN (k=20)</td><td class=s>both</td><td class=s>+10.0</td>",
        "tiles seen 2,048\nb: 9",  # where only b, with half the batch, has a step
    ):
        assert text in page, text


def test_what_was_evaluated_on_other_tiles_or_not_at_all_is_not_held_against_each_other(tmp_path: Path) -> None:
    runs = [record(tmp_path / "a"), record(tmp_path / "b")]
    for changed in ({"dataset_hash": "g" * 16}, {"division": "5 splits"}):
        page = comparison_page([runs[0], with_report(runs[1], replace(evaluation(60, 0.8), **changed))])
        assert "b and a were not evaluated on the same tiles with the same splits" in page
        assert "established;" not in page
    page = comparison_page([replace(run, reports={}) for run in runs])
    assert "no two runs were evaluated on the same tiles" in page
    assert "None of the runs was evaluated" in page
    assert "The recipes define the same loss. Each run has a teacher of its own that moves" in page


def test_worker_hours_count_the_workers_that_were_there() -> None:
    events = [
        Event(Kind.START, 0.0, 0, 8),
        Event(Kind.RESUME, 100.0, 0, 8),
        Event(Kind.CRASH, 200.0, 10, 8),
        Event(Kind.RESUME, 260.0, 5, 4),
        Event(Kind.COMMIT, 300.0, 9, 4),
        Event(Kind.RESUME, 400.0, 9, 4, restart_s=40.0),
        Event(Kind.STOP, 500.0, 20, 8),
        Event(Kind.START, 9000.0, 20, 8),
        Event(Kind.RESUME, 9010.0, 20, 2),
        Event(Kind.COMMIT, 9020.0, 22, 2),
    ]
    assert worker_s(events) == 8 * 100 + 4 * 100 + 4 * 100 + 2 * 10
    assert worker_s([]) == 0.0


def compared(uris: list[Path], out: Path) -> list[str]:
    told: list[str] = []
    compare_runs([str(uri) for uri in uris], str(out), told.append)
    return told


def test_a_run_that_cannot_be_read_is_told_and_left_out(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "abc"]
    for run in runs:
        write_run(open_store(run))
    (runs[1] / "recipe.yaml").write_text("seed: [")
    lines = compared(runs, tmp_path / "pages" / "both.html")
    assert lines[0].startswith(f"warning: left out: {runs[1]}: ")
    assert lines[1:] == [f"comparison: {tmp_path}/pages/both.html"]
    assert f"Left out: {runs[1]}" in (tmp_path / "pages" / "both.html").read_text()
    with pytest.raises(RunError, match="there is nothing to compare"):
        compared(runs[:2], tmp_path / "one.html")


@pytest.mark.parametrize("runs", [["a", "a"], [f"run-{number}" for number in range(9)]])
def test_too_many_runs_and_one_that_comes_twice_are_refused(tmp_path: Path, runs: list[str]) -> None:
    with pytest.raises(RunError, match="2 to 8 different run folders"):
        compared([tmp_path / run for run in runs], tmp_path / "page.html")


def test_an_evaluation_of_another_form_is_left_out_of_the_comparison(tmp_path: Path) -> None:
    store = open_store(tmp_path / "a")
    write_run(store)
    write_evaluations(store, evaluation(60, 0.7))
    store.put("evaluations/crc-step-00000060.json", b"[]")
    reports: Mapping[str, Any] = read_record(store, RECIPE, commit_of(RECIPE, STEPS)).reports
    assert [report.step for report in reports["crc"]] == [20]
