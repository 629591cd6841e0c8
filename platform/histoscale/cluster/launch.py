"""The start of a run's workers under Ray Train, and what is made of their end."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from histoscale.cluster.control import ControllerLine, start_control
from histoscale.cluster.failures import RunFailurePolicy, explain
from histoscale.cluster.resources import worker_resources
from histoscale.cluster.scaling import GainingSizes
from histoscale.cluster.watching import Watched, watching
from histoscale.cluster.worker import WorkerSpec, train_worker
from histoscale.config.recipe import Recipe
from histoscale.sampling.tile_groups import SlideStrata
from histoscale.stream.windows import FeedMasterHandle, FeedSpec, start_feed

_RESIZE_CHECK_S = 10.0


@dataclass(frozen=True)
class Policies:
    """What decides on restarts and sizes in place of Ray's own policies."""

    recipe: Recipe
    failures: FailureConfig
    scaling: ScalingConfig
    line: ControllerLine
    feed_master: FeedMasterHandle

    def release_feed(self) -> None:
        """Let the readers of an attempt that has ended go."""
        self.feed_master.release.remote()


class ElasticTorchTrainer(TorchTrainer):
    """TorchTrainer with our policies in place of Ray's; takes TorchTrainer's keywords."""

    def __init__(self, train_loop: Callable[..., None], policies: Policies, **keywords: Any) -> None:  # noqa: ANN401
        super().__init__(train_loop, scaling_config=policies.scaling, **keywords)
        self._policies = policies

    def _initialize_and_run_controller(self, **keywords: Any) -> Any:  # noqa: ANN401 - Ray's own signature
        policies = self._policies
        keywords["failure_policy"] = RunFailurePolicy(policies.failures, policies.line, policies.release_feed)
        if policies.scaling.elasticity_enabled:
            recipe = policies.recipe
            keywords["scaling_policy"] = GainingSizes(
                policies.scaling, recipe.batch.replicas, recipe.cluster.resize_horizon_s, policies.line
            )
        return super()._initialize_and_run_controller(**keywords)


def run_workers(
    run_uri: str, recipe: Recipe, device: str, start: int, feed: FeedSpec, strata: SlideStrata, watched: Watched
) -> None:
    """Train from step `start` until the workers are done, through every restart.

    Raises:
        HistoscaleError: What no other attempt would mend, or more failures than the recipe allows.
    """
    control, cluster, feed_master = start_control(), recipe.cluster, start_feed(feed)
    token = watched.lease.token
    spec = WorkerSpec(
        recipe, run_uri, device, feed, feed_master, control, committed_step=start, lease_token=token, strata=strata
    )
    failures = FailureConfig(
        max_failures=cluster.max_failures,
        max_preemption_failures=cluster.max_preemptions,
        controller_failure_limit=cluster.max_failures,  # Ray tries for ever to start workers unless it is given a limit
    )
    scaling = ScalingConfig(
        num_workers=cluster.workers,
        use_gpu=device == "cuda",
        resources_per_worker=worker_resources(cluster, device),
        elastic_resize_monitor_interval_s=_RESIZE_CHECK_S,
    )
    with tempfile.TemporaryDirectory(prefix="histoscale-train-") as scratch, watching(control, watched):
        trainer = ElasticTorchTrainer(
            train_worker,
            Policies(recipe, failures, scaling, ControllerLine(control), feed_master),
            train_loop_config={"spec": spec},
            torch_config=TorchConfig(backend="nccl" if device == "cuda" else "gloo"),
            run_config=RunConfig(name="attempt", storage_path=scratch, failure_config=failures),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise explain(error, cluster.max_failures, cluster.max_preemptions) from error
