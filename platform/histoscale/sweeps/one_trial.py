"""One trial, on its node: an ordinary run is trained to its end and judged, and its row is kept."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import torch

from histoscale.cluster.failures import diagnosis_in
from histoscale.cluster.fork import ForkSource
from histoscale.cluster.pretrain import PretrainRequest, check_request, pretrain
from histoscale.cluster.run_folder import committed_step, require_run
from histoscale.errors import HistoscaleError, SweepError
from histoscale.evaluate.comparison import Comparison, evaluate_into
from histoscale.observe.metrics import read_metrics
from histoscale.storage import open_store
from histoscale.sweeps.folder import SweepFolder
from histoscale.sweeps.judge import Judged, judge
from histoscale.sweeps.rows import TrialRow, row_of
from histoscale.sweeps.spec import EvaluationSpec, Resources
from histoscale.sweeps.trial import Trial

_LAST_SHARE = 0.05  # of a run's steps: its loss at the end is their mean
_LOG_EVERY_S = 10.0


@dataclass(frozen=True)
class TrialTask:
    """All that a node needs to know of a trial.

    Attributes:
        trial: Which.
        sweep_uri: The folder of the sweep.
        index_uri: Of the slides.
        evaluation: What decides.
        resources: What judging takes.
        holder: Who asks, as the lease of the run names it.
    """

    trial: Trial
    sweep_uri: str
    index_uri: str
    evaluation: EvaluationSpec
    resources: Resources
    holder: str


def run_trial(task: TrialTask) -> TrialRow:
    """Train and judge; what has ended before is not done again, and what was interrupted goes on.

    Whatever is wrong with the trial itself is a reason in its row. What may pass, as a bucket that is away, is raised.

    Raises:
        HistoscaleError: It may succeed later.
    """
    folder = SweepFolder(open_store(task.sweep_uri))
    found = folder.result(task.trial.name)
    if found is not None:
        return found
    log = _Log(lambda lines: folder.log(task.trial.name, lines))
    begun_s = time.monotonic()
    judged = Judged({}, {}, None)
    try:
        _train(task, folder, log.tell)
        if task.trial.role != "trunk":  # which is there to be forked from
            judged = _judge(task, folder)
    except HistoscaleError as error:
        if error.transient:
            raise
        row = row_of(task.trial, reason=str(error))
    else:
        row = row_of(
            task.trial,
            scores=judged.scores,
            chance=judged.chance,
            loss=last_loss(task, folder),
            latency_ms=judged.latency_ms,
            wall_s=time.monotonic() - begun_s,
        )
    finally:
        log.write()
    folder.keep(row)
    return row


def last_loss(task: TrialTask, folder: SweepFolder) -> float | None:
    """Mean loss over the last steps of a run; None where it was not finite."""
    store = open_store(folder.run_uri(task.trial.name))
    losses = [values["loss/total"] for values in read_metrics(store, committed_step(store))]
    last = losses[-max(1, math.ceil(_LAST_SHARE * len(losses))) :]
    mean = statistics.fmean(last) if last else math.nan
    return mean if math.isfinite(mean) else None


def _train(task: TrialTask, folder: SweepFolder, tell: Callable[[str], None]) -> None:
    trial = task.trial
    parent = ForkSource(folder.run_uri(trial.parent.trial), trial.parent.step) if trial.parent else None
    request = PretrainRequest(trial.recipe, task.index_uri, folder.run_uri(trial.name), task.holder, parent)
    outcome = pretrain(check_request(request), tell)
    if outcome.step < outcome.steps:
        raise SweepError(
            "the run of the trial stopped before its end",
            value=f"step {outcome.step}",
            expected=f"{outcome.steps} steps",
            remedy="run the same command again, which goes on with it",
            transient=True,
        )


def _judge(task: TrialTask, folder: SweepFolder) -> Judged:
    """The probe's scores; on a node of their own, as a GPU that the trial held would be lacking to its run."""
    resources = task.resources
    judge: Any = ray.remote(_judge_here).options(
        num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=2, scheduling_strategy="DEFAULT"
    )
    reference = judge.remote(task, folder)
    try:
        judged: Judged = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise diagnosis_in(error) or error from None
    return judged


def _judge_here(task: TrialTask, folder: SweepFolder) -> Judged:
    torch.set_num_threads(task.resources.cpus)
    store = open_store(folder.run_uri(task.trial.name))
    device = torch.device("cuda" if task.resources.gpus else "cpu")
    comparison = Comparison.of_run(store, require_run(store), device)
    return judge(comparison, task.evaluation, partial(evaluate_into, store, comparison))


class _Log:
    """What a trial tells, written now and then: a store may be far."""

    def __init__(self, write: Callable[[list[str]], None]) -> None:
        self._write = write
        self._lines: list[str] = []
        self._next_s = 0.0

    def tell(self, line: str) -> None:
        self._lines.append(line)
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LOG_EVERY_S
            self.write()

    def write(self) -> None:
        self._write(self._lines)
