"""When checkpoints are evaluated beside a run, and what becomes of evaluations that fail, are lost or are late."""

from dataclasses import dataclass, field

import pytest

from histoscale.cluster.evaluations import CommitWatch, DatasetWords, Evaluated, EvaluationLost, look_at_all
from histoscale.config.running import EvaluationSection
from histoscale.errors import CheckpointError, DatasetError

DATASET = "s3://bucket/crc"


@dataclass
class FakeEvaluation:
    """Ends when it is told how."""

    outcome: Evaluated | Exception | None = None
    cancelled: bool = False

    def ended(self) -> bool:
        return self.outcome is not None

    def result(self) -> Evaluated:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        assert self.outcome is not None
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Scene:
    """A watch, and all that it has begun and told."""

    every: int = 1
    tries: int = 2
    evaluated: int = 0
    begun: list[FakeEvaluation] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        section = EvaluationSection(datasets=(DATASET,), every_commits=self.every, tries=self.tries)
        self.watch = CommitWatch(DatasetWords(DATASET), section, self.evaluated, self._begin, self.told.append)

    def _begin(self) -> FakeEvaluation:
        self.begun.append(FakeEvaluation())
        return self.begun[-1]


def done(step: int) -> Evaluated:
    return Evaluated(step, "crc: 68 %")


def test_each_commit_is_evaluated_once() -> None:
    scene = Scene()
    scene.watch.look(0)
    assert scene.begun == []
    scene.watch.look(10)
    scene.watch.look(10)
    assert len(scene.begun) == 1
    scene.begun[0].outcome = done(10)
    scene.watch.look(10)
    assert scene.watch.idle
    assert scene.told == ["evaluated step 10 on crc: 68 %"]
    scene.watch.look(20)
    assert len(scene.begun) == 2


def test_every_other_commit_and_the_last_one() -> None:
    scene = Scene(every=2)
    scene.watch.look(10)
    assert scene.begun == []
    scene.watch.look(20)
    scene.begun[0].outcome = done(20)
    scene.watch.look(30)
    assert scene.watch.idle
    scene.watch.look(30, last=True)
    assert len(scene.begun) == 2
    scene.begun[1].outcome = done(30)
    scene.watch.look(30, last=True)
    assert scene.watch.idle


def test_a_run_that_resumes_does_not_evaluate_what_was_evaluated() -> None:
    scene = Scene(evaluated=20)
    scene.watch.look(20)
    assert scene.begun == []
    scene.watch.look(30)
    assert len(scene.begun) == 1


def test_a_late_evaluation_is_not_doubled_and_what_it_misses_is_told() -> None:
    scene = Scene()
    for committed in (10, 20, 30):
        scene.watch.look(committed)
    assert len(scene.begun) == 1
    assert [line.split(":")[0] for line in scene.told] == [f"step {step} is not evaluated on s3" for step in (10, 20)]
    scene.begun[0].outcome = done(10)
    scene.watch.look(30)
    assert len(scene.begun) == 2, "the newest one follows"
    scene.begun[1].outcome = done(30)
    scene.watch.look(30)
    assert scene.watch.idle


def test_an_evaluation_that_took_a_newer_commit_leaves_nothing_due() -> None:
    scene = Scene()
    scene.watch.look(10)
    scene.watch.look(20)
    scene.begun[0].outcome = done(20)
    scene.watch.look(20)
    assert scene.watch.idle
    assert len(scene.begun) == 1


def test_a_lost_process_is_tried_again_and_then_left_behind() -> None:
    scene = Scene(tries=2)
    scene.watch.look(10)
    scene.begun[0].outcome = EvaluationLost("the node is gone")
    scene.watch.look(10)
    assert len(scene.begun) == 2
    scene.begun[1].outcome = EvaluationLost("the node is gone")
    scene.watch.look(10)
    assert scene.watch.idle
    assert scene.told == [
        f"the evaluation of step 10 on {DATASET} is tried again: the node is gone",
        f"warning: step 10 is not evaluated on {DATASET}: the node is gone",
    ]
    scene.watch.look(20)
    scene.begun[2].outcome = EvaluationLost("again")
    scene.watch.look(20)
    assert len(scene.begun) == 4, "the next checkpoint has tries of its own"


def test_a_diagnosis_is_not_tried_again() -> None:
    scene = Scene()
    scene.watch.look(10)
    scene.begun[0].outcome = CheckpointError("no commit is whole")
    scene.watch.look(10)
    assert scene.watch.idle
    assert scene.told[0].startswith(f"warning: step 10 is not evaluated on {DATASET}: no commit is whole")
    scene.watch.look(20)
    assert len(scene.begun) == 2


def test_a_dataset_that_cannot_be_used_is_left_out_from_then_on() -> None:
    scene = Scene()
    scene.watch.look(10)
    scene.begun[0].outcome = DatasetError("3 of 100 tiles cannot be read")
    scene.watch.look(20)
    scene.watch.look(30, last=True)
    assert len(scene.begun) == 1
    assert scene.watch.idle
    assert scene.told[-1].startswith(f"warning: {DATASET} is not evaluated any more: 3 of 100 tiles")


def test_what_runs_is_let_go_of_with_the_run() -> None:
    scene = Scene()
    scene.watch.look(10)
    scene.watch.abandon()
    assert scene.begun[0].cancelled
    scene.watch.abandon()


def test_all_are_looked_at_though_one_runs() -> None:
    scenes = [Scene(), Scene()]
    assert look_at_all([scene.watch for scene in scenes], 10)
    assert [len(scene.begun) for scene in scenes] == [1, 1]
    scenes[0].begun[0].outcome = done(10)
    assert look_at_all([scene.watch for scene in scenes], 10)
    scenes[1].begun[0].outcome = done(10)
    assert not look_at_all([scene.watch for scene in scenes], 10)


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(ValueError, match="datasets must be absolute paths"):
        EvaluationSection(datasets=("crc",))
