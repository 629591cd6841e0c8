"""Which failures of a worker group are worth another attempt: everything but a diagnosis."""

from collections.abc import Callable
from typing import Any

from ray.exceptions import RayTaskError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2.api.config import FailureConfig, RunConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from histoscale.errors import HistoscaleError


def diagnosis_in(error: BaseException | None) -> HistoscaleError | None:
    """The diagnosis that a failure carries, wherever Ray has wrapped it, or None."""
    seen: set[int] = set()
    pending: list[object] = [error]
    while pending:
        found = pending.pop(0)
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        seen.add(id(found))
        # What `ray.get` raises is of the cause's class too, but its text is a traceback.
        if isinstance(found, HistoscaleError) and not isinstance(found, RayTaskError):
            return found
        if isinstance(found, WorkerGroupError):
            pending.extend(found.worker_failures.values())
        pending.extend(vars(found).values())
        pending.extend([found.__cause__, found.__context__])
    return None


class DiagnosisEndsTheRun(DefaultFailurePolicy):
    """Ray's policy, but an error that another attempt would only repeat ends the run at once."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Raise on a diagnosis; leave every other failure to the budget of `cluster.max_failures`."""
        if diagnosis_in(training_failed_error) is not None:
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class ElasticTorchTrainer(TorchTrainer):
    """TorchTrainer with our failure policy in place of Ray's; takes TorchTrainer's keywords."""

    def __init__(self, train_loop: Callable[..., None], *, run_config: RunConfig, **keywords: Any) -> None:  # noqa: ANN401
        super().__init__(train_loop, run_config=run_config, **keywords)
        self._failures = run_config.failure_config or FailureConfig()

    def _initialize_and_run_controller(self, **keywords: Any) -> Any:  # noqa: ANN401 - Ray's own signature
        keywords["failure_policy"] = DiagnosisEndsTheRun(self._failures)
        return super()._initialize_and_run_controller(**keywords)
