"""The quickstart's own part: its folder, its steps in order, what it shows, and how it fails."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from histoscale.cluster import quickstart
from histoscale.cluster.quickstart import QuickstartRequest, run_quickstart
from histoscale.cluster.quickstart_output import JobLines, Places, StepOutcome, render_report
from histoscale.errors import ClusterError, RunError
from histoscale.evaluate.figures import COLOUR, PRETRAINED, UNTRAINED, Figure, Gain
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.report import EvaluationReport, encode
from histoscale.storage import open_store

ROOT = Path(__file__).parents[2]
VALUES = {PRETRAINED: (0.9, 0.92, 0.94), UNTRAINED: (0.6, 0.6, 0.6), COLOUR: (0.3, 0.5, 0.4)}


def evaluation(dataset: str) -> EvaluationReport:
    figures = [
        Figure(features, "both", probe, "balanced_accuracy", values, (0.0, 1.0))
        for features, values in VALUES.items()
        for probe in ("knn", "linear")
    ]
    return EvaluationReport(dataset, "0" * 16, "f" * 16, 5, 160, {"a": 10, "b": 30}, "3 splits", tuple(figures))


class FakeHead:
    """Stands in for the head: notes what is submitted, does what the evaluation would, fails where told to."""

    submitted: list[list[str]]
    ended: bool
    fail_at = ""

    def __init__(self, size: object) -> None:
        type(self).submitted = []
        type(self).ended = False
        self.address = "http://127.0.0.1:1"

    def __enter__(self) -> "FakeHead":
        return self

    def __exit__(self, *_: object) -> None:
        type(self).ended = True

    def submit(self, entrypoint: Sequence[str], working_dir: Path, on_line: Callable[[str], None]) -> int:
        type(self).submitted.append([*entrypoint])
        job = Path(entrypoint[1]).stem
        on_line("2026-11-22 03:51:05,460\tINFO cli.py:42 -- Job submission server address: x")
        on_line(f"{job} says so")
        if job == type(self).fail_at:
            on_line("error: the disk is full.")
            on_line("2026-11-22 03:51:25,812\tERR cli.py:75 -- Job 'x' failed")
            on_line("2026-11-22 03:51:25,812\tINFO cli.py:89 -- Status message: failed with exit code 2, last logs:")
            on_line("repeated log")
            return 1
        if job == "evaluate":
            options = dict(zip(entrypoint[2::2], entrypoint[3::2], strict=True))
            report = evaluation(Path(options["--dataset"]).name)
            open_store(options["--run"]).put(report.key, encode(report))
        return 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(quickstart, "LocalHead", FakeHead)
    monkeypatch.setattr(FakeHead, "fail_at", "")
    monkeypatch.setattr(quickstart, "make_slides", lambda folder, **_: calls.append("slides"))
    monkeypatch.setattr(quickstart, "make_labelled_tiles", lambda folder, **_: calls.append("tiles"))
    return calls


def request(out: Path, slides: str | None = None, dataset: str | None = None, seed: int = 3) -> QuickstartRequest:
    return QuickstartRequest(ROOT, out, slides, dataset, seed)


def test_steps_run_in_order_with_absolute_places_and_end_in_a_report(tmp_path: Path, made: list[str]) -> None:
    told: list[str] = []
    out = tmp_path / "out"
    report = run_quickstart(request(out), told.append)
    assert made == ["slides", "tiles"]
    assert [words[1] for words in FakeHead.submitted] == [
        f"jobs/{name}.py" for name in ("index", "pretrain", "evaluate", "export")
    ]
    assert FakeHead.submitted[0][2:] == [str(out / "slides"), "--out", str(out / "index")]
    assert "seed=3" in FakeHead.submitted[1]
    assert FakeHead.ended
    assert [line.split()[0] for line in told if line.startswith("[")] == [f"[{number}/5]" for number in range(1, 6)]
    assert "      pretrain says so" in told
    assert not any("Job submission" in line for line in told)
    for words in ("92.0 +- 2.0 %", "60.0 +- 0.0 %", "40.0 +- 10.0 %", "chance 50.0%", "tensorboard --logdir", "Next"):
        assert words in report
    assert (out / "report.md").read_text() == report
    assert (out / ".gitignore").read_text() == "*\n"


def test_a_second_call_makes_no_slides_and_submits_every_step_again(tmp_path: Path, made: list[str]) -> None:
    run_quickstart(request(tmp_path / "out"), lambda line: None)
    run_quickstart(request(tmp_path / "out"), lambda line: None)
    assert made == ["slides", "tiles"]
    assert len(FakeHead.submitted) == 4


def test_own_slides_without_tiles_skip_the_evaluation_and_say_how_to_get_one(tmp_path: Path, made: list[str]) -> None:
    told: list[str] = []
    report = run_quickstart(request(tmp_path / "out", slides="s3://bucket/SECRET-NAME"), told.append)
    assert made == []
    assert [words[1] for words in FakeHead.submitted] == ["jobs/index.py", "jobs/pretrain.py", "jobs/export.py"]
    assert any(line.startswith("[4/5] evaluate") and "--dataset DIR" in line for line in told)
    assert "--dataset DIR" in report
    assert "SECRET-NAME" not in (tmp_path / "out" / "quickstart.json").read_text()


def test_own_tiles_are_evaluated(tmp_path: Path, made: list[str]) -> None:
    run_quickstart(request(tmp_path / "out", slides="/slides", dataset="/data/mine"), lambda line: None)
    assert FakeHead.submitted[2] == [
        *("python", "jobs/evaluate.py", "--run", str(tmp_path / "out" / "run"), "--dataset", "/data/mine")
    ]


def test_a_failing_step_is_diagnosed_with_its_last_words_and_the_head_ends(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeHead, "fail_at", "pretrain")
    told: list[str] = []
    with pytest.raises(ClusterError, match=r"step 3 of 5, pretrain, failed with exit status 2 .*the disk is full"):
        run_quickstart(request(tmp_path / "out"), told.append)
    assert FakeHead.ended
    assert len(FakeHead.submitted) == 2
    assert not any("repeated log" in line for line in told)


@pytest.mark.parametrize("change", [{"seed": 4}, {"slides": "/other"}])
def test_a_folder_of_other_slides_or_another_seed_is_refused(
    tmp_path: Path, made: list[str], change: dict[str, object]
) -> None:
    run_quickstart(request(tmp_path / "out"), lambda line: None)
    with pytest.raises(RunError, match="other slides or with another seed"):
        run_quickstart(request(tmp_path / "out", **change), lambda line: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["[]", "torn"])
def test_a_damaged_settings_file_is_refused_like_another_one(tmp_path: Path, made: list[str], text: str) -> None:
    (tmp_path / "quickstart.json").write_text(text)
    with pytest.raises(RunError, match="other slides"):
        run_quickstart(request(tmp_path), lambda line: None)


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path, made: list[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="holds something else"):
        run_quickstart(request(tmp_path), lambda line: None)
    with pytest.raises(RunError, match="holds something else"):
        run_quickstart(request(tmp_path / "thesis.txt"), lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_slides_that_were_half_made_are_made_again(tmp_path: Path, made: list[str]) -> None:
    run_quickstart(request(tmp_path / "out"), lambda line: None)
    settings = tmp_path / "out" / "quickstart.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"slides_made": False}))
    run_quickstart(request(tmp_path / "out"), lambda line: None)
    assert made == ["slides", "tiles"] * 2


def test_what_ray_says_itself_is_hidden_and_its_errors_are_not() -> None:
    shown: list[str] = []
    lines = JobLines(shown.append)
    for line in (
        "2026-11-22 03:55:48,302\tWARNING __init__.py:28 -- Progress bars disabled.",
        "Running entrypoint for job raysubmit_x: python jobs/index.py",
        "[2026-11-22 03:55:48,301 E 11661 11661] core_worker.cc:2465: Actor with class name",
        "\x1b[33m(raylet)\x1b[0m WARNING: 8 PYTHON worker processes have been started",
        "2026-11-22 03:55:48,302\tERROR worker.py:28 -- the node is lost",
        "step 1/100 | loss 11.0",
    ):
        lines.take(line)
    assert [line.split()[-1] for line in shown] == ["lost", "11.0"]


def test_last_words_without_a_diagnosis_are_the_last_line() -> None:
    lines = JobLines(lambda line: None)
    assert lines.last_words == "no output"
    for line in ("one", "two", "", "2026-11-22 03:51:25,812\tINFO sdk.py:520 -- WebSocket closed"):
        lines.take(line)
    assert lines.last_words == "two"
    assert lines.exit_status is None


def test_report_without_an_evaluation_names_what_was_skipped() -> None:
    steps = [StepOutcome("slides", None), StepOutcome("index", 2.25)]
    text = render_report(Places(Path("/out")), steps, "checkpoints/x", None)
    assert "| slides | skipped |" in text
    assert "| index | 2.2 s |" in text
    assert "/out/run/checkpoints/x" in text


def test_the_report_has_both_probes_and_says_what_is_not_established() -> None:
    figures = [
        Figure(features, "both", probe, BALANCED_ACCURACY, (value, value + 0.02), (value - 0.1, value + 0.1))
        for probe, shift in (("knn", 0.0), ("linear", 0.1))
        for features, value in ((PRETRAINED, 0.52 + shift), (UNTRAINED, 0.5), (COLOUR, 0.4))
    ]
    gains = [Gain(UNTRAINED, "both", probe, BALANCED_ACCURACY, 0.02, (-0.04, 0.05), 0.3) for probe in ("knn", "linear")]
    evaluation = EvaluationReport(
        "tiles", "h" * 16, "f" * 16, 70, 2240, {"a": 10, "b": 10}, "2 splits", tuple(figures), tuple(gains)
    )
    text = render_report(Places(Path("/out")), [], "checkpoints/x", evaluation)
    assert "| balanced accuracy, 20 tiles in 2 classes (chance 50.0%) | kNN (k=20) | linear |" in text
    assert "| after pretraining | 53.0 +- 1.4 % | 63.0 +- 1.4 % |" in text
    assert "| colour statistics | 41.0 +- 1.4 % | 41.0 +- 1.4 % |" in text
    assert "| gain over the untrained network, points (95 %) | +2.0 (-4.0 to 5.0) | +2.0 (-4.0 to 5.0) |" in text
    assert "/out/run/report.html" in text
