"""Goodput on spot nodes, as an estimate: a simulation of weeks from parts that are measured, computed or assumed."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from histoscale.bench.figure import Figure
from histoscale.cluster.goodput import GoodputParts, simulate

_DURATION_S = 30 * 86_400.0
_SEEDS = 5

# A run of virchow2.yaml; docs/benchmarks/README.md says where each number comes from.
_TILES = 4096
_TILES_PER_S_GPU = 90.0
_PARAMETERS = 0.73e9
_STATE_BYTES = 16 * _PARAMETERS  # weights, two moments and the average in fp32
_EVERY_STEPS = 1000
_COPY_BYTES_PER_S_GPU = 10e9
_UPLOAD_BYTES_PER_S_NODE = 1e9
_MEASURED_RESTART_S = 12.0
_CAUTIOUS_RESTART_S = 60.0
_PREEMPTED_EVERY_S = 600.0
_NOTICE_S = 120.0
_REPLACEMENT_S = 300.0


@dataclass(frozen=True)
class Fleet:
    """The GPUs of a run, and how many of them a node has."""

    gpus: int
    gpus_per_node: int


_FLEETS = (Fleet(8, 1), Fleet(8, 8), Fleet(64, 8), Fleet(512, 8))


def goodput() -> Iterator[Figure]:
    """`goodput.share` of fleets of which a node is preempted every ten minutes, by what a restart takes."""
    for restart_s in (_MEASURED_RESTART_S, _CAUTIOUS_RESTART_S):
        for fleet in _FLEETS:
            yield _estimate(fleet, restart_s)


def _estimate(fleet: Fleet, restart_s: float) -> Figure:
    parts = parts_for(fleet, restart_s)
    runs = [simulate(parts, _DURATION_S, seed) for seed in range(_SEEDS)]
    shares = [run.share for run in runs]
    first = runs[0]
    details = {
        "estimate": True,
        **asdict(fleet),
        "parts": asdict(parts),
        "shares": [round(share, 4) for share in shares],
        "work_share": round(sum(run.work_share for run in runs) / _SEEDS, 4),
        "lost_s": {name: round(getattr(first, f"{name}_s")) for name in ("restarting", "redone", "stalls", "idle")},
        "preemptions": first.preemptions,
        "restarts": first.restarts,
    }
    return Figure("goodput.share", sum(shares) / _SEEDS, "share", details=details)


def parts_for(fleet: Fleet, restart_s: float) -> GoodputParts:
    """The parts of a run on some GPUs; every rank copies and every node uploads its share of the state."""
    nodes = fleet.gpus // fleet.gpus_per_node
    step_s = _TILES / (_TILES_PER_S_GPU * fleet.gpus)
    snapshot_s = _STATE_BYTES / fleet.gpus / _COPY_BYTES_PER_S_GPU
    upload_s = _STATE_BYTES / nodes / _UPLOAD_BYTES_PER_S_NODE
    return GoodputParts(
        nodes=nodes,
        commit_every_s=_EVERY_STEPS * step_s,
        stall_s=snapshot_s,
        jit_s=step_s + snapshot_s + upload_s,
        restart_s=restart_s,
        preempted_every_s=_PREEMPTED_EVERY_S,
        notice_s=_NOTICE_S,
        replacement_s=_REPLACEMENT_S,
    )
