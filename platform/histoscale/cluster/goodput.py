"""What share of its time a run on spot nodes would spend on steps that count: a simulation, and closed forms.

Pure: from measured or assumed parts to an estimate, the same for the same seed. Nodes are preempted at random, and each
loss costs a just-in-time checkpoint, a restart, and for a while the node itself.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GoodputParts:
    """What an estimate is made of.

    Attributes:
        nodes: That the run wants.
        commit_every_s: Training between two commits.
        stall_s: For which the steps wait at a commit.
        jit_s: From a notice to a committed checkpoint: the step in flight, the snapshot and the upload.
        restart_s: From the end of one group of workers to the first step of the next.
        preempted_every_s: Mean time between two preemptions of a node, of all nodes together.
        notice_s: From a notice to the loss of the node; 0 is none.
        replacement_s: From the notice until another node is there.
    """

    nodes: int
    commit_every_s: float
    stall_s: float
    jit_s: float
    restart_s: float
    preempted_every_s: float
    notice_s: float = 120.0
    replacement_s: float = 0.0


@dataclass(frozen=True)
class GoodputEstimate:
    """What became of the simulated time; useful and lost parts sum to `wall_s`.

    Attributes:
        wall_s: Simulated.
        useful_s: Training that was committed.
        restarting_s: Of restarts, also of those that a further preemption cut short.
        redone_s: Training that was lost.
        stalls_s: Waiting for checkpoints, just-in-time ones included.
        idle_s: Without any node.
        work_share: Work done, in the work of all nodes without any disturbance.
        preemptions: How many there were.
        restarts: How many there were, those for a node that came back included.
    """

    wall_s: float
    useful_s: float
    restarting_s: float
    redone_s: float
    stalls_s: float
    idle_s: float
    work_share: float
    preemptions: int
    restarts: int

    @property
    def share(self) -> float:
        """Useful over wall time, on however many nodes there were."""
        return self.useful_s / self.wall_s


def simulate(parts: GoodputParts, duration_s: float, seed: int) -> GoodputEstimate:
    """Play a run for at least `duration_s`; it ends with a commit."""
    run = _Run(parts, seed)
    while run.now_s < duration_s or run.uncommitted_s > 0.0:
        run.advance()
    return run.estimate()


def daly_interval_s(commit_s: float, mtbf_s: float) -> float:
    """Training between two commits that loses least to commits and to failures without notice.

    Daly's higher-order estimate (Future Generation Computer Systems 22, 2006); Young's is its first term.

    Args:
        commit_s: For which the steps wait at a commit.
        mtbf_s: Mean time between failures of the whole run.
    """
    if commit_s >= 2.0 * mtbf_s:
        return mtbf_s
    ratio = commit_s / (2.0 * mtbf_s)
    return math.sqrt(2.0 * commit_s * mtbf_s) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - commit_s


def expected_share(interval_s: float, commit_s: float, restart_s: float, mtbf_s: float) -> float:
    """Share of useful time under failures without notice, by the closed form for a Poisson process.

    A failure loses what was not committed, and may strike a commit or a restart, too.
    """
    segment_s = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + commit_s) / mtbf_s)
    return interval_s / segment_s


class _Run:
    """A run as it is played."""

    def __init__(self, parts: GoodputParts, seed: int) -> None:
        self._parts = parts
        self._draws = np.random.default_rng(seed)
        self.now_s = 0.0
        self.uncommitted_s = 0.0
        self._uncommitted_work = 0.0
        self._nodes = parts.nodes
        self._arrivals_s: list[float] = []
        self._next_loss_s = self._later()
        self._spent = dict.fromkeys(("useful", "restarting", "redone", "stalls", "idle", "work"), 0.0)
        self._preemptions = self._restarts = 0

    def advance(self) -> None:
        """Train until something happens, and deal with it."""
        until_commit_s = self._parts.commit_every_s - self.uncommitted_s
        until_loss_s = max(0.0, self._next_loss_s - self.now_s)
        until_arrival_s = max(0.0, self._arrivals_s[0] - self.now_s) if self._arrivals_s else math.inf
        trained_s = min(until_commit_s, until_loss_s, until_arrival_s)
        self._train(trained_s)
        if trained_s == until_loss_s:
            self._lose_a_node()
        elif trained_s == until_commit_s:
            self._commit()
        elif self._commit():
            self._restart()

    def estimate(self) -> GoodputEstimate:
        """What became of the time so far."""
        spent, wall_s = self._spent, self.now_s
        return GoodputEstimate(
            wall_s=wall_s,
            useful_s=spent["useful"],
            restarting_s=spent["restarting"],
            redone_s=spent["redone"],
            stalls_s=spent["stalls"],
            idle_s=spent["idle"],
            work_share=spent["work"] / wall_s,
            preemptions=self._preemptions,
            restarts=self._restarts,
        )

    def _later(self) -> float:
        return self.now_s + float(self._draws.exponential(self._parts.preempted_every_s))

    def _spend(self, what: str, seconds: float) -> None:
        self._spent[what] += seconds
        self.now_s += seconds

    def _train(self, seconds: float) -> None:
        self.now_s += seconds
        self.uncommitted_s += seconds
        self._uncommitted_work += seconds * self._nodes / self._parts.nodes

    def _settle(self, what: str) -> None:
        """Say what the training since the last commit was."""
        self._spent[what] += self.uncommitted_s
        if what == "useful":
            self._spent["work"] += self._uncommitted_work
        self.uncommitted_s = self._uncommitted_work = 0.0

    def _commit(self) -> bool:
        """Commit, unless a preemption comes first."""
        if self._next_loss_s < self.now_s + self._parts.stall_s:
            self._spend("stalls", max(0.0, self._next_loss_s - self.now_s))
            self._lose_a_node()
            return False
        self._spend("stalls", self._parts.stall_s)
        self._settle("useful")
        return True

    def _lose_a_node(self) -> None:
        self._preempt()
        if self._parts.jit_s <= self._parts.notice_s:
            self._spend("stalls", self._parts.jit_s)
            self._settle("useful")
        else:
            self._train(self._parts.notice_s)
            self._settle("redone")
        self._restart()

    def _preempt(self) -> None:
        self._preemptions += 1
        self._nodes -= 1
        self._arrivals_s.append(self.now_s + self._parts.replacement_s)
        self._next_loss_s = self._later()

    def _restart(self) -> None:
        """Start the workers on the nodes that are there, again where that is cut short."""
        while True:
            self._take_arrivals()
            self._restarts += 1
            if self._next_loss_s >= self.now_s + self._parts.restart_s:
                self._spend("restarting", self._parts.restart_s)
                return
            self._spend("restarting", max(0.0, self._next_loss_s - self.now_s))
            self._preempt()

    def _take_arrivals(self) -> None:
        if not self._nodes:
            self._spend("idle", max(0.0, self._arrivals_s[0] - self.now_s))
            self._next_loss_s = max(self._next_loss_s, self._later())  # nobody was there to be preempted
        here = [at_s for at_s in self._arrivals_s if at_s <= self.now_s]
        self._nodes += len(here)
        self._arrivals_s = self._arrivals_s[len(here) :]
