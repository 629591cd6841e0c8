"""Which failures of a worker group are worth another attempt, and at whose expense."""

from collections.abc import Callable
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy, _is_preemption_failure
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from histoscale.cluster.control import ControllerLine
from histoscale.cluster.elasticity import MAX_REPEATS, CrashHistory
from histoscale.errors import HistoscaleError, RunError
from histoscale.observe.timeline import Kind

E = TypeVar("E", bound=BaseException)

_NO_RANK = -1
_REMEDY = "see the job's log for the reason, then run the same command again to resume from the last commit"


class Yielded(Exception):
    """The workers have committed and ended the attempt, as they were asked to: the next one begins where this ended."""


def found_in(error: BaseException | None, kind: type[E]) -> E | None:
    """The exception of a kind that a failure carries, wherever Ray has wrapped it, or None."""
    seen: set[int] = set()
    pending: list[object] = [error]
    while pending:
        found = pending.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        # What `ray.get` raises is of the cause's class too, but its text is a traceback.
        if isinstance(found, kind) and not isinstance(found, RayTaskError):
            return found
        if isinstance(found, WorkerGroupError):
            pending.extend(found.worker_failures.values())
        pending.extend(vars(found).values())
        pending.extend([found.__cause__, found.__context__])
    return None


def diagnosis_in(error: BaseException | None) -> HistoscaleError | None:
    """The diagnosis that a failure carries, wherever Ray has wrapped it, or None."""
    return found_in(error, HistoscaleError)


class RunFailurePolicy(DefaultFailurePolicy):
    """Ray's budgets, of crashes and of preemptions apart, for what another attempt may mend.

    A diagnosis ends the run at once, as another attempt would only repeat it; so does a crash that every attempt
    repeats at the same step. An attempt that ended itself to start again costs nothing.

    Nor does waiting for nodes: there is no telling when a spot market has some again.

    Args:
        failure_config: The budgets.
        line: To the run's control, which tells the driver what happened.
        release: Lets go of what the attempt that has ended holds of the cluster beside its workers.
    """

    def __init__(self, failure_config: FailureConfig, line: ControllerLine, release: Callable[[], None]) -> None:
        super().__init__(failure_config)
        self._line = line
        self._release = release
        self._crashes = CrashHistory()

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether there is another attempt."""
        self._release()
        if _waits_for_nodes(training_failed_error):
            self._line.wait("waiting for nodes that the workers fit on")
            return FailureDecision.RETRY
        if found_in(training_failed_error, Yielded) is not None:
            self._line.over(Kind.RESTART, "")
            return FailureDecision.RETRY
        if diagnosis_in(training_failed_error) is not None:
            return FailureDecision.RAISE
        if _is_preemption_failure(training_failed_error):
            self._line.over(Kind.PREEMPTION, "a node with workers was taken away before they could commit")
            return super().make_decision(training_failed_error)
        what = describe_crash(training_failed_error)
        step = self._line.over(Kind.CRASH, f"the workers failed: {what}")
        if isinstance(training_failed_error, WorkerGroupError) and self._crashes.repeats(step, what) >= MAX_REPEATS:
            # The driver looks for a diagnosis among the failures of the workers.
            training_failed_error.worker_failures[_NO_RANK] = RunError(
                f"the workers failed {MAX_REPEATS} times in a row after step {step}",
                value=what,
                expected="progress between two failures",
                remedy=_REMEDY,
            )
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def _waits_for_nodes(error: TrainingFailedError) -> bool:
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def describe_crash(error: TrainingFailedError) -> str:
    """What happened to the workers, in a line that is the same when it happens again.

    Where one has died, that is it: the others only tell of connections that broke.
    """
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    if not failures:
        return str(error).strip().splitlines()[-1]
    dead = [died for _, failure in sorted(failures.items()) if (died := found_in(failure, RayActorError)) is not None]
    if dead:
        return f"a worker died ({type(dead[0]).__name__})"
    rank, failure = min(failures.items())
    cause: Any = getattr(failure, "_base_exc", failure)
    return f"{type(cause).__name__} on rank {rank}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else ''}"


def explain(error: TrainingFailedError, max_failures: int, max_preemptions: int) -> Exception:
    """The diagnosis of a run whose workers failed for good."""
    diagnosis = diagnosis_in(error)
    if diagnosis is not None:
        return diagnosis
    preempted = _is_preemption_failure(error)
    what = "nodes were taken away" if preempted else "the workers failed"
    budget = f"cluster.max_preemptions = {max_preemptions}" if preempted else f"cluster.max_failures = {max_failures}"
    return RunError(
        f"{what} more often than {budget} allows",
        value=describe_crash(error),
        expected="nodes that stay longer" if preempted else "workers that live",
        remedy=_REMEDY,
        transient=preempted,
    )
