"""From features to findings: every figure stands where it belongs, with gains, robustness and notes."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from histoscale.errors import DatasetError, RecipeError
from histoscale.evaluate.assess import EvaluationPlan, Truth, assess
from histoscale.evaluate.embed import EMBEDDINGS
from histoscale.evaluate.figures import COLOUR, PRETRAINED, UNTRAINED
from histoscale.evaluate.intervals import bootstrap, interval
from histoscale.evaluate.metrics import METRICS
from histoscale.evaluate.probes import PROBES, probe_features
from histoscale.evaluate.report import EvaluationReport, decode, encode
from histoscale.evaluate.splits import splits_of, units_of
from histoscale.evaluate.table import WIDTH

CLASSES = ("gland", "stroma", "tumour")
TILES, PATIENTS = 360, 36


def truth(seed: int = 0) -> Truth:
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, PATIENTS, TILES)
    labels = np.sort(rng.integers(0, 3, TILES))
    centers = np.array(["SECRET-NORTH", "SECRET-SOUTH"])[patients % 2]
    return Truth(CLASSES, labels, np.array([f"SECRET-{number}" for number in patients]), centers)


def features(known: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
    """The class token of the pretrained network knows the classes well, the mean of its patches a little."""
    rng = np.random.default_rng(1)
    signal = np.eye(3)[known]
    noise = {name: rng.normal(size=(len(known), 16)) for name in (PRETRAINED, UNTRAINED)}
    noise[PRETRAINED][:, :3] += 3.0 * signal
    noise[PRETRAINED][:, 8:11] += 1.0 * signal
    found = {name: rows.astype(np.float32) for name, rows in noise.items()}
    return found | {COLOUR: rng.normal(size=(len(known), 6)).astype(np.float32)}


def report_of(some: Truth, plan: EvaluationPlan) -> EvaluationReport:
    found = assess(features(some.labels), some, plan)
    counts = dict(zip(CLASSES, np.bincount(some.labels).tolist(), strict=True))
    return EvaluationReport(
        "tiles", "0" * 16, "f" * 16, 70, 2240, counts,
        found.division, found.figures, found.gains, found.robustness, found.notes,
    )  # fmt: skip


def test_figures_are_those_of_the_probe_on_its_kind_of_embedding() -> None:
    some, plan = truth(), EvaluationPlan(("knn", "ridge"), ("cls", "patch_mean"), 2)
    report = report_of(some, plan)
    splits = splits_of(some.labels, CLASSES, 2, some.groups)
    units = units_of(some.groups, TILES)
    rows = features(some.labels)[PRETRAINED]
    for embedding, part in (("cls", rows[:, :8]), ("patch_mean", rows[:, 8:])):
        told = probe_features(PROBES["ridge"], part, some.labels, splits)
        samples = bootstrap(some.labels, units, told)
        for metric in METRICS:
            figure = report.figure(PRETRAINED, "ridge", metric, embedding)
            assert len(figure.values) == 2
            assert figure.interval == interval(samples[metric])
            assert figure.interval[0] < figure.mean < figure.interval[1]
    assert report.figure(PRETRAINED, "ridge", embedding="cls").mean > 0.85
    assert 0.4 < report.figure(PRETRAINED, "ridge", embedding="patch_mean").mean < 0.8
    assert report.figure(PRETRAINED, "ridge") == report.figure(PRETRAINED, "ridge", embedding="cls")


def test_gains_are_differences_on_the_same_tiles() -> None:
    report = report_of(truth(), EvaluationPlan(("ridge",), ("cls",), 2))
    assert {(gain.baseline, gain.metric) for gain in report.gains} == {
        (baseline, metric) for baseline in (UNTRAINED, COLOUR) for metric in METRICS
    }
    for gain in report.gains:
        ours = report.figure(PRETRAINED, "ridge", gain.metric)
        theirs = report.figure(gain.baseline, "ridge", gain.metric)
        assert gain.difference == pytest.approx(ours.mean - theirs.mean)
        assert 0.2 < gain.interval[0] < gain.difference < gain.interval[1]
        assert (gain.p_value is None) == (gain.metric == "auroc")
        assert gain.p_value is None or gain.p_value < 0.01


def test_report_with_everything_reads_back_and_its_table_is_narrow_and_without_names() -> None:
    report = report_of(truth(), EvaluationPlan(("knn", "linear", "few_shot_4"), ("both", "cls"), 2))
    assert decode(encode(report)) == report
    json.loads(encode(report), parse_constant=pytest.fail)  # no NaN, which is not JSON
    table = report.table()
    assert max(map(len, table.splitlines())) <= WIDTH
    for words in (
        "chance 33.3%; step 70",
        "embedding both",
        "embedding cls",
        "pretrained above by",
        "4 shots",
        "index",
    ):
        assert words in table
    assert "2 stratified splits of 36 groups" in table
    assert "SECRET" not in table
    assert "SECRET" not in encode(report).decode()
    gain = next(gain for gain in report.gains if (gain.probe, gain.embedding, gain.baseline) == ("knn", "cls", COLOUR))
    line = next(line for line in table.split("embedding cls")[1].splitlines() if COLOUR in line)
    assert f"{100 * gain.difference:+.1f} [{100 * gain.interval[0]:+.1f}, {100 * gain.interval[1]:+.1f}]" in line


def test_robustness_is_there_for_every_kind_where_centers_are_known() -> None:
    report = report_of(truth(), EvaluationPlan(("knn",), ("cls", "both"), 2))
    assert [(each.features, each.embedding) for each in report.robustness] == [
        (PRETRAINED, "cls"),
        (PRETRAINED, "both"),
        (UNTRAINED, "cls"),
        (UNTRAINED, "both"),
        (COLOUR, ""),
    ]
    assert report.robustness[0].index > 0.8
    assert report.robustness[2].index < 0.5
    without = report_of(dataclasses.replace(truth(), centers=None), EvaluationPlan(("knn",)))
    assert without.robustness == without.notes == ()
    assert "centers:" not in without.table()


def test_robustness_that_cannot_be_measured_is_a_note_and_not_the_end() -> None:
    some = truth()
    centers = np.array(["SECRET-NORTH", "SECRET-SOUTH"])[(some.labels == 0).astype(int)]
    report = report_of(dataclasses.replace(some, centers=centers), EvaluationPlan(("knn",)))
    assert report.robustness == ()
    assert "robustness was not measured: classes and centers are not crossed" in " ".join(report.notes)
    assert "not crossed" in report.table()
    assert max(map(len, report.table().splitlines())) <= WIDTH
    assert "SECRET" not in report.table()


def test_few_groups_are_a_note() -> None:
    some = truth()
    groups = np.array([f"SECRET-{number % 6}" for number in range(TILES)])
    report = report_of(dataclasses.replace(some, groups=groups, centers=None), EvaluationPlan(("knn",)))
    (note,) = report.notes
    assert re.fullmatch(r"intervals over [2-6] tested groups are too narrow: 10 or more would be needed", note)


def test_the_datasets_own_split_has_one_value_and_a_leak_is_refused() -> None:
    some = truth()
    assert some.groups is not None
    numbers = np.array([int(group.split("-")[1]) for group in some.groups])
    parts = np.array(["train", "train", "val", "test"])[numbers % 4]
    report = report_of(dataclasses.replace(some, parts=parts), EvaluationPlan(("linear",)))
    figure = report.figure(PRETRAINED, "linear")
    assert len(figure.values) == 1
    assert figure.std == 0.0
    assert "the dataset's own split of 36 groups" in report.table()
    parts[np.flatnonzero(parts == "test")[0]] = "train"
    with pytest.raises(DatasetError, match="groups of the test part are in the training part as well"):
        report_of(dataclasses.replace(some, parts=parts), EvaluationPlan(("linear",)))


def test_options_are_read_and_bad_ones_refused() -> None:
    assert EvaluationPlan.parse("knn,ridge", "cls,both", 5) == EvaluationPlan(("knn", "ridge"), ("cls", "both"), 5)
    assert EvaluationPlan.parse("knn,linear", "both", 3) == EvaluationPlan()
    for probes, embeddings, words in (("svm", "both", "no probe"), ("knn", "clss", r"Use cls\.")):
        with pytest.raises(RecipeError, match=words):
            EvaluationPlan.parse(probes, embeddings, 3)
    for seeds in (0, 101):
        with pytest.raises(RecipeError, match=rf"number of splits is out of range \(got {seeds}; expected 1 to 100"):
            EvaluationPlan.parse("knn", "both", seeds)


def test_the_jobs_help_names_every_probe_and_embedding() -> None:
    text = (Path(__file__).parents[2] / "jobs" / "evaluate.py").read_text()
    defaults = EvaluationPlan()
    for name in (*PROBES, *EMBEDDINGS):
        assert name in text
    for option, default in (("probes", ",".join(defaults.probes)), ("embedding", ",".join(defaults.embeddings))):
        assert re.search(rf'"--{option}",\s+default="{default}"', text)
    assert f'"--seeds", type=int, default={defaults.seeds}' in text
