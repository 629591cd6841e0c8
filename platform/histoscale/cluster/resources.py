"""What a run needs of the cluster, and waiting until it is there."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from histoscale.config.running import ClusterSection
from histoscale.errors import ClusterError
from histoscale.stream.windows import PLANNER_CPUS

_POLL_S = 2.0
_ACCELERATOR_LABEL = "ray.io/accelerator-type"


def resolve_device(cluster: ClusterSection) -> str:
    """`cuda` or `cpu`: as the recipe says, or by what the cluster has now."""
    if cluster.device != "auto":
        return cluster.device
    return "cuda" if _resources().get("GPU", 0.0) >= 1.0 else "cpu"


def worker_resources(cluster: ClusterSection, device: str) -> dict[str, float]:
    """CPUs, and with CUDA the GPU, of one worker."""
    return {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if device == "cuda" else {})


def trainer_nodes(device: str) -> dict[str, str]:
    """Label selector of the nodes that the trainers are on: those with a GPU, by Ray's own label; empty on CPUs."""
    if device != "cuda":
        return {}
    kinds = {node["Labels"].get(_ACCELERATOR_LABEL) for node in _nodes() if node["Alive"]} - {None}
    return {_ACCELERATOR_LABEL: f"in({','.join(sorted(kinds))})"} if kinds else {}


def needed_resources(cluster: ClusterSection, device: str) -> dict[str, float]:
    """CPUs and GPUs that the workers, the readers and the task that lists the plan take together."""
    needed: Counter[str] = Counter()
    for bundle in _bundles(cluster, device):
        needed.update(bundle)
    return dict(needed)


def wait_for_resources(
    cluster: ClusterSection, device: str, tell: Callable[[str], None], poll_s: float = _POLL_S
) -> None:
    """Ask an autoscaler for what is missing, and wait until it is there.

    Raises:
        ClusterError: It was not there within `cluster.start_timeout_s`.
    """
    needed = needed_resources(cluster, device)
    deadline_s = time.monotonic() + cluster.start_timeout_s
    asked = False
    while missing := _missing(needed):
        if not asked:
            request_resources(bundles=_bundles(cluster, device))
            tell(f"waiting up to {cluster.start_timeout_s:g} s for {missing} more")
            asked = True
        if time.monotonic() >= deadline_s:
            raise ClusterError(
                "the cluster is too small for the run",
                value=f"{missing} missing after {cluster.start_timeout_s:g} s",
                expected=" and ".join(f"{count:g} {name}" for name, count in needed.items()),
                remedy="add nodes, or lower cluster.workers, cluster.cpus_per_worker or cluster.readers with --set",
            )
        time.sleep(poll_s)
    if asked:
        request_resources(bundles=[])  # from here on the trainer and the stream ask for themselves


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _missing(needed: dict[str, float]) -> str:
    there = _resources()
    short = {name: count - there.get(name, 0.0) for name, count in needed.items()}
    return " and ".join(f"{count:g} {name}" for name, count in short.items() if count > 0)


def _bundles(cluster: ClusterSection, device: str) -> list[dict[str, float]]:
    workers = [worker_resources(cluster, device)] * cluster.worker_bounds[0]
    return workers + [{"CPU": 1.0}] * (cluster.reader_bounds[0] + math.ceil(PLANNER_CPUS))
