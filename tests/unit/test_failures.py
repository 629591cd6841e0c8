"""Which failures are worth another attempt, and what a run that gives up says."""

import pickle
import re

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from histoscale.cluster.control import ControllerLine
from histoscale.cluster.elasticity import MAX_REPEATS
from histoscale.cluster.failures import RunFailurePolicy, Yielded, describe_crash, diagnosis_in, explain
from histoscale.errors import RecipeError, RunError
from histoscale.observe.timeline import Kind

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


class FakeLine(ControllerLine):
    """A fake: a run that has made as many steps as it is told, without an actor."""

    def __init__(self) -> None:
        self.step = 0
        self.told: list[str] = []
        self.released = 0

    def release(self) -> None:
        self.released += 1

    def over(self, kind: Kind, why: str) -> int:
        self.told.append(f"{kind.value} {why}".strip())
        return self.step

    def wait(self, why: str) -> None:
        self.told.append(why)


def policy(line: FakeLine, crashes: int = 100, preemptions: int = 100) -> RunFailurePolicy:
    budgets = FailureConfig(max_failures=crashes, max_preemption_failures=preemptions)
    return RunFailurePolicy(budgets, line, line.release)


def crash(text: str = "out of memory") -> WorkerGroupError:
    return WorkerGroupError("a worker failed", {1: RuntimeError(text)})


def preemption() -> TrainingFailedError:
    return PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [0]}), drain_timed_out=True)


def test_a_diagnosis_is_found_wherever_it_is_wrapped() -> None:
    diagnosis = RecipeError("odd")
    outer = RuntimeError("outer")
    outer.__cause__ = ValueError("middle")
    outer.__cause__.__context__ = diagnosis
    assert diagnosis_in(outer) is diagnosis
    assert diagnosis_in(RuntimeError("none")) is None
    assert diagnosis_in(None) is None


def test_a_diagnosis_is_not_tried_again() -> None:
    assert policy(FakeLine()).make_decision(WorkerGroupError("", {0: RecipeError("odd")})) is RAISE


def test_an_attempt_that_ended_itself_costs_nothing() -> None:
    line = FakeLine()
    free = policy(line, crashes=0, preemptions=0)
    yielded = WorkerGroupError("", {0: Yielded(), 1: RuntimeError("connection closed by peer")})
    assert [free.make_decision(yielded) for _ in range(5)] == [RETRY] * 5
    assert line.told == ["restart"] * 5


def test_crashes_and_preemptions_have_budgets_of_their_own() -> None:
    line = FakeLine()
    both = policy(line, crashes=1, preemptions=2)
    assert [both.make_decision(preemption()) for _ in range(2)] == [RETRY, RETRY]
    assert both.make_decision(crash()) is RETRY
    line.step = 1
    assert both.make_decision(crash()) is RAISE
    assert both.make_decision(preemption()) is RAISE


def test_a_crash_that_repeats_at_the_same_step_ends_the_run_with_a_diagnosis() -> None:
    line = FakeLine()
    line.step = 7
    loop = policy(line)
    errors = [crash() for _ in range(MAX_REPEATS)]
    assert [loop.make_decision(error) for error in errors] == [RETRY] * (MAX_REPEATS - 1) + [RAISE]
    diagnosis = diagnosis_in(pickle.loads(pickle.dumps(errors[-1])))
    assert isinstance(diagnosis, RunError)
    assert re.search(r"failed 3 times in a row after step 7.*out of memory", str(diagnosis))
    assert line.told[-1] == "crash the workers failed: RuntimeError on rank 1: out of memory"


def test_progress_or_another_error_breaks_the_loop() -> None:
    line = FakeLine()
    lucky = policy(line)
    for step, text in [(7, "a"), (7, "a"), (8, "a"), (8, "b"), (8, "a"), (8, "a")]:
        line.step = step
        assert lucky.make_decision(crash(text)) is RETRY


def test_a_dead_worker_is_what_happened_whatever_the_others_tell_of_it() -> None:
    broken = RuntimeError("Connection closed by peer [127.0.0.1]:51234")
    dead = WorkerHealthCheckFailedError("a worker failed its health check", ActorDiedError())
    assert describe_crash(WorkerGroupError("", {0: broken, 1: dead})) == "a worker died (ActorDiedError)"
    assert "Connection closed" in describe_crash(WorkerGroupError("", {0: broken}))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (crash("killed"), r"failed more often than cluster.max_failures = 5 allows.*killed"),
        (WorkerGroupError("", {0: ActorDiedError()}), r"max_failures = 5.*a worker died \(ActorDiedError\)"),
        (WorkerGroupError("nobody knows\nwhy", {}), r"max_failures = 5.*why"),
        (preemption(), r"taken away more often than cluster.max_preemptions = 9"),
    ],
)
def test_a_run_without_a_diagnosis_names_its_budget(error: TrainingFailedError, said: str) -> None:
    explained = explain(error, 5, 9)
    assert isinstance(explained, RunError)
    assert re.search(said, str(explained))
    assert explained.transient == ("taken away" in said), "a spot market may have nodes again"


def test_a_diagnosis_is_what_the_run_ends_with() -> None:
    diagnosis = RecipeError("odd")
    assert explain(WorkerGroupError("", {0: diagnosis}), 5, 9) is diagnosis


def test_waiting_for_nodes_costs_nothing_and_is_no_crash() -> None:
    line = FakeLine()
    decide = policy(line, crashes=0, preemptions=0)
    for _ in range(50):
        assert decide.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2))) is FailureDecision.RETRY
    assert line.told == ["waiting for nodes that the workers fit on"] * 50
    assert line.released == 50, "readers of the attempt before must not take the workers' CPUs"
