"""Which committed checkpoints are evaluated beside a run, and what becomes of those whose evaluation fails or is late.

One evaluation at a time runs on each dataset, on CPUs or a GPU that nobody trains on; it takes the newest commit there
is when it begins. Nothing here is waited for by a step: the core is fed by a look every few seconds, and whatever goes
wrong is told and left behind.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from histoscale.config.running import EvaluationSection
from histoscale.errors import DatasetError, HistoscaleError


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation has found.

    Attributes:
        step: Of the checkpoint that it took.
        line: The figures, for people.
    """

    step: int
    line: str


class EvaluationLost(Exception):
    """The process of an evaluation is gone: another try may end better."""


class Evaluation(Protocol):
    """One evaluation that was started."""

    def ended(self) -> bool:
        """Whether there is a result, or never will be."""

    def result(self) -> Evaluated:
        """What it has found.

        Raises:
            EvaluationLost: Its process is gone.
            HistoscaleError: It cannot be made.
        """

    def cancel(self) -> None:
        """Let it end."""


Begin = Callable[[str], Evaluation]
"""Starts the evaluation of the newest commit on a dataset."""


class DatasetWatch:
    """The evaluations of a run on one dataset.

    Args:
        dataset: URI of the dataset.
        section: Of the recipe.
        evaluated: The newest step that was evaluated in an earlier job, or 0.
        begin: Starts one.
        tell: Takes a line for people.
    """

    def __init__(
        self,
        dataset: str,
        section: EvaluationSection,
        evaluated: int,
        begin: Begin,
        tell: Callable[[str], None],
    ) -> None:
        self._dataset = dataset
        self._evaluation = section
        self._begin = begin
        self._tell = tell
        self._evaluated = evaluated
        self._due = self._seen = evaluated
        self._commits = 0
        self._tries = 0
        self._running: Evaluation | None = None
        self._given_up = False

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing is due."""
        return self._given_up or (self._running is None and self._due <= self._evaluated)

    def look(self, committed: int, last: bool = False) -> None:
        """Take note of the newest commit, and start, end or try again what is to be.

        Args:
            committed: Its step; 0 where there is none.
            last: Whether the run ends with it, so that it is evaluated whatever the interval says.
        """
        if committed > self._seen:
            self._seen = committed
            self._commits += 1
            if self._commits % self._evaluation.every_commits == 0:
                self._became_due(committed)
        if last:
            self._due = max(self._due, self._seen)
        if self._running is not None and self._running.ended():
            self._take(self._running)
        if self._running is None and not self.idle:
            self._tries += 1
            self._running = self._begin(self._dataset)

    def abandon(self) -> None:
        """Let go of what runs."""
        if self._running is not None:
            self._running.cancel()
            self._running = None

    def _became_due(self, step: int) -> None:
        if self._due > self._evaluated and self._running is not None and not self._given_up:
            self._tell(
                f"step {self._due} is not evaluated on {self._dataset}: the evaluation before it still runs at the "
                f"commit of step {step}; a larger evaluation.every_commits, or more evaluation.cpus, would keep up"
            )
        self._due = step

    def _take(self, evaluation: Evaluation) -> None:
        self._running = None
        try:
            found = evaluation.result()
        except EvaluationLost as lost:
            self._failed(str(lost), again=self._tries < self._evaluation.tries)
        except DatasetError as error:
            self._given_up = True
            self._tell(f"warning: {self._dataset} is not evaluated any more: {error}")
        except HistoscaleError as error:
            self._failed(str(error), again=False)
        else:
            self._tries, self._evaluated = 0, max(self._evaluated, found.step)
            self._tell(f"evaluated step {found.step} on {found.line}")

    def _failed(self, why: str, *, again: bool) -> None:
        if again:
            self._tell(f"the evaluation of step {self._due} on {self._dataset} is tried again: {why}")
            return
        self._tell(f"warning: step {self._due} is not evaluated on {self._dataset}: {why}")
        self._tries, self._evaluated = 0, self._due


def look_at_all(watches: Sequence[DatasetWatch], committed: int, *, last: bool = False) -> bool:
    """One look at each; whether anything still runs or is due."""
    for watch in watches:
        watch.look(committed, last)
    return not all(watch.idle for watch in watches)
