"""Evaluations and pictures beside a run: Ray tasks on free CPUs or a GPU, started by a thread of the driver."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from histoscale.checkpoint.reader import latest_commit
from histoscale.cluster.evaluations import (
    CommitWatch,
    DatasetWords,
    Evaluated,
    Evaluation,
    EvaluationLost,
    PictureWords,
    look_at_all,
)
from histoscale.cluster.failures import diagnosis_in
from histoscale.cluster.pictures import draw_run
from histoscale.config.recipe import Recipe
from histoscale.errors import StorageError
from histoscale.evaluate.assess import EvaluationPlan
from histoscale.evaluate.comparison import evaluate_run
from histoscale.evaluate.report import latest_step
from histoscale.observe.evaluation_events import write_evaluation
from histoscale.observe.picture_store import drawn_step
from histoscale.observe.run_report import write_report
from histoscale.storage import open_store

_POLL_S = 5.0
_LAST_S = 1800.0
"""How long a run that is complete waits for the evaluation of its last checkpoint."""

_NICENESS = 10
"""Of an evaluation's process: where it shares cores with a reader or a trainer, these come first."""


@contextlib.contextmanager
def evaluating(
    run_uri: str, recipe: Recipe, datasets: Mapping[str, str], tell: Callable[[str], None]
) -> Iterator[None]:
    """Evaluate and draw checkpoints for as long as the block lasts, and the last one after it, if it ends well.

    Args:
        run_uri: The run folder.
        recipe: Of the run.
        datasets: URI -> name.
        tell: Takes a line for people.
    """
    store = open_store(run_uri)
    evaluation = recipe.evaluation
    watches = [
        CommitWatch(
            DatasetWords(uri),
            evaluation,
            latest_step(store, name),
            partial(_Task, recipe, "evaluation", _evaluate, run_uri, uri),
            tell,
        )
        for uri, name in datasets.items()
    ]
    if evaluation.pictures:
        draw = partial(_Task, recipe, "pictures", _draw, run_uri)
        watches.append(CommitWatch(PictureWords(), evaluation, drawn_step(store), draw, tell))
    if not watches:
        yield
        return
    done = threading.Event()

    def look(*, last: bool = False) -> bool:
        try:
            commit = latest_commit(store)
        except StorageError:
            return True  # the run itself tells of it
        return look_at_all(watches, commit.step if commit else 0, last=last)

    def run() -> None:
        while not done.wait(_POLL_S):
            look()

    thread = threading.Thread(target=run, name="evaluations", daemon=True)
    thread.start()
    try:
        yield
        done.set()
        thread.join()
        _finish(look, tell)
    finally:
        done.set()
        thread.join()
        for watch in watches:
            watch.abandon()


def _finish(look: Callable[..., bool], tell: Callable[[str], None]) -> None:
    """Wait for what is made of the last checkpoint."""
    waited_s = 0.0
    pause = threading.Event()
    while look(last=True):
        if waited_s == 0.0:
            tell("waiting for evaluations and pictures of the last checkpoint")
        if waited_s >= _LAST_S:
            tell(f"warning: evaluations or pictures of the last checkpoint took over {_LAST_S:g} s and are left out")
            return
        pause.wait(_POLL_S)
        waited_s += _POLL_S


class _Task(Evaluation):
    """An evaluation as a Ray task: where its process is lost, nothing else is."""

    def __init__(self, recipe: Recipe, name: str, function: Callable[..., Evaluated], *arguments: str) -> None:
        evaluation = recipe.evaluation
        # The process goes with the task: the next one in it would be as nice. "DEFAULT" is wherever there is room, and
        # not in the resources of a sweep's trial, which Tune would have a run's own tasks take.
        task: Any = ray.remote(max_calls=1)(function).options(
            num_cpus=evaluation.cpus, num_gpus=evaluation.gpus, max_retries=0, scheduling_strategy="DEFAULT", name=name
        )
        self._ref = task.remote(recipe, *arguments)

    def ended(self) -> bool:
        return bool(ray.wait([self._ref], timeout=0)[0])

    def result(self) -> Evaluated:
        try:
            found: Evaluated = ray.get(self._ref)
        except RayError as error:
            raise diagnosis_in(error) or EvaluationLost(_what_happened(error)) from error
        return found

    def cancel(self) -> None:
        ray.cancel(self._ref, force=True)


def _what_happened(error: RayError) -> str:
    """A line: of an exception in the task its own last one, of a lost process Ray's first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, RayTaskError) else 0]


def _evaluate(recipe: Recipe, run_uri: str, dataset_uri: str) -> Evaluated:
    """On the node of the task."""
    store, device = open_store(run_uri), _take_place(recipe)
    report = evaluate_run(store, recipe, dataset_uri, device, EvaluationPlan())
    write_evaluation(store, report.step, report.scalars())
    write_report(store, recipe, latest_commit(store))
    return Evaluated(report.step, report.headline())


def _draw(recipe: Recipe, run_uri: str) -> Evaluated:
    """On the node of the task."""
    store, device = open_store(run_uri), _take_place(recipe)
    found = draw_run(store, recipe, device)
    write_report(store, recipe, latest_commit(store))
    left_out = f"; left out: {'; '.join(found.left_out)}" if found.left_out else ""
    return Evaluated(found.step, f"{len(found.pictures)} drawn{left_out}")


def _take_place(recipe: Recipe) -> torch.device:
    """Make this process that of an evaluation; gives what it works on."""
    os.nice(_NICENESS)
    torch.set_num_threads(recipe.evaluation.cpus)
    return torch.device("cuda" if recipe.evaluation.gpus else "cpu")
