"""The wire between a run's driver, its workers and Ray's controller: wishes one way, progress and life signs back."""

import contextlib
import itertools
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from histoscale.cluster.elasticity import Outlook
from histoscale.observe.timeline import Kind
from histoscale.stream.faults import Fault

# A handle of the RunControl actor; its methods exist only at run time.
ControlHandle: TypeAlias = Any

BEAT_S = 5.0
_ANSWER_S = 5.0
_STEPS_TIMED = 20

_log = logging.getLogger(__name__)


class Wish(Enum):
    """What the driver wants of the workers."""

    GO_ON = "go on"
    COMMIT_AND_RESTART = "commit a checkpoint after this step and start again"
    COMMIT_AND_STOP = "commit a checkpoint after this step and stop"
    ABANDON = "stop at once and write nothing: another job has the run"

    @property
    def commits(self) -> bool:
        """Whether the workers end the attempt with a commit."""
        return self in (Wish.COMMIT_AND_RESTART, Wish.COMMIT_AND_STOP)


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
class Member:
    """A worker of the attempt that runs.

    Attributes:
        node_id: Where it is, as Ray names it.
        actor: Its handle, for a worker that must be ended from outside.
    """

    rank: int
    node_id: str
    actor: Any


@dataclass(frozen=True)
class News:
    """What became of an attempt.

    Attributes:
        text: For the log of the job; may be empty.
        kind: Of the event for the timeline; None for none.
        step: Steps that were done.
        workers: Of the attempt.
        reason: For the timeline.
    """

    text: str
    kind: Kind | None
    step: int
    workers: int
    reason: str


@dataclass(frozen=True)
class Told:
    """What the workers have told since the driver last asked.

    Attributes:
        news: What became of an attempt: why it ends, what a restart took.
        members: Of the attempt that runs.
        silent: Those of them that gave no sign of life for longer than the driver bears.
        quiet_s: Since these have begun, or have last told of a step; 0 while nothing runs.
    """

    progress: list[Progress]
    faults: list[Fault]
    news: list[News]
    members: list[Member]
    silent: list[Member]
    quiet_s: float = 0.0


class RunControl:
    """State that the driver, the workers and Ray's controller share; lives in an actor.

    Args:
        now: A clock that goes forward only.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._wish = Wish.GO_ON
        self._restart: tuple[Kind, str] | None = None
        self._progress: list[Progress] = []
        self._faults: list[Fault] = []
        self._news: list[News] = []
        self._attempts = 0
        self._attempt_over = True
        self._members: dict[int, tuple[Member, float]] = {}
        self._last: tuple[Progress, float] | None = None
        self._told_at_s: deque[float] = deque(maxlen=_STEPS_TIMED)
        self._restart_s = 0.0
        self._began_s = self._heard_s = now()

    def want(self, wish: Wish) -> None:
        """The driver's wish, which rank 0 learns with the answer to its next message."""
        self._wish = wish

    def ask_restart(self, kind: Kind, reason: str) -> None:
        """Have the attempt that runs commit and start again; what is asked twice is done once.

        Args:
            kind: RESIZE, or PREEMPTION_NOTICE for a node that is about to go.
            reason: For people.
        """
        if self._members and self._restart is None:
            self._restart = kind, reason
            self._report(
                f"the workers commit and start again: {reason}", kind if kind is Kind.PREEMPTION_NOTICE else None
            )

    def enlist(self, member: Member) -> int:
        """A worker has started; answers the number of its attempt.

        The first one after the end of an attempt begins the next, which ends what was asked of the one before.
        """
        if self._attempt_over:
            self._attempts, self._attempt_over = self._attempts + 1, False
            self._members, self._restart = {}, None
            self._told_at_s.clear()
            self._heard_s = self._now()
        self._members[member.rank] = (member, self._now())
        return self._attempts

    def beat(self, attempt: int, rank: int) -> None:
        """A sign of life."""
        if attempt == self._attempts and rank in self._members:
            self._members[rank] = (self._members[rank][0], self._now())

    def tell(self, progress: Progress) -> Wish:
        """Take note of progress; answers with what is wanted."""
        now_s = self._now()
        if self._last is None:
            self._restart_s = now_s - self._began_s
        elif not self._told_at_s:
            self._restart_s = now_s - self._last[1]
            redone = self._last[0].step + 1 - progress.step
            self._report(
                f"restarted on {len(self._members)} workers in {self._restart_s:.0f} s, {redone} steps done again", None
            )
        self._told_at_s.append(now_s)
        self._heard_s = now_s
        self._last = (progress, now_s)
        self._progress.append(progress)
        if self._wish is Wish.GO_ON and self._restart is not None:
            return Wish.COMMIT_AND_RESTART
        return self._wish

    def tell_faults(self, faults: Sequence[Fault]) -> None:
        """Take note of attempts that the content refused."""
        self._faults.extend(faults)

    def warn(self, text: str) -> None:
        """Take note of a warning, for the log of the job."""
        self._report(f"warning: {text}", None)

    def over(self, kind: Kind, why: str) -> int:
        """The attempt has ended; returns the last step that was told.

        Args:
            kind: CRASH, PREEMPTION, or RESTART for an attempt that ended itself as it was asked to.
            why: For people.
        """
        if kind is Kind.RESTART and self._restart is not None:
            asked, why = self._restart
            kind = Kind.RESIZE if asked is Kind.RESIZE else Kind.RESTART
            self._report("", kind, why)
        else:
            self._report(why, kind)
        self._end_attempt()
        return self._step()

    def wait(self, why: str) -> None:
        """Workers could not be started, for want of nodes, and are started again."""
        self._report(why, None)
        self._end_attempt()

    def last_step(self) -> tuple[int, float] | None:
        """Steps done when progress was last told, and the seconds since then; None before the first."""
        return (self._last[0].step, self._now() - self._last[1]) if self._last else None

    def outlook(self) -> Outlook | None:
        """Where the run stands; None while nothing runs."""
        if not self._members or self._last is None or not self._told_at_s:
            return None
        times = list(self._told_at_s)
        step_s = statistics.median(b - a for a, b in itertools.pairwise(times)) if len(times) > 2 else None
        last = self._last[0]
        return Outlook(len(self._members), last.step, last.steps, step_s, self._restart_s)

    def drain(self, silence_s: float) -> Told:
        """What was told since the last call, and who runs."""
        members = list(self._members.values())
        now_s = self._now()
        told = Told(
            self._progress,
            self._faults,
            self._news,
            [member for member, _ in members],
            [member for member, heard_s in members if now_s - heard_s > silence_s],
            now_s - self._heard_s if members else 0.0,
        )
        self._progress, self._faults, self._news = [], [], []
        return told

    def _report(self, text: str, kind: Kind | None, reason: str = "") -> None:
        self._news.append(News(text, kind, self._step(), len(self._members), reason or text))

    def _end_attempt(self) -> None:
        self._members, self._attempt_over = {}, True

    def _step(self) -> int:
        return self._last[0].step if self._last is not None else 0


def start_control() -> ControlHandle:
    """Start the actor on the driver's node; it takes no CPU and ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(RunControl).options(num_cpus=0, scheduling_strategy=here).remote()


class Pulse:
    """A worker's signs of life, from a thread of its own: a process that stands still has none.

    Args:
        control: Where they go.
        rank: The worker's.
    """

    def __init__(self, control: ControlHandle, rank: int) -> None:
        context = ray.get_runtime_context()
        self._control, self._rank = control, rank
        self._over = threading.Event()
        member = Member(rank, context.get_node_id(), context.current_actor)
        self._attempt: int = ray.get(control.enlist.remote(member))
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            self._control.beat.remote(self._attempt, self._rank)

    def stop(self) -> None:
        """The worker leaves by itself."""
        self._over.set()


@contextlib.contextmanager
def warnings_told(control: ControlHandle, rank: int) -> Iterator[None]:
    """Pass on what a worker warns of while the block lasts: its own log stays on its node."""
    line = _WarningsLine(control, rank)
    logger = logging.getLogger("histoscale")
    logger.addHandler(line)
    try:
        yield
    finally:
        logger.removeHandler(line)


class _WarningsLine(logging.Handler):
    """Sends warnings to the log of the job; nobody waits for them."""

    def __init__(self, control: ControlHandle, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._control, self._rank = control, rank

    def emit(self, record: logging.LogRecord) -> None:
        self._control.warn.remote(f"worker {self._rank}: {record.getMessage()}")


class ControllerLine:
    """The end of Ray's controller, which starts the workers; an answer that does not come is none."""

    def __init__(self, control: ControlHandle) -> None:
        self._control = control

    def over(self, kind: Kind, why: str) -> int:
        """The attempt has ended; returns the last step that was told, 0 where that is not known."""
        step: int | None = self._ask(self._control.over.remote(kind, why))
        return step or 0

    def wait(self, why: str) -> None:
        """Workers could not be started, for want of nodes, and are started again."""
        self._control.wait.remote(why)

    def outlook(self) -> Outlook | None:
        """Where the run stands, if it is known."""
        outlook: Outlook | None = self._ask(self._control.outlook.remote())
        return outlook

    def ask_resize(self, reason: str) -> None:
        """Have the attempt commit and start again at another size."""
        self._control.ask_restart.remote(Kind.RESIZE, reason)

    def _ask(self, answer: "ray.ObjectRef[Any]") -> Any:  # noqa: ANN401 - what the actor answers
        try:
            return ray.get(answer, timeout=_ANSWER_S)
        except (GetTimeoutError, RayActorError) as error:
            _log.warning("the run's control does not answer: %s", error)
            return None


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
