"""Running a suite: task by task, each kept as soon as it is measured, beside what the paper reports."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from histoscale.errors import DatasetError
from histoscale.evaluate.assess import EvaluationPlan
from histoscale.evaluate.comparison import Comparison, evaluate_into
from histoscale.evaluate.datasets import AUTO, open_dataset, open_hest
from histoscale.evaluate.embed import BOTH, CLS
from histoscale.evaluate.expression import score_expression
from histoscale.evaluate.figures import COLOUR, NO_EMBEDDING
from histoscale.evaluate.networks import Network
from histoscale.evaluate.report import FOLDER
from histoscale.evaluate.suite import HEST, Embedding, Resolution, Suite, Task, resolve
from histoscale.storage import Store

FORMAT_VERSION = 1
EMBEDDINGS: dict[Embedding, str] = {"cls_mean": BOTH, "cls": CLS}
"""As papers call an embedding -> as we do."""


@dataclass(frozen=True)
class Score:
    """What one network reaches in one task, or in a part of one.

    Attributes:
        task: Name of the task, or TASK/SUBTASK.
        features: Name of the network.
        embedding: As papers call it.
        value: In the metric of the task.
        low: The lower end of its interval: 95 %, or one standard deviation over the folds of expression.
        high: The upper end.
    """

    task: str
    features: str
    embedding: Embedding
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SuiteReport:
    """What a network reaches in a suite.

    Attributes:
        suite: Name of the suite.
        fingerprint: Of the network.
        step: Of its checkpoint.
        scores: All that was measured.
        reasons: Name of a task -> why it, or a part of it, could not be measured.
    """

    suite: str
    fingerprint: str
    step: int
    scores: tuple[Score, ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """Where it lies in the run folder."""
        return suite_key(self.suite, self.step)

    def has(self, name: str) -> bool:
        """Whether a task, or a part, was measured."""
        return any(score.task == name for score in self.scores)

    def with_scores(self, scores: Sequence[Score]) -> "SuiteReport":
        """The same with more scores."""
        return SuiteReport(self.suite, self.fingerprint, self.step, (*self.scores, *scores), self.reasons)


def suite_key(suite: str, step: int) -> str:
    """Key of the report of a suite at a step, in the run folder."""
    return f"{FOLDER}/suite-{suite}-at-{step:08d}.json"


def run_suite(
    suite: Suite,
    datasets_uri: str,
    comparison: Comparison,
    store: Store,
    seeds: int,
    jobs: int,
) -> SuiteReport:
    """Measure every task whose dataset is there; what was measured of this network before is kept.

    Args:
        suite: The suite.
        datasets_uri: The folder that holds its datasets.
        comparison: What is measured.
        store: The run folder, or another where reports go; each task is there as soon as it is done.
        seeds: Splits that are drawn where a dataset has none of its own.
        jobs: Threads of the forests.

    Raises:
        DatasetError: The report that is there is damaged or of another version.
        StorageError: Reports cannot be read or written.
    """
    tell = comparison.tell
    report = _begun(store, suite, comparison.network)
    resolutions = resolve(suite, datasets_uri)
    reasons = {item.task.name: item.reason for item in resolutions if item.reason}
    for item in resolutions:
        for name, measure in _parts(suite, item, comparison, store, EvaluationPlan(seeds=seeds), jobs):
            if report.has(name):
                tell(f"{name}: kept from before")
                continue
            tell(f"{name}: begins")
            try:
                report = report.with_scores(measure())
            except DatasetError as error:
                reasons[item.task.name] = f"{reasons.get(item.task.name, '')} {name}: {error}".strip()
                tell(f"{name}: cannot be measured: {error}")
                continue
            store.put(report.key, encode_suite(report))
    report = SuiteReport(suite.name, report.fingerprint, report.step, report.scores, tuple(sorted(reasons.items())))
    store.put(report.key, encode_suite(report))
    return report


def encode_suite(report: SuiteReport) -> bytes:
    """A report as JSON."""
    return json.dumps({"format": FORMAT_VERSION, **asdict(report)}, indent=1).encode()


def decode_suite(data: bytes) -> SuiteReport:
    """The report that a JSON text holds.

    Raises:
        DatasetError: It is damaged, or was written by another version.
    """
    try:
        values = json.loads(data)
        if values.pop("format") != FORMAT_VERSION:
            raise ValueError("another format")
        scores = tuple(Score(**score) for score in values.pop("scores"))
        reasons = tuple((name, why) for name, why in values.pop("reasons"))
        return SuiteReport(**values, scores=scores, reasons=reasons)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            "the report of a suite is damaged or of another version of histoscale",
            value=str(error),
            expected=f"format {FORMAT_VERSION}, as jobs/evaluate.py --suite writes it",
            remedy="remove the file, and run the suite again",
        ) from error


def _begun(store: Store, suite: Suite, network: Network) -> SuiteReport:
    """What an earlier call has measured of the same network, or nothing yet."""
    key = suite_key(suite.name, network.step)
    if store.exists(key):
        before = decode_suite(store.get(key))
        if before.fingerprint == network.fingerprint:
            return before
    return SuiteReport(suite.name, network.fingerprint, network.step)


_Measure = Callable[[], list[Score]]


def _parts(
    suite: Suite, item: Resolution, comparison: Comparison, store: Store, plan: EvaluationPlan, jobs: int
) -> Iterator[tuple[str, _Measure]]:
    """What a task is measured in: name -> how."""
    if item.uri is None:
        return
    if item.task.layout != HEST:
        yield item.task.name, partial(_classes, suite, item.task, item.uri, comparison, store, plan)
    for subtask in item.subtasks:
        name = f"{item.task.name}/{subtask.name}"
        yield name, partial(_expression, name, item.uri, subtask.folder, comparison, jobs)


def _classes(
    suite: Suite, task: Task, uri: str, comparison: Comparison, store: Store, plan: EvaluationPlan
) -> list[Score]:
    """Scores of a task with classes; its whole report is kept, under a name that no other evaluation has."""
    dataset = replace(open_dataset(uri, task.layout or AUTO), name=f"{suite.name}.{task.name}")
    wanted = EvaluationPlan((task.protocol,), tuple(EMBEDDINGS.values()), plan.seeds)
    report = evaluate_into(store, comparison, dataset, wanted)
    return [
        Score(task.name, figure.features, embedding, figure.mean, *figure.interval)
        for figure in report.figures
        for embedding, ours in EMBEDDINGS.items()
        if figure.metric == task.metric and figure.embedding in (ours, NO_EMBEDDING)
    ]


def _expression(name: str, uri: str, folder: str, comparison: Comparison, jobs: int) -> list[Score]:
    extractors = {key: value for key, value in comparison.extractors().items() if key != COLOUR}
    found = score_expression(open_hest(uri, folder), extractors, tuple(EMBEDDINGS.values()), jobs, comparison.tell)
    titles = {ours: theirs for theirs, ours in EMBEDDINGS.items()}
    return [
        Score(name, each.features, titles[each.embedding], each.mean, each.mean - each.std, each.mean + each.std)
        for each in found
    ]
