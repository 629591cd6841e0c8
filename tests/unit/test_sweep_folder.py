"""What a sweep's folder remembers, the order of its trials, and one trial's way from run to row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_sweep_spec import SCALING
from tests.unit.test_sweep_trials import BASE

from histoscale.cluster.pretrain import PretrainOutcome, PretrainRequest
from histoscale.errors import RunError, StorageError, SweepError
from histoscale.storage import open_store
from histoscale.sweeps import one_trial
from histoscale.sweeps.driver import waves
from histoscale.sweeps.folder import SPEC, SweepFolder, in_order
from histoscale.sweeps.job import _teacher_scores
from histoscale.sweeps.judge import Judged
from histoscale.sweeps.one_trial import TrialTask, run_trial
from histoscale.sweeps.rows import from_json, row_of, to_json
from histoscale.sweeps.spec import EvaluationSpec, Resources, ScalingSpec
from histoscale.sweeps.trial import Origin, Trial
from histoscale.sweeps.trials import scaling_trials


def trials() -> tuple[Trial, ...]:
    return scaling_trials(ScalingSpec.model_validate(SCALING), BASE)


def folder_at(path: Path) -> SweepFolder:
    return SweepFolder(open_store(path))


def test_a_folder_is_one_sweeps(tmp_path: Path) -> None:
    folder = folder_at(tmp_path / "sweep")
    folder.begin({"spec": {"seeds": (0,)}, "index": "/index"})
    folder.begin({"spec": {"seeds": [0]}, "index": "/index"})
    with pytest.raises(SweepError, match=r"is the folder of another sweep .*index is /other.*expected /index"):
        folder.begin({"spec": {"seeds": [0]}, "index": "/other"})


@pytest.mark.parametrize("damage", [b"{", b"3"])
def test_a_damaged_record_of_what_is_tried_is_a_diagnosis(tmp_path: Path, damage: bytes) -> None:
    folder = folder_at(tmp_path)
    folder.begin({"index": "/index"})
    folder.store.put(SPEC, damage)
    with pytest.raises(SweepError, match=rf"{SPEC} of sweep .* is damaged .*Restore it"):
        folder.begin({"index": "/index"})


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"name": "a"}'])
def test_damaged_scores_of_the_teacher_are_a_diagnosis(tmp_path: Path, damage: bytes) -> None:
    folder = folder_at(tmp_path)
    folder.store.put("teacher.json", damage)
    evaluation = ScalingSpec.model_validate(SCALING).evaluation
    with pytest.raises(SweepError, match=r"teacher.json of sweep .* is damaged .*Delete teacher.json"):
        _teacher_scores("/run", evaluation, folder, lambda line: None)


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SweepError, match="holds something else than a sweep"):
        folder_at(tmp_path).begin({})


def test_rows_come_back_as_they_were_kept(tmp_path: Path) -> None:
    folder, first = folder_at(tmp_path), trials()[0]
    row = row_of(first, scores={"oral": 0.7}, chance={"oral": 0.5}, loss=None, latency_ms=1.5, wall_s=60.0)
    folder.keep(row)
    assert folder.result(first.name) == row == from_json(to_json(row))
    assert folder.result("another") is None
    assert in_order(trials(), folder.results()) == [row]


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"name": "a"}'])
def test_a_damaged_row_is_a_diagnosis(damage: bytes) -> None:
    with pytest.raises(SweepError, match="the result of a trial is damaged"):
        from_json(damage)


def test_forks_come_after_what_they_are_forked_from() -> None:
    some = [replace(trials()[0], name=name, parent=None) for name in "abc"]
    some[0] = replace(some[0], parent=Origin("c", 4))
    some[1] = replace(some[1], parent=Origin("a", 8))
    assert [[trial.name for trial in wave] for wave in waves(some)] == [["c"], ["a"], ["b"]]
    assert waves([]) == []
    with pytest.raises(SweepError, match=r"forked from one that is not in the sweep .*a from c"):
        waves(some[:2])


def task_of(path: Path) -> TrialTask:
    evaluation = EvaluationSpec(datasets={"oral": "/data/oral"})
    return TrialTask(trials()[0], str(path), "/index", evaluation, Resources(), "somebody")


def stub_run(monkeypatch: pytest.MonkeyPatch, outcome: PretrainOutcome | Exception) -> list[PretrainRequest]:
    """In place of training and judging, which the integration test does for real."""
    asked: list[PretrainRequest] = []

    def train(request: PretrainRequest, tell: Any) -> PretrainOutcome:
        asked.append(request)
        tell("step 1 of 2")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(one_trial, "check_request", lambda request: request)
    monkeypatch.setattr(one_trial, "pretrain", train)
    monkeypatch.setattr(one_trial, "_judge", lambda task, folder: Judged({"oral": 0.7}, {"oral": 0.5}, 2.0))
    monkeypatch.setattr(one_trial, "last_loss", lambda task, folder: 3.5)
    return asked


def test_a_trial_is_trained_judged_and_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stub_run(monkeypatch, PretrainOutcome(2, 2, stopped=False))
    task = task_of(tmp_path)
    row = run_trial(task)
    assert (row.scores, row.loss, row.latency_ms, row.reason) == ({"oral": 0.7}, 3.5, 2.0, "")
    assert asked[0].run_uri == f"{tmp_path}/trials/{task.trial.name}"
    assert run_trial(task) == row
    assert len(asked) == 1
    assert (tmp_path / "logs" / f"{task.trial.name}.txt").read_text() == "step 1 of 2\n"


def test_a_fork_names_the_run_of_its_trunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stub_run(monkeypatch, PretrainOutcome(2, 2, stopped=False))
    task = task_of(tmp_path)
    run_trial(replace(task, trial=replace(task.trial, parent=Origin("trunk", 8))))
    source = asked[0].fork_from
    assert source is not None
    assert (source.uri, source.step) == (f"{tmp_path}/trials/trunk", 8)


def test_what_is_wrong_with_a_trial_is_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_run(monkeypatch, RunError("the loss is not finite"))
    row = run_trial(task_of(tmp_path))
    assert row.reason == "the loss is not finite."
    assert folder_at(tmp_path).result(row.name) == row


def test_what_may_pass_is_raised_and_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_run(monkeypatch, StorageError("the bucket is away", transient=True))
    task = task_of(tmp_path)
    with pytest.raises(StorageError):
        run_trial(task)
    assert folder_at(tmp_path).result(task.trial.name) is None
    stub_run(monkeypatch, PretrainOutcome(1, 2, stopped=True))
    with pytest.raises(SweepError, match="stopped before its end") as caught:
        run_trial(task)
    assert caught.value.transient
