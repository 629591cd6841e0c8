"""How Ray Train's controller sizes the workers of an elastic run: what is there, and what is worth a restart."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

import ray
from ray._private.state import state
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus, WorkerGroupState
from ray.train.v2.api.config import ScalingConfig

from histoscale.cluster.control import ControllerLine
from histoscale.cluster.elasticity import gaining_sizes, size_for, worthwhile


class GainingSizes(ElasticScalingPolicy):
    """Ray's elastic policy, but only sizes that save a turn count, and only those that repay a restart are taken.

    A size is never changed under the workers: they are asked to commit and to end the attempt themselves, so that no
    step is lost; the next attempt starts with what is there.

    Args:
        scaling_config: Bounds and resources of the workers.
        replicas: V.
        horizon_s: See `worthwhile`.
        line: To the run's control.
    """

    def __init__(self, scaling_config: ScalingConfig, replicas: int, horizon_s: float, line: ControllerLine) -> None:
        super().__init__(scaling_config)
        self._replicas = replicas
        self._horizon_s = horizon_s
        self._line = line
        self._sizes = gaining_sizes(replicas, scaling_config.min_workers, scaling_config.max_workers)

    def _get_num_workers_for_resource_request(self) -> int:
        return self._sizes[-1]

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        staying = on_staying_nodes(reserved_resources, nodes, state.get_draining_nodes())
        return size_for(super()._count_possible_workers(staying), self._sizes) or 0

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Ask the workers to end the attempt where a larger size repays that; never resize under them."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            self._consider(decision.num_workers)
        return NoopDecision()

    def _consider(self, target: int) -> None:
        outlook = self._line.outlook()
        if outlook is not None:
            resize = worthwhile(outlook, target, self._replicas, self._horizon_s)
            if resize is not None:
                self._line.ask_resize(resize.reason)


def on_staying_nodes(
    reserved: Mapping[str, dict[str, float]], nodes: Iterable[Mapping[str, Any]], going: Container[str]
) -> dict[str, dict[str, float]]:
    """Of the resources that Ray's coordinator has reserved, by node id, those of nodes that live and are to stay.

    It looks every 20 s, and counts nodes that are about to go; workers that are put there wait for a minute in vain.
    """
    staying = {node["NodeID"] for node in nodes if node["Alive"] and node["NodeID"] not in going}
    return {node_id: resources for node_id, resources in reserved.items() if node_id in staying}
