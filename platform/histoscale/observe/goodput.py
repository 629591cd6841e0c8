"""How much of a run's time went into steps that count, and where the rest went: pure.

Time is wall time from each start of a job to its stop or end. Between two events either nobody trained (starting,
restarting), or somebody did: of that, the committed steps say how much was useful and how much was waiting, the rest
went into steps that were taken again, or nobody knows (idle).
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from histoscale.observe.timeline import DOWNS, ENDS, Event, Kind

STEP_S, WAIT_S, STALL_S = "time/step_s", "time/wait_s", "time/stall_s"


class Phase(Enum):
    """What goes on between two events."""

    STARTING = "starting"
    TRAINING = "training"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Span:
    """A part of the wall time."""

    phase: Phase
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Restart:
    """One group of workers after another, within one job.

    Attributes:
        time_s: When the new group was ready.
        step: Where it went on.
        workers: Of the new group.
        reason: What had ended the group before.
        duration_s: From the last step of the group before, or from the event that ended it.
        steps_redone: None where nobody knows.
    """

    time_s: float
    step: int
    workers: int
    reason: str
    duration_s: float
    steps_redone: int | None


@dataclass(frozen=True)
class StepTimes:
    """The committed steps, each once; float64 [steps] of seconds.

    Attributes:
        step_s: From step to step.
        wait_s: Of that, waiting for tiles.
        stall_s: Of that, waiting for the checkpoint before the step.
    """

    step_s: NDArray[np.float64]
    wait_s: NDArray[np.float64]
    stall_s: NDArray[np.float64]

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, float]]) -> "StepTimes":
        """Of lines of metrics; steps that an earlier version measured have no stalls."""
        rows = [(line[STEP_S], min(line[WAIT_S], line[STEP_S]), line.get(STALL_S, 0.0)) for line in lines]
        columns = np.array(rows, np.float64).reshape(-1, 3).T
        return cls(columns[0], columns[1], columns[2])


@dataclass(frozen=True)
class Goodput:
    """What became of the time of a run; the parts sum to `wall_s`.

    Attributes:
        wall_s: From each start of a job to its end.
        useful_s: Committed steps, each counted once, without what they waited.
        starting_s: From a job's start to its first step.
        restarting_s: From the end of one group of workers to the first step of the next.
        redone_s: Steps that had to be taken again.
        waiting_s: Waiting for tiles.
        stalls_s: Waiting for checkpoints.
        idle_s: Nobody knows: a driver that died, a part of a step that was lost.
        stopped_s: Between two jobs, after a stop; no part of the wall time.
        restarts: One after the other.
        spans: What went on when.
    """

    wall_s: float
    useful_s: float
    starting_s: float
    restarting_s: float
    redone_s: float
    waiting_s: float
    stalls_s: float
    idle_s: float
    stopped_s: float = 0.0
    restarts: tuple[Restart, ...] = ()
    spans: tuple[Span, ...] = field(default=(), repr=False)

    @property
    def share(self) -> float:
        """Useful over wall time; 0 where there is none."""
        return self.useful_s / self.wall_s if self.wall_s > 0.0 else 0.0

    @property
    def lost(self) -> dict[str, float]:
        """Cause -> seconds of the wall time that were not useful."""
        return {
            "starting": self.starting_s,
            "restarting": self.restarting_s,
            "steps taken again": self.redone_s,
            "waiting for data": self.waiting_s,
            "checkpoint stalls": self.stalls_s,
            "idle or unknown": self.idle_s,
        }


def useful_s(line: Mapping[str, float]) -> float:
    """Seconds of one step, without what it waited."""
    return max(0.0, line.get(STEP_S, 0.0) - line.get(WAIT_S, 0.0) - line.get(STALL_S, 0.0))


def account(events: Sequence[Event], steps: StepTimes) -> Goodput:
    """What became of the time of a run.

    Args:
        events: By time.
        steps: The committed ones.
    """
    spans = _spans(events)
    restarts = _restarts(events)
    seconds = {phase: sum(span.end_s - span.start_s for span in spans if span.phase is phase) for phase in Phase}
    left_s = seconds[Phase.TRAINING]
    waiting_s = min(float(steps.wait_s.sum()), left_s)
    left_s -= waiting_s
    stalls_s = min(sum(event.stall_s or 0.0 for event in events if event.kind is Kind.COMMIT), left_s)
    left_s -= stalls_s
    # Clocks of several machines meet here: what was useful never exceeds what there was.
    useful = min(float(np.maximum(0.0, steps.step_s - steps.wait_s - steps.stall_s).sum()), left_s)
    left_s -= useful
    usual_step_s = statistics.median(steps.step_s.tolist()) if len(steps.step_s) else 0.0
    redone_s = min(sum(restart.steps_redone or 0 for restart in restarts) * usual_step_s, left_s)
    return Goodput(
        wall_s=sum(seconds.values()) - seconds[Phase.STOPPED],
        useful_s=useful,
        starting_s=seconds[Phase.STARTING],
        restarting_s=seconds[Phase.RESTARTING],
        redone_s=redone_s,
        waiting_s=waiting_s,
        stalls_s=stalls_s,
        idle_s=left_s - redone_s,
        stopped_s=seconds[Phase.STOPPED],
        restarts=restarts,
        spans=spans,
    )


def _spans(events: Sequence[Event]) -> tuple[Span, ...]:
    """What went on between the events, one after the other; a group that died in silence is told of by the next."""
    spans: list[Span] = []
    phase, since_s = Phase.STOPPED, events[0].time_s if events else 0.0
    for event in events:
        at_s = event.time_s
        if phase is Phase.TRAINING and event.kind is Kind.RESUME:
            silent_s = max(since_s, at_s - (event.restart_s or 0.0))
            spans.append(Span(phase, since_s, silent_s))
            phase, since_s = Phase.RESTARTING, silent_s
        next_phase = _phase_after(event.kind, phase)
        if next_phase is not phase:
            spans.append(Span(phase, since_s, at_s))
            phase, since_s = next_phase, at_s
    if events:
        spans.append(Span(phase, since_s, events[-1].time_s))
    return tuple(span for span in spans if span.end_s > span.start_s)


def _phase_after(kind: Kind, before: Phase) -> Phase:
    if kind in ENDS:
        return Phase.STOPPED
    if kind in DOWNS:
        return Phase.RESTARTING
    if kind is Kind.RESUME:
        return Phase.TRAINING
    # A job that begins while another one seems to train or start: that one died without a word.
    return Phase.STARTING if kind is Kind.START else before


def worker_s(events: Sequence[Event]) -> float:
    """Seconds for which workers were there to train, added up over the workers; waiting counts, starting does not."""
    total_s, workers, since_s = 0.0, 0, 0.0
    for event in events:
        if event.kind is Kind.RESUME or event.kind is Kind.START or event.kind in (*DOWNS, *ENDS):
            silent_s = (event.restart_s or 0.0) if event.kind is Kind.RESUME else 0.0
            total_s += workers * max(0.0, event.time_s - silent_s - since_s)
            workers, since_s = (event.workers if event.kind is Kind.RESUME else 0), event.time_s
    return total_s + (workers * (events[-1].time_s - since_s) if events else 0.0)


def _restarts(events: Sequence[Event]) -> tuple[Restart, ...]:
    found: list[Restart] = []
    trained, down = False, None
    for event in events:
        if event.kind in DOWNS:
            down = down or event
        elif event.kind is Kind.RESUME:
            if trained:
                known_s = event.time_s - down.time_s if down else 0.0
                duration_s = known_s if event.restart_s is None else event.restart_s
                reason = (down.reason or down.kind.value) if down else event.reason or "unknown"
                found.append(Restart(event.time_s, event.step, event.workers, reason, duration_s, event.steps_redone))
            trained, down = True, None
        elif event.kind in (Kind.START, *ENDS):
            trained, down = False, None
    return tuple(found)


class GoodputMeter:
    """The share of useful time while a run goes on; steps that are not committed yet count as useful.

    Args:
        useful_s: Of the steps that were committed before.
        wall_s: That the run has had so far.
        now_s: On a clock that never goes back.
    """

    def __init__(self, useful_s: float, wall_s: float, now_s: float) -> None:
        self._useful_s = useful_s
        self._begun_s = now_s - wall_s

    def add(self, line: Mapping[str, float], now_s: float) -> float:
        """Count a step; returns the share."""
        self._useful_s += useful_s(line)
        wall_s = now_s - self._begun_s
        return min(1.0, self._useful_s / wall_s) if wall_s > 0.0 else 0.0
