"""Every error that the library raises on purpose: a diagnosis in one line.

HistoscaleError
├── RecipeError        a recipe, an override or a suite that is not valid
├── StorageError       a bucket, a folder or an object that cannot be read or written
├── SlideError         a slide that cannot be opened, read or used
├── SlideIndexError    an index, its inputs or its files that do not fit
├── PlanError          a plan that no set of slides can serve
├── StreamError        tiles that are not the ones of the plan
├── CheckpointError    a checkpoint that is torn, foreign or incomplete
├── RunError           a run folder that is held, or belongs to another recipe
├── ModelError         published weights that do not fit the model
├── TrainingError      a training step that must not be taken
│   └── NonFiniteError a loss or a gradient that is no number
├── DatasetError       a labelled dataset that is incomplete
├── EmbeddingError     embeddings of slides that are incomplete, foreign or of another model
├── ExportError        an export that cannot be made or proven
├── SweepError         finished runs that cannot answer a sweep's question
└── ClusterError       a cluster or a job that cannot be used
"""

from collections.abc import Mapping
from typing import Any


class HistoscaleError(Exception):
    """A problem that the user can solve: what it is, the offending value, what was expected, what to do.

    Args:
        what: What is wrong, without a full stop.
        value: The offending value, shown as it is; left out when None.
        expected: What would have been right.
        remedy: What to do, as a sentence without a full stop.
        transient: Whether the same attempt may succeed later, when nobody has changed anything.
    """

    def __init__(
        self,
        what: str,
        *,
        value: object = None,
        expected: str | None = None,
        remedy: str | None = None,
        transient: bool = False,
    ) -> None:
        self.what = what
        self.value = value
        self.expected = expected
        self.remedy = remedy
        self.transient = transient
        super().__init__(self._render())

    def _render(self) -> str:
        facts = []
        if self.value is not None:
            facts.append(f"got {self.value!r}" if isinstance(self.value, str) else f"got {self.value}")
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        text = self.what + (f" ({'; '.join(facts)})" if facts else "")
        text += f". {self.remedy[0].upper()}{self.remedy[1:]}." if self.remedy else "."
        return " ".join(text.split())

    def __reduce__(self) -> tuple[Any, ...]:
        keywords: dict[str, Any] = {"value": self.value, "expected": self.expected, "remedy": self.remedy}
        if self.transient:  # kinds that never are do not take the keyword
            keywords["transient"] = True
        return _rebuild, (type(self), self.what, keywords)


def _rebuild(kind: type[HistoscaleError], what: str, keywords: dict[str, Any]) -> HistoscaleError:
    return kind(what, **keywords)


class RecipeError(HistoscaleError):
    """A recipe, an override or a suite that is not valid; holds every problem of the file at once."""


class StorageError(HistoscaleError):
    """A bucket, a folder or an object that cannot be read or written."""


class SlideError(HistoscaleError):
    """A slide that cannot be opened, read or used; its text never holds the slide's name."""


class SlideIndexError(HistoscaleError):
    """An index, its inputs or its files that do not fit."""


class PlanError(HistoscaleError):
    """A plan that no set of slides can serve, or a world that cannot run it."""


class StreamError(HistoscaleError):
    """Tiles that are not the ones of the plan."""


class CheckpointError(HistoscaleError):
    """A checkpoint that is torn, foreign or incomplete."""


class RunError(HistoscaleError):
    """A run folder that another job holds, or that belongs to another recipe."""


class ModelError(HistoscaleError):
    """Published weights that cannot be read, or that do not fit the model."""


class TrainingError(HistoscaleError):
    """A training step that must not be taken."""


class NonFiniteError(TrainingError):
    """A loss or a gradient that is not finite.

    Args:
        what: As of every error, and `value`, `expected` and `remedy` likewise.
        value: See above.
        expected: See above.
        remedy: See above.
        measured: What the step measured before it failed: terms of the loss by name, `loss`, `grad_norm`.
    """

    def __init__(
        self,
        what: str,
        *,
        value: object = None,
        expected: str | None = None,
        remedy: str | None = None,
        measured: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(what, value=value, expected=expected, remedy=remedy)
        self.measured = dict(measured or {})

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, (kind, what, keywords) = super().__reduce__()
        return rebuild, (kind, what, keywords | {"measured": self.measured})


class DatasetError(HistoscaleError):
    """A labelled dataset that is incomplete or unreadable."""


class EmbeddingError(HistoscaleError):
    """Embeddings of slides that are incomplete, foreign or of another model, and labels that do not fit them."""


class ExportError(HistoscaleError):
    """An export that cannot be made, or whose equality cannot be shown."""


class SweepError(HistoscaleError):
    """Finished runs that cannot answer a sweep's question: too few, all alike, or diverged."""


class ClusterError(HistoscaleError):
    """A cluster or a job that cannot be used."""
