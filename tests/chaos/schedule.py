"""What happens to a run, and at which step: a pure function of the seed."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from histoscale import seeding


class Kind(Enum):
    """What can happen; the values are for the table."""

    NODES_ADDED = "nodes are added"
    WORKER_KILLED = "SIGKILL of a worker"
    READER_KILLED = "SIGKILL of a reader"
    RAYLET_KILLED = "SIGKILL of a raylet"
    DRIVER_KILLED = "SIGKILL of the driver"
    WORKER_STOPPED = "SIGSTOP of a worker"
    BODY_STALLED = "S3 bodies that stall"
    RANK_SLOWED = "a rank made slow"
    NODE_DRAINED = "a node taken away with notice"
    NODE_LOST = "a node taken away without notice"
    DISK_FILLED = "a full checkpoint disk"
    S3_BROKEN = "S3 broken"
    BYTE_FLIPPED = "a flipped byte in the newest checkpoint"


@dataclass(frozen=True)
class Planned:
    """One thing that is to happen, at a step or soon after."""

    step: int
    kind: Kind


FIRST_SHARE, LAST_SHARE = 0.08, 0.9
"""Between which parts of the run things happen: its first commits come before, and its end is its own."""


def schedule(seed: int, steps: int, kinds: Iterable[Kind]) -> tuple[Planned, ...]:
    """Each kind once, at steps spread over the run, in an order that the seed decides.

    Nodes come first where any come: what follows has more than one worker to choose from.

    Args:
        seed: Of the draws.
        steps: Of the run.
        kinds: What is to happen.
    """
    order = sorted(kinds, key=lambda kind: (kind is not Kind.NODES_ADDED, seeding.key(seed, "chaos", kind.name)))
    first, last = steps * FIRST_SHARE, steps * LAST_SHARE
    gap = (last - first) / len(order)
    return tuple(
        Planned(int(first + gap * (place + _uniform(seed, kind) / 2.0)), kind) for place, kind in enumerate(order)
    )


def _uniform(seed: int, kind: Kind) -> float:
    return seeding.key(seed, "chaos step", kind.name) / 2.0**64
