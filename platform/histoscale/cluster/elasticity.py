"""When a run changes its size, and when it gives up: functions from what is known to a decision and its reason.

Every change of size is a restart of the workers, so it has a price; and a size is worth having only where it saves a
turn: V replicas on W workers take ceil(V / W) turns a step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_REPEATS = 3


def turns_of(workers: int, replicas: int) -> int:
    """Micro-steps of a step: ceil(V / W)."""
    return -(-replicas // workers)


def gaining_sizes(replicas: int, least: int, most: int) -> tuple[int, ...]:
    """The sizes from `least` to `most` that take fewer turns a step than any smaller one among them, ascending."""

    def sizes() -> Iterator[int]:
        fewest = replicas + 1
        for workers in range(least, min(most, replicas) + 1):
            if turns_of(workers, replicas) < fewest:
                fewest = turns_of(workers, replicas)
                yield workers

    return tuple(sizes())


def size_for(available: int, sizes: tuple[int, ...]) -> int | None:
    """The largest of some sizes that `available` workers allow; None where it allows none."""
    return max((workers for workers in sizes if workers <= available), default=None)


@dataclass(frozen=True)
class Outlook:
    """Where a run stands, as far as it was measured.

    Attributes:
        workers: Of the attempt that runs.
        step: Steps taken.
        steps: Of the whole run.
        step_s: Seconds a step takes at this size; None before it was measured.
        restart_s: Seconds from the last step of an attempt to the first of the next, when it last happened; before
            the first restart, those from the start of the run's job to its first step.
    """

    workers: int
    step: int
    steps: int
    step_s: float | None
    restart_s: float


@dataclass(frozen=True)
class Resize:
    """A change of size that repays itself, and why."""

    workers: int
    reason: str


def worthwhile(outlook: Outlook, target: int, replicas: int, horizon_s: float) -> Resize | None:
    """A larger size, if what it saves within the horizon, or until the end if that is nearer, repays the restart.

    Args:
        outlook: Of the run.
        target: The size in question.
        replicas: V.
        horizon_s: How long the larger size may be expected to last.
    """
    if outlook.step_s is None or target <= outlook.workers:
        return None
    now, then = turns_of(outlook.workers, replicas), turns_of(target, replicas)
    ahead_s = min(horizon_s, (outlook.steps - outlook.step) * outlook.step_s)
    saved_s = ahead_s * (1.0 - then / now)
    if saved_s <= outlook.restart_s:
        return None
    return Resize(
        target,
        f"from {outlook.workers} to {target} workers: {then} turns a step instead of {now} save {saved_s:.0f} s of the "
        f"next {ahead_s:.0f} s (cluster.resize_horizon_s, or the rest of the run), a restart takes "
        f"{outlook.restart_s:.0f} s",
    )


@dataclass
class CrashHistory:
    """The crashes of a run, to tell bad luck from an error that every attempt repeats."""

    _crashes: list[tuple[int, str]] = field(default_factory=list)

    def repeats(self, step: int, what: str) -> int:
        """Take note of a crash after `step` steps; how many in a row were of this step and this kind."""
        self._crashes.append((step, what))
        count = 0
        for crash in reversed(self._crashes):
            if crash != (step, what):
                break
            count += 1
        return count
