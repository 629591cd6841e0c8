"""Ray Tune at the edge: trials that have not ended are run, a few at a time, and none of them can end the sweep.

What has ended is known from the folder of the sweep alone, and what was interrupted from the run folders: nothing of
Tune's own state is needed to go on, so it lies in a folder that is thrown away.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune

from histoscale.errors import SweepError
from histoscale.storage import open_store
from histoscale.sweeps.folder import SweepFolder
from histoscale.sweeps.one_trial import TrialTask, run_trial
from histoscale.sweeps.rows import TrialRow, row_of
from histoscale.sweeps.spec import EvaluationSpec, Resources
from histoscale.sweeps.trial import Trial
from histoscale.units import describe_duration

Tell = Callable[[str], None]

_TRIES = 3
_ERROR = "error"


@dataclass(frozen=True)
class Setting:
    """What all trials of a sweep have in common.

    Attributes:
        folder_uri: Of the sweep.
        index_uri: Of the slides.
        evaluation: What decides.
        resources: Of one trial.
        holder: Who asks.
    """

    folder_uri: str
    index_uri: str
    evaluation: EvaluationSpec
    resources: Resources
    holder: str

    @property
    def folder(self) -> SweepFolder:
        """The folder of the sweep."""
        return SweepFolder(open_store(self.folder_uri))

    def task(self, trial: Trial) -> TrialTask:
        """What a node needs to know of a trial."""
        return TrialTask(trial, self.folder_uri, self.index_uri, self.evaluation, self.resources, self.holder)


def run_trials(setting: Setting, trials: Sequence[Trial], tell: Tell) -> dict[str, TrialRow]:
    """Run what has not ended; a fork follows when what it is forked from has ended.

    Args:
        setting: See there.
        trials: All of them.
        tell: Takes a line for people.

    Returns:
        Name -> row of every trial; one that could not be run has a reason.

    Raises:
        HistoscaleError: The folder cannot be read or written.
    """
    folder = setting.folder
    progress = _Progress(trials, folder.results(), tell)
    for wave in waves(trials):
        ended = folder.results()
        _run_wave(setting, [trial for trial in wave if trial.name not in ended], progress)
        ended = folder.results()
        for trial in wave:
            if trial.name not in ended:
                why = "its process failed again and again: see logs/ in the folder of the sweep"
                folder.keep(row_of(trial, reason=why))
    return folder.results()


def waves(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials by how many forks lie before them: what a trial needs is in a wave before its own.

    Raises:
        SweepError: A trial is forked from one that is not there.
    """
    by_name = {trial.name: trial for trial in trials}

    def depth(trial: Trial) -> int:
        if trial.parent is None:
            return 0
        if trial.parent.trial not in by_name:
            raise SweepError(
                "a trial is forked from one that is not in the sweep",
                value=f"{trial.name} from {trial.parent.trial}",
                expected=f"one of {', '.join(by_name)}",
            )
        return 1 + depth(by_name[trial.parent.trial])

    depths = [depth(trial) for trial in trials]
    return [
        [trial for trial, own in zip(trials, depths, strict=True) if own == level]
        for level in range(max(depths, default=-1) + 1)
    ]


def _run_wave(setting: Setting, trials: Sequence[Trial], progress: "_Progress") -> None:
    if not trials:
        return
    # The longest first: what is left at the end is short.
    by_name = {trial.name: trial for trial in sorted(trials, key=lambda trial: -trial.cost.flops)}
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's tables, which would stand between our lines

    def trainable(config: Mapping[str, Any]) -> None:
        row = run_trial(setting.task(by_name[config["trial"]]))
        tune.report({_ERROR: row.error(setting.evaluation.target), "reason": row.reason})

    with tempfile.TemporaryDirectory(prefix="histoscale-tune-") as scratch:
        tune.Tuner(
            tune.with_resources(trainable, {"CPU": 1}),
            param_space={"trial": tune.grid_search(list(by_name))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=setting.resources.max_concurrent, trial_name_creator=_name_of
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=_TRIES - 1),
                callbacks=[progress],
            ),
        ).fit()


def _name_of(trial: Any) -> str:  # noqa: ANN401 - Tune's trial has no public type
    return str(trial.config["trial"])


class _Progress(tune.Callback):
    """Tells when trials begin and end, how many are left, and how long they may take."""

    def __init__(self, trials: Sequence[Trial], ended: Mapping[str, TrialRow], tell: Tell) -> None:
        self._flops = {trial.name: trial.cost.flops for trial in trials}
        self._left = {trial.name for trial in trials} - set(ended)
        before = len(trials) - len(self._left)
        self._tell = tell
        self._begun_s = time.monotonic()
        self._done_flops = 0.0
        if before and self._left:
            tell(f"{before} of {len(trials)} trials have ended before")

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002 - Tune's
        self._tell(f"begins: {_name_of(trial)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002 - Tune's
        name, result = _name_of(trial), trial.last_result
        self._left.discard(name)
        self._done_flops += self._flops[name]
        if result["reason"]:
            what = f"failed: {result['reason']}"
        else:
            what = "done" if math.isnan(result[_ERROR]) else f"error {result[_ERROR]:.3f}"
        self._tell(f"{name}: {what}; {self._rest()}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002 - Tune's
        self._tell(f"{_name_of(trial)}: its process failed, and is tried up to {_TRIES} times")

    def _rest(self) -> str:
        """By the work that is left and the pace so far."""
        if not self._left:
            return "all trials have ended"
        flops = sum(self._flops[name] for name in self._left)
        left_s = (time.monotonic() - self._begun_s) * flops / self._done_flops
        return f"{len(self._left)} left, about {describe_duration(left_s)}"
