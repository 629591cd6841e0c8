"""What a run needs of the cluster, and waiting until it is there."""

import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from histoscale.config.running import ClusterSection
from histoscale.errors import ClusterError
from histoscale.stream.windows import PLANNER_CPUS

_POLL_S = 2.0
_AT_ONCE_S = 1.0  # a cluster that has the room gives it within this time
_ACCELERATOR_LABEL = "ray.io/accelerator-type"


def resolve_device(cluster: ClusterSection, precision: str) -> str:
    """`cuda` or `cpu`: as the recipe says, or by what the cluster has now.

    Args:
        cluster: Of the recipe.
        precision: That of the run, where it was begun, else of its recipe.

    Raises:
        ClusterError: It is left to the cluster, which has no node yet, or none with a GPU for a run that computes in
            bf16: on CPUs such a run would take weeks without a word.
    """
    if cluster.device != "auto":
        return cluster.device
    there = _resources()
    if there.get("GPU", 0.0) >= 1.0:
        return "cuda"
    if there.get("CPU", 0.0) < 1.0:
        raise ClusterError(
            "no node of the cluster tells what to train on",
            value=f"cluster.device={cluster.device}, {there.get('CPU', 0.0):g} CPU and no GPU",
            expected="the device by name where nodes come only when they are asked for",
            remedy="run again with --set cluster.device=cuda, or =cpu: the autoscaler is then asked for such nodes",
        )
    if precision == "bf16":
        raise ClusterError(
            "no node with a GPU is there for a run in bf16",
            value=f"cluster.device={cluster.device}",
            expected="the device by name where nodes come only when they are asked for",
            remedy="run again with --set cluster.device=cuda, or =cpu to compute on CPUs all the same",
        )
    return "cpu"


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
    """Wait until the run's least size fits what is free, for which an autoscaler adds nodes.

    A placement group asks for it, and goes when it has got it: from then on the trainer and the stream ask for
    themselves. Nodes that came first are not idle when the last one comes: the group was on all of them.

    Raises:
        ClusterError: There was no room within `cluster.start_timeout_s`.
    """
    bundles = _bundles(cluster, device)
    deadline_s = time.monotonic() + cluster.start_timeout_s
    room = placement_group(bundles, strategy="PACK")
    try:
        if room.wait(_AT_ONCE_S):
            return
        lacking = _lacking(cluster, device)
        tell(f"waiting up to {cluster.start_timeout_s:g} s for {lacking}: the run begins with {_described(bundles)}")
        while not room.wait(poll_s):
            if time.monotonic() >= deadline_s:
                raise ClusterError(
                    "the cluster is too small for the run",
                    value=f"{_lacking(cluster, device)} missing after {cluster.start_timeout_s:g} s",
                    expected=_described(bundles),
                    remedy="add nodes, give the head more with `ray start --num-cpus`, or lower cluster.workers, "
                    "cluster.cpus_per_worker or cluster.readers with --set",
                    transient=True,  # nodes may come later
                )
    finally:
        remove_placement_group(room)


def _described(bundles: list[dict[str, float]]) -> str:
    """Such as `2 x (2 CPU, 1 GPU) and 3 x (1 CPU)`."""
    counts = Counter(", ".join(f"{count:g} {name}" for name, count in bundle.items()) for bundle in bundles)
    return " and ".join(f"{times} x ({what})" for what, times in counts.items())


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _lacking(cluster: ClusterSection, device: str) -> str:
    """What there is too little of, or, where there is enough, that others have it or that it lies apart."""
    there = _resources()
    short = {name: count - there.get(name, 0.0) for name, count in needed_resources(cluster, device).items()}
    missing = [f"{count:g} {name}" for name, count in short.items() if count > 0]
    return f"{' and '.join(missing)} more" if missing else "room that others have"


def _bundles(cluster: ClusterSection, device: str) -> list[dict[str, float]]:
    workers = [worker_resources(cluster, device)] * cluster.worker_bounds[0]
    return workers + [{"CPU": 1.0}] * (cluster.reader_bounds[0] + math.ceil(PLANNER_CPUS))
