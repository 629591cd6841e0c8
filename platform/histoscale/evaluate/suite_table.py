"""The report of a suite as text: one table for each embedding, with the paper's figures beside ours."""

import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from histoscale.evaluate.figures import PRETRAINED
from histoscale.evaluate.suite import Embedding, Suite, Task
from histoscale.evaluate.suite_run import EMBEDDINGS, Score, SuiteReport
from histoscale.evaluate.table import WIDTH

_TASK, _OURS, _OTHER = 18, 22, 10
_GAP = 2
_MEAN = "mean of these"

Row = tuple[str, str, Mapping[str, float]]
"""Name, our score with its interval, and everybody's score by name."""


def suite_table(suite: Suite, report: SuiteReport) -> Iterator[str]:
    """Lines for a terminal."""
    measured = [task for task in suite.tasks if any(_is_of(score, task) for score in report.scores)]
    yield f"suite {suite.name} ({suite.source}): {len(measured)} of {len(suite.tasks)} tasks; step {report.step:,}"
    for embedding in EMBEDDINGS if measured else ():
        rows = [row for task in measured for row in _rows(task, embedding, report)]
        names = list(dict.fromkeys(name for _, _, scores in rows for name in scores if name != PRETRAINED))
        widths = [max(_OTHER, len(name) + _GAP) for name in names]
        yield f"embedding {embedding}"
        yield _line("task", f"{PRETRAINED} [95 %]", names, widths)
        for title, ours, scores in [*rows, *_means(rows)]:
            yield _line(title, ours, [f"{scores[name]:.3f}" if name in scores else "" for name in names], widths)
    yield from _notes(suite, report)


def score_of(task: Task, embedding: Embedding, features: str, report: SuiteReport) -> Score | None:
    """The score of a task: of one with parts the mean over those that were measured; None where there is none."""
    found = [
        score
        for score in report.scores
        if _is_of(score, task) and (score.embedding, score.features) == (embedding, features)
    ]
    if not found:
        return None
    value, low, high = (statistics.fmean(getattr(score, name) for score in found) for name in ("value", "low", "high"))
    return Score(task.name, features, embedding, value, low, high)


def published_of(task: Task, embedding: Embedding, report: SuiteReport) -> Mapping[str, float]:
    """What the paper reports of a task, by model; of one with parts the mean over the same parts that we have."""
    if not task.subtasks:
        return task.published.get(embedding, {})
    here = [part for part in task.subtasks if report.has(f"{task.name}/{part.name}")]
    models = list(here[0].published.get(embedding, {})) if here else []
    return {model: statistics.fmean(part.published[embedding][model] for part in here) for model in models}


def _is_of(score: Score, task: Task) -> bool:
    return score.task.partition("/")[0] == task.name


def _rows(task: Task, embedding: Embedding, report: SuiteReport) -> Iterator[Row]:
    ours = score_of(task, embedding, PRETRAINED, report)
    if ours is None:
        return
    others = dict.fromkeys(score.features for score in report.scores)
    scores = {name: found.value for name in others if (found := score_of(task, embedding, name, report)) is not None}
    text = f"{ours.value:.3f} [{ours.low:.3f}, {ours.high:.3f}]"
    yield task.name, text, scores | dict(published_of(task, embedding, report))


def _means(rows: Sequence[Row]) -> Iterator[Row]:
    """The last row, where there is anything to average: of everybody who has all of the tasks."""
    if len(rows) > 1:
        names = [name for name in rows[0][2] if all(name in scores for _, _, scores in rows)]
        means = {name: statistics.fmean(scores[name] for _, _, scores in rows) for name in names}
        yield _MEAN, f"{means[PRETRAINED]:.3f}", means


def _notes(suite: Suite, report: SuiteReport) -> Iterator[str]:
    reasons = dict(report.reasons)
    for task in suite.tasks:
        for text in (reasons.get(task.name, ""), task.note if task.name not in reasons else ""):
            if text:
                yield from textwrap.wrap(f"{task.name}: {text}", WIDTH, subsequent_indent="  ")


def _line(task: str, ours: str, others: Sequence[str], widths: Sequence[int]) -> str:
    cells = "".join(f"{other:>{width}}" for other, width in zip(others, widths, strict=True))
    return f"{task[:_TASK]:<{_TASK}}{ours:>{_OURS}}{cells}".rstrip()
