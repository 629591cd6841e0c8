"""One call of the evaluation job: what is asked for, settled here, and measured on a node of the cluster."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from histoscale.checkpoint.reader import latest_commit
from histoscale.cluster.job import location
from histoscale.cluster.on_a_node import Tell, run_on_a_node
from histoscale.cluster.run_folder import require_run
from histoscale.errors import HistoscaleError, RecipeError
from histoscale.evaluate.assess import EvaluationPlan
from histoscale.evaluate.comparison import Comparison, evaluate_into
from histoscale.evaluate.datasets import open_dataset
from histoscale.evaluate.networks import find_network
from histoscale.evaluate.suite import Suite, load_suite
from histoscale.evaluate.suite_run import run_suite
from histoscale.evaluate.suite_table import suite_table
from histoscale.observe.run_report import write_report
from histoscale.storage import join, open_store


@dataclass(frozen=True)
class EvaluateRequest:
    """What is to be measured.

    Attributes:
        subject: A run folder, or a place that `find_network` knows.
        is_run: Which of the two.
        out: Where reports go.
        dataset: The dataset, or the folder of a suite's datasets.
        suite: A file, or None.
        beside: Places of networks to set it beside.
        layout: Of the dataset.
        probes: Names, with commas between.
        embeddings: Likewise.
        seeds: Splits that are drawn where a dataset has none of its own.
        cpus: Of the node.
    """

    subject: str
    is_run: bool
    out: str
    dataset: str
    suite: str | None
    beside: tuple[str, ...]
    layout: str
    probes: str
    embeddings: str
    seeds: int
    cpus: int


def model_place(text: str, what: str) -> str:
    """The place of a network as every node understands it; `ARCH=FILE` keeps its ARCH."""
    arch, separator, file = text.partition("=")
    if separator and "/" not in arch:
        return f"{arch}={location(file, what)}"
    return location(text, what)


def evaluate(request: EvaluateRequest, connect: Callable[[], None], tell: Tell) -> Iterator[str]:
    """Measure; gives the lines of the table and where the report lies.

    Args:
        request: What.
        connect: Joins the cluster; called when the request has been found to make sense.
        tell: Takes a line for people while it goes on.

    Raises:
        HistoscaleError: Something does not make sense, is not there or cannot be measured.
    """
    plan = EvaluationPlan.parse(request.probes, request.embeddings, request.seeds)
    if request.cpus < 1:
        raise RecipeError("the number of CPUs is out of range", value=request.cpus, expected="1 or more")
    suite = load_suite(request.suite) if request.suite else None
    if request.is_run:
        require_run(open_store(request.subject))
    connect()
    work = partial(_one, request, plan) if suite is None else partial(_all_of, request, suite)
    yield from run_on_a_node(work, request.cpus, tell)


def _one(request: EvaluateRequest, plan: EvaluationPlan, device: str, tell: Tell) -> list[str]:
    """On the node: one dataset."""
    out, dataset = open_store(request.out), open_dataset(request.dataset, request.layout)
    report = evaluate_into(out, _comparison(request, device, tell), dataset, plan)
    return [report.table(), *_reported(request), f"report: {join(request.out, report.key)}"]


def _all_of(request: EvaluateRequest, suite: Suite, device: str, tell: Tell) -> list[str]:
    """On the node: all tasks of a suite."""
    comparison = _comparison(request, device, tell)
    report = run_suite(suite, request.dataset, comparison, open_store(request.out), request.seeds, request.cpus)
    return [*suite_table(suite, report), *_reported(request), f"report: {join(request.out, report.key)}"]


def _reported(request: EvaluateRequest) -> list[str]:
    """The line on the run's own report, written anew with what was found; that it cannot be is no failure."""
    if not request.is_run:
        return []
    store = open_store(request.subject)
    try:
        return [f"run's own report: {write_report(store, require_run(store), latest_commit(store))[0]}"]
    except HistoscaleError as error:
        return [f"warning: the run's report was not written: {error}"]


def _comparison(request: EvaluateRequest, device: str, tell: Tell) -> Comparison:
    torch.set_num_threads(request.cpus)
    beside = [find_network(place) for place in request.beside]
    where = torch.device(device)
    if not request.is_run:
        return Comparison.of_network(find_network(request.subject), where, beside, tell)
    store = open_store(request.subject)
    return Comparison.of_run(store, require_run(store), where, beside, tell)
