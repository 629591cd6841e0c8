"""Which committed checkpoints are evaluated or drawn beside a run, and what becomes of what fails or is late.

One evaluation at a time runs on each dataset, and one makes pictures, on CPUs or a GPU that nobody trains on; it takes
the newest commit there is when it begins. Nothing here is waited for by a step: the core is fed by a look every few
seconds, and whatever goes wrong is told and left behind.
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


Begin = Callable[[], Evaluation]
"""Starts the evaluation of the newest commit."""


class Words(Protocol):
    """How messages speak of one kind of evaluation."""

    def of(self, step: int) -> str:
        """What is made of a step, with its article."""

    def missing(self, step: int) -> str:
        """That a step has none."""

    def over(self) -> str:
        """That there will be none any more."""

    def done(self, found: Evaluated) -> str:
        """What was found."""


@dataclass(frozen=True)
class DatasetWords:
    """Of evaluations on a dataset: its URI."""

    dataset: str

    def of(self, step: int) -> str:
        """See `Words`."""
        return f"the evaluation of step {step} on {self.dataset}"

    def missing(self, step: int) -> str:
        """See `Words`."""
        return f"step {step} is not evaluated on {self.dataset}"

    def over(self) -> str:
        """See `Words`."""
        return f"{self.dataset} is not evaluated any more"

    def done(self, found: Evaluated) -> str:
        """See `Words`."""
        return f"evaluated step {found.step} on {found.line}"


@dataclass(frozen=True)
class PictureWords:
    """Of pictures."""

    def of(self, step: int) -> str:
        """See `Words`."""
        return f"the making of pictures of step {step}"

    def missing(self, step: int) -> str:
        """See `Words`."""
        return f"step {step} has no pictures"

    def over(self) -> str:
        """See `Words`."""
        return "pictures are not made any more"

    def done(self, found: Evaluated) -> str:
        """See `Words`."""
        return f"pictures of step {found.step}: {found.line}"


class CommitWatch:
    """One kind of evaluation of a run.

    Args:
        words: How messages speak of it.
        section: Of the recipe.
        evaluated: The newest step of which an earlier job has one, or 0.
        begin: Starts one.
        tell: Takes a line for people.
    """

    def __init__(
        self,
        words: Words,
        section: EvaluationSection,
        evaluated: int,
        begin: Begin,
        tell: Callable[[str], None],
    ) -> None:
        self._words = words
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
            self._running = self._begin()

    def abandon(self) -> None:
        """Let go of what runs."""
        if self._running is not None:
            self._running.cancel()
            self._running = None

    def _became_due(self, step: int) -> None:
        if self._due > self._evaluated and self._running is not None and not self._given_up:
            self._tell(
                f"{self._words.missing(self._due)}: the one before it still runs at the commit of step {step}; "
                "a larger evaluation.every_commits, or more evaluation.cpus, would keep up"
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
            self._tell(f"warning: {self._words.over()}: {error}")
        except HistoscaleError as error:
            self._failed(str(error), again=False)
        else:
            self._tries, self._evaluated = 0, max(self._evaluated, found.step)
            self._tell(self._words.done(found))

    def _failed(self, why: str, *, again: bool) -> None:
        if again:
            self._tell(f"{self._words.of(self._due)} is tried again: {why}")
            return
        self._tell(f"warning: {self._words.missing(self._due)}: {why}")
        self._tries, self._evaluated = 0, self._due


def look_at_all(watches: Sequence[CommitWatch], committed: int, *, last: bool = False) -> bool:
    """One look at each; whether anything still runs or is due."""
    for watch in watches:
        watch.look(committed, last)
    return not all(watch.idle for watch in watches)
