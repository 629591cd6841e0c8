"""Findings of distillation sweeps: what students keep, which nothing beats, and what the teacher was worth."""

from dataclasses import replace
from typing import Any

import pytest

from histoscale.errors import SweepError
from histoscale.sweeps.charts import Series, chart
from histoscale.sweeps.report_students import distillation_page
from histoscale.sweeps.retention import DistillationFindings, TeacherScores, analyse_distillation, pareto
from histoscale.sweeps.rows import TrialRow

TEACHER = TeacherScores("the teacher", 1_000_000, 20.0, {"tissue": 0.9, "pcam": 0.8}, {"tissue": 0.1, "pcam": 0.5})
KEPT = {"vit_test14": 0.5, "vit_nano14": 0.97, "vit_micro14": 0.9, "vit_mini14": 0.99}
PARAMETERS = {"vit_test14": 10_000, "vit_nano14": 100_000, "vit_micro14": 300_000, "vit_mini14": 500_000}


def row(arch: str, seed: int, kept: float, role: str = "student", **changes: Any) -> TrialRow:
    scores = {
        task: TEACHER.chance[task] + kept * (TEACHER.scores[task] - TEACHER.chance[task]) for task in ("tissue", "pcam")
    }
    values: dict[str, Any] = {
        "name": f"{arch}-{role}-s{seed}",
        "role": role,
        "arch": arch,
        "seed": seed,
        "images": 1000,
        "slides": None,
        "parameters": PARAMETERS[arch],
        "flops": 1e9,
        "own_flops": 1e9,
        "lr": 1e-3,
        "lr_factor": 1.0,
        "held_out": False,
        "reason": "",
        "scores": scores,
        "chance": TEACHER.chance,
        "settings": {},
        "latency_ms": PARAMETERS[arch] / 1e5,
    }
    return TrialRow(**{**values, **changes})


def sweep(seeds: int = 3) -> list[TrialRow]:
    rows = []
    for arch, kept in KEPT.items():
        for seed in range(seeds):
            spread = 0.01 * (seed - (seeds - 1) / 2)
            rows += [row(arch, seed, kept + spread), row(arch, seed, kept + spread - 0.2, "scratch")]
    return rows


@pytest.fixture(scope="module")
def findings() -> DistillationFindings:
    return analyse_distillation(sweep(), TEACHER)


def test_what_is_kept_is_the_share_above_chance(findings: DistillationFindings) -> None:
    by_arch = {student.arch: student for student in findings.students}
    nano = by_arch["vit_nano14"]
    assert nano.mean_kept == pytest.approx(0.97)
    assert nano.kept == pytest.approx({"tissue": 0.97, "pcam": 0.97})
    assert nano.scores["tissue"] == pytest.approx(0.1 + 0.97 * 0.8)
    assert nano.kept_interval == pytest.approx((0.97 - 4.3027 * 0.01 / 3**0.5, 0.97 + 4.3027 * 0.01 / 3**0.5), abs=1e-5)


def test_the_front_leaves_out_what_is_larger_slower_and_worse(findings: DistillationFindings) -> None:
    assert [s.arch for s in findings.students if s.on_front] == ["vit_test14", "vit_nano14", "vit_mini14"]


def test_the_front_is_that_of_comparing_all_pairs() -> None:
    costs = [(1.0, 9.0), (2.0, 2.0), (2.0, 2.0), (3.0, 1.0), (3.0, 3.0), (9.0, 1.0)]
    assert pareto(costs) == {0, 1, 2, 3}


def test_the_sentence_names_the_smallest_that_keeps_enough(findings: DistillationFindings) -> None:
    assert "is vit_nano14, 1,000 images (100,000 parameters, 1/10 of the teacher's)" in findings.sentence
    assert "keeps 97%" in findings.sentence
    assert "(95% to 99% over 3 seeds)" in findings.sentence
    assert "reaches below 95%: more seeds would tell" in findings.sentence
    assert "the teacher was worth +16.0 points of balanced accuracy on tissue (+16.0 to +16.0)" in findings.sentence


def test_where_none_keeps_enough_the_sentence_says_so() -> None:
    found = analyse_distillation([row("vit_test14", 0, 0.5), row("vit_micro14", 0, 0.9)], TEACHER)
    assert found.sentence.startswith("No student keeps 95% of its teacher; the best, vit_micro14")
    assert "of one seed, so its spread is not known" in found.sentence
    assert found.gains == ()
    html = distillation_page(found, [], "one", "today")
    assert "No student was also trained from scratch" in html
    assert "one seed: not known" in html


def test_gains_are_paired_by_seed_and_by_what_both_were_set_to() -> None:
    rows = [
        row("vit_nano14", 0, 0.9, settings={"batch.tiles": "32", "distill.cls_weight": "0.5"}),
        row("vit_nano14", 0, 0.5, "scratch", settings={"batch.tiles": "32"}),
        row("vit_nano14", 0, 0.1, "scratch", settings={"batch.tiles": "64"}, name="other"),
        row("vit_nano14", 1, 0.1, "scratch", settings={"batch.tiles": "32"}),
    ]
    found = analyse_distillation(rows, TEACHER)
    assert [(gain.task, gain.seeds) for gain in found.gains] == [("tissue", 1), ("pcam", 1)]
    assert found.gains[0].difference == pytest.approx(0.4 * 0.8)
    assert found.gains[0].difference_interval is None


def test_failed_students_are_in_the_report_and_not_in_the_findings() -> None:
    rows = [*sweep(), row("vit_test14", 9, 0.5, reason="lost its node", scores={})]
    found = analyse_distillation(rows, TEACHER)
    assert all(student.seeds == 3 for student in found.students)
    html = distillation_page(found, rows, "students", "today")
    assert "<td>lost its node</td>" in html
    assert html.count("<svg") == 2
    assert "teacher: the teacher" in html
    unmeasured = analyse_distillation([replace(each, latency_ms=None) for each in sweep(1)], TEACHER)
    assert "Latency was not measured" in distillation_page(unmeasured, [], "students", "today")


def test_a_teacher_that_guesses_and_a_sweep_without_students_are_refused() -> None:
    with pytest.raises(SweepError, match=r"no better than guessing on pcam.*\(got 0.5"):
        analyse_distillation(sweep(), replace(TEACHER, scores={"tissue": 0.9, "pcam": 0.5}))
    with pytest.raises(SweepError, match=r"no student has ended .*\(got '1 of 1 trials failed'"):
        analyse_distillation([row("vit_test14", 0, 0.5, reason="lost", scores={})], TEACHER)


def test_a_chart_leaves_out_what_its_axes_cannot_show() -> None:
    drawn = chart([Series("<a>", [(1.0, 0.5, "x"), (0.0, 0.5, "y"), (2.0, float("nan"), "z")])], "x", "y")
    assert drawn.count("<circle") == 1
    assert "&lt;a&gt;" in drawn
    assert "Nothing to draw" in chart([Series("a", [(0.0, 1.0, "y")])], "x", "y")


def test_a_larger_value_is_drawn_further_right_and_higher() -> None:
    drawn = chart([Series("a", [(1.0, 1.0, "one"), (10.0, 2.0, "ten"), (100.0, 3.0, "hundred")])], "x", "y")
    places = [tuple(map(float, part.split('"')[1:4:2])) for part in drawn.split("<circle cx=")[1:]]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.2)  # logarithmic
    assert y0 > y1 > y2
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
