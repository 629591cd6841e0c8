"""What the driver does while the workers run: it shows progress, and passes on why they should stop or start again."""

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import ray
from ray._private.state import state
from ray.exceptions import RayError

from histoscale.cluster.bad_slides import BadSlides
from histoscale.cluster.control import ControlHandle, Member, Progress, Told, Wish
from histoscale.cluster.lease import Lease
from histoscale.observe.timeline import Event, Kind, Timeline

_POLL_S = 0.5
_log = logging.getLogger(__name__)
_NODES_EVERY_S = 2.0
_QUIET_S = 120.0


@dataclass(frozen=True)
class Watched:
    """What the driver looks at, and tells of, while the workers run.

    Attributes:
        silence_s: How long a worker may give no sign of life.
    """

    lease: Lease
    bad_slides: BadSlides
    silence_s: float
    timeline: Timeline
    tell: Callable[[str], None]


@contextlib.contextmanager
def watching(control: ControlHandle, watched: Watched) -> Iterator[None]:
    """Look at the workers every half second for as long as the block lasts; a SIGTERM has them commit and stop.

    Only the main thread of a process hears of signals; called from another, as a sweep does, none is waited for.
    """
    asked, done = threading.Event(), threading.Event()
    watch = _Watch(control, watched)

    def run() -> None:
        while not done.wait(_POLL_S):
            watch.look_again(asked.is_set())
        watch.look_again(asked.is_set(), last=True)

    def on_signal(number: int, frame: FrameType | None) -> None:
        asked.set()

    thread = threading.Thread(target=run, name="watch", daemon=True)
    hears = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, on_signal) if hears else None
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if hears:
            signal.signal(signal.SIGTERM, previous)


class _Watch:
    """What was seen so far, and what to do about what is seen next."""

    def __init__(self, control: ControlHandle, watched: Watched) -> None:
        self._control = control
        self._watched = watched
        self._printer = _ProgressPrinter(watched.tell)
        self._passed_on = Wish.GO_ON
        self._given_notice: set[str] = set()
        self._ended: set[str] = set()
        self._next_nodes_s = 0.0
        self._failing = False
        self._quiet_told_s = 0.0

    def look_again(self, stop_asked: bool, last: bool = False) -> None:
        """One look, which may fail: the next one is as good, and without any nobody would heed a notice.

        Args:
            stop_asked: Whether the job is to end.
            last: Whether it has ended, so that only what was told is shown.
        """
        try:
            if last:
                self.show(last=True)
            else:
                self._look(stop_asked)
        except (RayError, OSError, RuntimeError) as error:
            if not self._failing:
                _log.warning("the workers cannot be looked at, and are tried again: %s", error)
            self._failing = True
        else:
            self._failing = False

    def _look(self, stop_asked: bool) -> None:
        """What is wanted is passed on once."""
        stop = stop_asked or self._watched.bad_slides.error is not None
        wish = Wish.ABANDON if self._watched.lease.lost else Wish.COMMIT_AND_STOP if stop else Wish.GO_ON
        if wish is not self._passed_on:
            self._watched.tell(f"asking the workers to {wish.value}")
            ray.get(self._control.want.remote(wish))
            self._passed_on = wish
        told = self.show()
        self._end_the_silent(told.silent)
        self._tell_of_quiet(told.quiet_s)
        self._heed_notices(told.members)

    def show(self, last: bool = False) -> Told:
        """Tell what the workers told."""
        told: Told = ray.get(self._control.drain.remote(self._watched.silence_s))
        self._watched.bad_slides.take(told.faults)
        for news in told.news:
            if news.text:
                self._watched.tell(news.text)
            if news.kind is not None:
                self._watched.timeline.tell(Event(news.kind, time.time(), news.step, news.workers, news.reason))
        self._printer.show(told.progress, last)
        return told

    def _end_the_silent(self, silent: Sequence[Member]) -> None:
        """End workers that stand still: the others would wait for them until the libraries' time-outs."""
        for member in silent:
            name = member.actor._actor_id.hex()
            if name not in self._ended:
                self._ended.add(name)
                self._watched.tell(
                    f"worker {member.rank} has given no sign of life for {self._watched.silence_s:g} s and is ended"
                )
                ray.kill(member.actor)

    def _tell_of_quiet(self, quiet_s: float) -> None:
        """Say so where workers live and take no step, at longer and longer intervals: only a person can tell why."""
        if quiet_s < _QUIET_S:
            self._quiet_told_s = 0.0
        elif quiet_s >= 2.0 * self._quiet_told_s:
            self._quiet_told_s = quiet_s
            self._watched.tell(
                f"no step for {quiet_s:.0f} s, though every worker gives signs of life: they read the state, or wait "
                "for tiles, for each other or for the storage; `py-spy dump` on a worker's node tells which"
            )

    def _heed_notices(self, members: Sequence[Member]) -> None:
        """Have the workers commit and start again elsewhere before a node of theirs is taken away."""
        now_s = time.monotonic()
        if now_s < self._next_nodes_s:
            return
        self._next_nodes_s = now_s + _NODES_EVERY_S
        notices: dict[str, int] = state.get_draining_nodes()
        nodes = {member.node_id for member in members}
        for node_id, deadline_ms in notices.items():
            if node_id in nodes and node_id not in self._given_notice:
                self._given_notice.add(node_id)
                left = f" in {deadline_ms / 1e3 - time.time():.0f} s" if deadline_ms else ""
                self._control.ask_restart.remote(Kind.PREEMPTION_NOTICE, f"node {node_id[:8]} is taken away{left}")


class _ProgressPrinter:
    """At most one line in two seconds, and every committed step; steps that come again tell of a restart."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._next_s = 0.0
        self._last_step = 0
        self._first: tuple[int, float] | None = None

    def show(self, told: list[Progress], last: bool = False) -> None:
        for progress in told:
            now_s = time.monotonic()
            if progress.step <= self._last_step:
                self._tell(f"the workers were started again and go on from step {progress.step - 1}")
                self._first = None
            self._last_step = progress.step
            self._first = self._first or (progress.step, now_s)
            if progress.note or now_s >= self._next_s or (last and progress is told[-1]):
                self._next_s = now_s + 2.0
                self._tell(self._line(progress, now_s))

    def _line(self, progress: Progress, now_s: float) -> str:
        first_step, first_s = self._first or (progress.step, now_s)
        steps_done = progress.step - first_step
        eta = "" if not steps_done else _eta((now_s - first_s) / steps_done * (progress.steps - progress.step))
        losses = " ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
        note = f" | {progress.note}" if progress.note else ""
        return (
            f"step {progress.step}/{progress.steps} | {losses} | lr {progress.lr:.2e}"
            f" | {progress.tiles_per_s:.1f} tiles/s, {progress.wait_share:.0%} waiting{eta}{note}"
        )


def _eta(seconds: float) -> str:
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f" | ETA {hours}:{minutes:02d}:{seconds_left:02d}"
