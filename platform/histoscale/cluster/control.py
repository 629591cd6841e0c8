"""The wire between a run's driver and its workers: a stop that is asked for, and the progress that is shown."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from histoscale.stream.faults import Fault

# A handle of the RunControl actor; its methods exist only at run time.
ControlHandle: TypeAlias = Any


class Wish(Enum):
    """What the driver wants of the workers."""

    GO_ON = "go on"
    COMMIT_AND_STOP = "commit a checkpoint after this step and stop"
    ABANDON = "stop at once and write nothing: another job has the run"


@dataclass(frozen=True)
class Progress:
    """Where a run is, as rank 0 tells it after a step."""

    step: int
    steps: int
    losses: dict[str, float]
    lr: float
    tiles_per_s: float
    wait_share: float
    note: str = ""


@dataclass(frozen=True)
class Told:
    """What the workers have told since the driver last asked."""

    progress: list[Progress]
    faults: list[Fault]


class RunControl:
    """State that the driver and the workers share; lives in an actor."""

    def __init__(self) -> None:
        self._wish = Wish.GO_ON
        self._progress: list[Progress] = []
        self._faults: list[Fault] = []
        self._last: tuple[int, float] | None = None

    def want(self, wish: Wish) -> None:
        """The driver's wish, which rank 0 learns with the answer to its next message."""
        self._wish = wish

    def tell(self, progress: Progress) -> Wish:
        """Take note of progress; answers with the driver's wish."""
        self._progress.append(progress)
        self._last = progress.step, time.monotonic()
        return self._wish

    def tell_faults(self, faults: Sequence[Fault]) -> None:
        """Take note of attempts that the content refused."""
        self._faults.extend(faults)

    def last_step(self) -> tuple[int, float] | None:
        """Steps done when progress was last told, and the seconds since then; None before the first."""
        return (self._last[0], time.monotonic() - self._last[1]) if self._last else None

    def drain(self) -> Told:
        """What was told since the last call."""
        told = Told(self._progress, self._faults)
        self._progress, self._faults = [], []
        return told


def start_control() -> ControlHandle:
    """Start the actor on the driver's node; it takes no CPU and ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(RunControl).options(num_cpus=0, scheduling_strategy=here).remote()


class ControlLine:
    """Rank 0's end of the wire; never waits for the driver."""

    def __init__(self, control: ControlHandle) -> None:
        self._control = control
        self._answers: list[ray.ObjectRef[Wish]] = []
        self.wish = Wish.GO_ON

    def tell(self, progress: Progress) -> None:
        """Send progress, and take in the answers to earlier messages."""
        self._answers.append(self._control.tell.remote(progress))
        ready, self._answers = ray.wait(self._answers, num_returns=len(self._answers), timeout=0)
        for answer in ready:
            self.wish = ray.get(answer)
