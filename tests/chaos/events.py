"""What can happen to a run: each event happens to a live cluster, and waits for evidence that the run has felt it.

An event that does nothing fails: its evidence is a line of the job's log that names it, a count of the proxy, or a
process in the place of one that was killed.
"""

import contextlib
import itertools
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.schedule import Kind
from tests.chaos.site import Site
from tests.chaos.watched import WatchedRun, step_of

from histoscale import seeding
from histoscale.bench.proxy import GIVEN_UP, STALLED
from histoscale.bench.watched_job import POLL_S, Line
from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.reader import latest_commit
from histoscale.observe.timeline import Kind as Told
from histoscale.observe.timeline import read_events
from histoscale.storage import Store

FELT_S = 120.0
"""Within this time whatever happens is found; a hang as well, for which libraries take 10 to 30 minutes."""
BACK_S = 400.0
RESUMED = r"resuming at step (\d+)"
RESTARTED = r"restarted on (\d+) workers in \d+ s, (\d+) steps done again"
SILENCE_S = 20.0
OUTAGE_S = 20.0
SLOW_S = 15.0
_NOTICE_S = 90.0
_STOPPED_SHARE, _PERIOD_S = 0.8, 0.25
_STALLS = 2


@dataclass(frozen=True)
class Outcome:
    """What an event did.

    Attributes:
        step: Steps done when it happened.
        felt_s: Seconds until the run showed that it had felt it.
        redone: Steps that were taken again.
        back_s: Seconds until the run trained as if nothing had been.
    """

    kind: Kind
    step: int
    felt_s: float
    redone: int
    back_s: float


@dataclass
class Chaos:
    """What an event has to hand.

    Attributes:
        store: The run folder.
        disk: Where the run folder lies on a disk of its own, if it does.
    """

    site: Site
    run: WatchedRun
    store: Store
    seed: int
    disk: Path | None = None
    _draws: Iterator[int] = field(default_factory=itertools.count)

    def draw(self, count: int) -> int:
        """A number below `count`."""
        return seeding.key(self.seed, "chaos draw", next(self._draws)) % count

    def happen(self, kind: Kind) -> Outcome:
        """Let it happen, and wait until the run is over it."""
        began_s, step = time.monotonic(), self.run.step
        felt, back, redone = _EVENTS[kind](self)
        return Outcome(kind, step, felt - began_s, redone, back - began_s)


Effect = tuple[float, float, int]
"""When it was felt, when the run was over it (monotonic seconds), and steps that were taken again."""


def _restarted(run: WatchedRun, felt: Line) -> Effect:
    """The effect of what ends the attempt that runs."""
    back = run.after(felt.number, RESTARTED, BACK_S)
    found = re.search(RESTARTED, back.text)
    return felt.time_s, back.time_s, int(found[2]) if found else 0


def _went_on(run: WatchedRun, felt_s: float, mark: int) -> Effect:
    """The effect of what ends no attempt; fails where one has ended since `mark`."""
    back = run.after(run.mark, r"^step \d+/", BACK_S)
    assert not run.holds(mark, f"the workers failed|{RESTARTED}"), run.text
    return felt_s, back.time_s, 0


def _wait_until(true: Callable[[], bool], what: str, timeout_s: float = FELT_S) -> float:
    """Wait; answers when it became true."""
    deadline_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)
    return time.monotonic()


def nodes_added(chaos: Chaos) -> Effect:
    """Two nodes: the run grows by one worker, and has a spare from then on."""
    mark = chaos.run.mark
    for _ in range(2):
        chaos.site.add_trainer_node()
    return _restarted(chaos.run, chaos.run.after(mark, "commit and start again: from 1 to 2 workers", FELT_S))


def worker_killed(chaos: Chaos) -> Effect:
    mark, workers = chaos.run.mark, chaos.site.trainers()
    workers[chaos.draw(len(workers))].kill()
    return _restarted(chaos.run, chaos.run.after(mark, "the workers failed: a worker died", FELT_S))


def reader_killed(chaos: Chaos) -> Effect:
    mark, readers = chaos.run.mark, chaos.site.readers()
    victim = readers[chaos.draw(len(readers))]
    victim.kill()
    before = {reader.pid for reader in readers}
    felt_s = _wait_until(
        lambda: any(reader.pid not in before for reader in chaos.site.readers()), "a reader in place of the killed one"
    )
    return _went_on(chaos.run, felt_s, mark)


def raylet_killed(chaos: Chaos) -> Effect:
    with _leaving_node(chaos) as (node, mark):
        chaos.site.kill_raylet(node)
        return _restarted(chaos.run, chaos.run.after(mark, _NODE_GONE, FELT_S))


def node_lost(chaos: Chaos) -> Effect:
    with _leaving_node(chaos) as (node, mark):
        chaos.site.kill_machine(node)
        return _restarted(chaos.run, chaos.run.after(mark, _NODE_GONE, FELT_S))


def node_drained(chaos: Chaos) -> Effect:
    with _leaving_node(chaos) as (node, mark):
        chaos.site.drain(node, _NOTICE_S)
        felt = chaos.run.after(mark, "commit and start again: node .* is taken away", FELT_S)
        effect = _restarted(chaos.run, felt)
        assert effect[2] == 0, f"steps were lost in spite of a notice\n{chaos.run.text}"
        chaos.site.kill_machine(node)
        return effect


_NODE_GONE = "a node with workers was taken away before they could commit|the workers failed"


@contextlib.contextmanager
def _leaving_node(chaos: Chaos) -> Iterator[tuple[object, int]]:
    """A node that a worker is on, and a mark; another one comes in its place."""
    nodes = chaos.site.busy_nodes()
    node = nodes[chaos.draw(len(nodes))]
    yield node, chaos.run.mark
    chaos.site.forget(node)
    chaos.site.add_trainer_node()


def driver_killed(chaos: Chaos) -> Effect:
    """The process of the job; the job is submitted again."""
    mark, run = chaos.run.mark, chaos.run
    chaos.site.driver().kill()
    felt_s = run.wait_for_resubmission(mark, FELT_S)
    resumed = run.after(mark, RESUMED, BACK_S)
    back = run.after(resumed.number, r"^step \d+/", BACK_S)
    found = re.search(RESUMED, resumed.text)
    return felt_s, back.time_s, _done(run, resumed) - int(found[1]) if found else 0


def _done(run: WatchedRun, until: Line) -> int:
    """Steps done before a line, committed or not."""
    return max(step for line in run.lines[: until.number] if (step := step_of(line)) is not None)


def worker_stopped(chaos: Chaos) -> Effect:
    """The process is there and does nothing: no connection ends, nothing is refused."""
    mark, workers = chaos.run.mark, chaos.site.trainers()
    workers[chaos.draw(len(workers))].suspend()
    felt = chaos.run.after(mark, "has given no sign of life for .* and is ended", FELT_S)
    return _restarted(chaos.run, chaos.run.after(felt.number, "the workers failed: a worker died", FELT_S))


def body_stalled(chaos: Chaos) -> Effect:
    """Half of a body, then silence: felt when the client has given the request up."""
    mark, counts = chaos.run.mark, chaos.site.switch.counts
    given_up = counts[GIVEN_UP]
    chaos.site.switch.spoil(STALLED, _STALLS)
    felt_s = _wait_until(lambda: counts[GIVEN_UP] >= given_up + _STALLS, "stalled bodies are given up")
    return _went_on(chaos.run, felt_s, mark)


def rank_slowed(chaos: Chaos) -> Effect:
    """A worker that gets a fifth of its time: the others wait for it, and nobody takes it for dead."""
    run, workers = chaos.run, chaos.site.trainers()
    usual = statistics.median(run.speeds(0)[-8:])
    mark, victim = run.mark, workers[chaos.draw(len(workers))]
    began_s = time.monotonic()
    while time.monotonic() < began_s + SLOW_S:
        victim.suspend()
        time.sleep(_STOPPED_SHARE * _PERIOD_S)
        victim.resume()
        time.sleep((1.0 - _STOPPED_SHARE) * _PERIOD_S)
    slow = [line.time_s for line in run.lines[mark:] if any(speed < 0.6 * usual for speed in _speed_of(line))]
    assert slow, f"no step was slower than usual ({usual} tiles/s)\n{run.text}"
    return _went_on(run, slow[0], mark)


def _speed_of(line: Line) -> list[float]:
    return [float(found) for found in re.findall(r"([\d.]+) tiles/s", line.text)]


def disk_filled(chaos: Chaos) -> Effect:
    """No checkpoint can be written, and the run goes on; when there is room again, the next one is."""
    assert chaos.disk is not None
    mark, ballast = chaos.run.mark, chaos.disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        _fill(file.fileno())
        felt = chaos.run.after(mark, "checkpoint of step .* was not committed: .* full", FELT_S)
    ballast.unlink()
    back = chaos.run.after(felt.number, "checkpoint committed", FELT_S)
    _, _, redone = _went_on(chaos.run, felt.time_s, mark)
    return felt.time_s, back.time_s, redone


def _fill(descriptor: int) -> None:
    for size_bytes in (2**20, 2**12, 1):
        with contextlib.suppress(OSError):
            while True:
                os.write(descriptor, bytes(size_bytes))


def s3_broken(chaos: Chaos) -> Effect:
    """Every request is refused or reset; felt with the first of them."""
    mark, switch = chaos.run.mark, chaos.site.switch
    kind = ("unavailable", "reset")[chaos.draw(2)]
    before = switch.counts[kind]
    with switch.outage(kind):
        felt_s = _wait_until(lambda: switch.counts[kind] > before, "a request to S3")
        time.sleep(OUTAGE_S)
    return _went_on(chaos.run, felt_s, mark)


def byte_flipped(chaos: Chaos) -> Effect:
    """In the newest checkpoint; the workers are killed to have it read. The run must go on from the one before."""
    run, mark = chaos.run, chaos.run.mark
    _wait_until(lambda: len(_newest_commits(chaos.store)) == 2, "two commits", BACK_S)
    workers = chaos.site.trainers()
    for worker in workers:
        worker.suspend()  # so that no newer one comes to be
    newest, before = _newest_commits(chaos.store)
    _flip(chaos, newest.folder + next(name for name in newest.sizes_bytes if name.endswith(".safetensors")))
    for worker in workers:
        worker.kill()
    felt = run.after(mark, f"checkpoint of step {newest.step} .*left out", BACK_S)
    back = run.after(felt.number, r"^step \d+/", BACK_S)
    resumed = [event.step for event in read_events(chaos.store) if event.kind is Told.RESUME]
    assert resumed[-1] == before.step, f"resumed at {resumed}\n{run.text}"
    return felt.time_s, back.time_s, _done(run, felt) - before.step


def _newest_commits(store: Store) -> list[Commit]:
    """The newest commit and the one before, if they are there."""
    newest = latest_commit(store)
    before = latest_commit(store, before=newest.step) if newest else None
    return [commit for commit in (newest, before) if commit]


def _flip(chaos: Chaos, key: str) -> None:
    data = bytearray(chaos.store.get(key))
    start = 8 + int.from_bytes(data[:8], "little")  # the header comes first
    data[start + chaos.draw(len(data) - start)] ^= 1 << chaos.draw(8)
    chaos.store.put(key, bytes(data))


_EVENTS: dict[Kind, Callable[[Chaos], Effect]] = {
    Kind.NODES_ADDED: nodes_added,
    Kind.WORKER_KILLED: worker_killed,
    Kind.READER_KILLED: reader_killed,
    Kind.RAYLET_KILLED: raylet_killed,
    Kind.DRIVER_KILLED: driver_killed,
    Kind.WORKER_STOPPED: worker_stopped,
    Kind.BODY_STALLED: body_stalled,
    Kind.RANK_SLOWED: rank_slowed,
    Kind.NODE_DRAINED: node_drained,
    Kind.NODE_LOST: node_lost,
    Kind.DISK_FILLED: disk_filled,
    Kind.S3_BROKEN: s3_broken,
    Kind.BYTE_FLIPPED: byte_flipped,
}


def table(outcomes: list[Outcome]) -> str:
    """The recoveries, as Markdown."""
    head = "| event | at step | felt after | steps again | over it after |\n|---|---|---|---|---|"
    rows = [
        f"| {one.kind.value} | {one.step} | {one.felt_s:.0f} s | {one.redone} | {one.back_s:.0f} s |"
        for one in outcomes
    ]
    return "\n".join([head, *rows])
