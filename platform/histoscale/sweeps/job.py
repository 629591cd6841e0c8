"""The two sweeps as jobs: plan, run, survive, fit, decide."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, cast

import torch

from histoscale.cluster.on_a_node import run_on_a_node
from histoscale.config.decode import decode_recipe, read_yaml
from histoscale.config.recipe import Recipe
from histoscale.errors import RecipeError, SweepError
from histoscale.evaluate.comparison import Comparison
from histoscale.evaluate.datasets import open_dataset
from histoscale.evaluate.networks import find_network
from histoscale.storage.json_object import read_json
from histoscale.sweeps.driver import Setting, run_trials
from histoscale.sweeps.folder import SweepFolder, in_order
from histoscale.sweeps.hparams import write_hparams
from histoscale.sweeps.judge import judge
from histoscale.sweeps.report import scaling_page
from histoscale.sweeps.report_students import distillation_page
from histoscale.sweeps.retention import TeacherScores, analyse_distillation
from histoscale.sweeps.rows import TrialRow
from histoscale.sweeps.scaling import analyse_scaling
from histoscale.sweeps.search import (
    Build,
    Suggestion,
    distillation_build,
    finalists,
    require_searchable,
    scaling_build,
    search_trial,
)
from histoscale.sweeps.spec import EvaluationSpec, ScalingSpec, SweepSpec, load_distillation, load_scaling
from histoscale.sweeps.students import distillation_trials
from histoscale.sweeps.trial import Trial, trial_lines
from histoscale.sweeps.trials import scaling_trials
from histoscale.train.teacher_source import find_teacher, taught_by

Tell = Callable[[str], None]

_TEACHER = "teacher.json"


@dataclass(frozen=True)
class SweepRequest:
    """One call of the job.

    Attributes:
        spec_file: A YAML file.
        index_uri: Of the slides.
        out: The folder of the sweep.
        holder: Who asks.
        teacher: A run or an export, for a distillation.
    """

    spec_file: str
    index_uri: str
    out: str
    holder: str
    teacher: str | None = None


@dataclass(frozen=True)
class PlannedSweep:
    """A sweep that makes sense; nothing has begun.

    Attributes:
        request: What was asked for.
        spec: Of the sweep.
        trials: Of its grid.
        build: Makes trials of suggestions, where the spec searches.
    """

    request: SweepRequest
    spec: SweepSpec
    trials: tuple[Trial, ...]
    build: Build

    @property
    def setting(self) -> Setting:
        """What all trials have in common."""
        spec, request = self.spec, self.request
        return Setting(request.out, request.index_uri, spec.evaluation, spec.resources, request.holder)

    def lines(self) -> Iterator[str]:
        """What will be run, and what it will cost."""
        yield from trial_lines(self.trials, self.spec.price)
        if self.spec.search is not None:
            search = self.spec.search
            again = search.finalists * len(search.seeds)
            yield f"and a search of {search.trials} trials, of which the best are run again: {again} more"


def plan_scaling(request: SweepRequest) -> PlannedSweep:
    """Everything that can be refused, before anything starts.

    Raises:
        HistoscaleError: The spec, the recipe or a dataset makes no sense.
    """
    spec = load_scaling(request.spec_file)
    base = read_yaml(spec.recipe, "recipe")
    return _planned(request, spec, scaling_trials(spec, base), scaling_build(spec, base))


def plan_distillation(request: SweepRequest) -> PlannedSweep:
    """Everything that can be refused, before anything starts.

    Raises:
        HistoscaleError: The spec, the recipe, the teacher or a dataset makes no sense.
    """
    spec = load_distillation(request.spec_file)
    base = read_yaml(spec.recipe, "recipe")
    distill = {**base.get("distill", {}), "teacher": request.teacher}
    teacher = _teacher_recipe({**base, "distill": {**distill, "mode": spec.mode}}, spec)
    trials = distillation_trials(spec, base, distill, teacher)
    for trial in trials:
        if trial.recipe.distill is not None:
            find_teacher(trial.recipe, trial.recipe.distill)
    return _planned(request, spec, trials, distillation_build(spec, base, distill, teacher))


def run_sweep(planned: PlannedSweep, tell: Tell) -> str:
    """Run what has not ended, write tables and report; gives the sentence that answers the question.

    Raises:
        HistoscaleError: The folder is another sweep's, or no trial has ended with a score.
    """
    request, spec, folder = planned.request, planned.spec, planned.setting.folder
    folder.begin({"spec": spec.model_dump(mode="json"), "index": request.index_uri, "teacher": request.teacher})
    teacher = _teacher_scores(request.teacher, spec.evaluation, folder, tell) if request.teacher else None
    rows = in_order(planned.trials, run_trials(planned.setting, planned.trials, tell))
    rows += _search(planned, tell)
    return _publish(planned, folder, rows, teacher, tell)


def _planned(request: SweepRequest, spec: SweepSpec, trials: tuple[Trial, ...], build: Build) -> PlannedSweep:
    for uri in spec.evaluation.datasets.values():
        open_dataset(uri)
    if spec.search is not None:
        require_searchable(spec.search, build, spec.seeds[0])
        if importlib.util.find_spec("optuna") is None:
            raise RecipeError(
                "the spec searches, and Optuna is not installed",
                expected="the package optuna",
                remedy="install histoscale[search], or leave `search` out of the spec",
            )
    return PlannedSweep(request, spec, trials, build)


def _teacher_recipe(values: dict[str, Any], spec: SweepSpec) -> Recipe:
    recipe = decode_recipe(values, [f"{name}={json.dumps(value)}" for name, value in spec.set.items()])
    return recipe if recipe.distill is None else taught_by(recipe, find_teacher(recipe, recipe.distill))


def _search(planned: PlannedSweep, tell: Tell) -> list[TrialRow]:
    """Suggestions, a few at a time, each from what the ones before have found; then the best with other seeds."""
    search, spec, setting = planned.spec.search, planned.spec, planned.setting
    if search is None:
        return []
    from histoscale.sweeps.suggest import suggest  # Optuna is loaded for a search alone

    folder, seed = setting.folder, spec.seeds[0]
    suggestions: list[Suggestion] = [*folder.suggestions()]
    while True:
        trials = [search_trial(planned.build, each, number, seed) for number, each in enumerate(suggestions)]
        found = in_order(trials, run_trials(setting, trials, tell))  # those that a kill has left first
        count = min(spec.resources.max_concurrent, search.trials - len(suggestions))
        if count <= 0:
            break
        suggestions += suggest(search, found, spec.evaluation.target, count, seed)
        folder.keep_suggestions(suggestions)
    best = finalists(search, planned.build, found, spec.evaluation.target)
    return found + in_order(best, run_trials(setting, best, tell))


def _publish(
    planned: PlannedSweep, folder: SweepFolder, rows: Sequence[TrialRow], teacher: TeacherScores | None, tell: Tell
) -> str:
    name, created = PurePosixPath(folder.store.uri).name, datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    if teacher is None:
        scaling = analyse_scaling(cast(ScalingSpec, planned.spec), rows)  # a distillation has a teacher
        sentence, page = scaling.sentence, scaling_page(scaling, rows, name, created)
    else:
        students = analyse_distillation(rows, teacher)
        sentence, page = students.sentence, distillation_page(students, rows, name, created)
    write_hparams(folder.store, rows)
    tell(f"report: {folder.publish(rows, page)}")
    return sentence


def _teacher_scores(place: str, evaluation: EvaluationSpec, folder: SweepFolder, tell: Tell) -> TeacherScores:
    """What the teacher reaches, measured once."""
    if folder.store.exists(_TEACHER):
        return read_json(
            folder.store,
            _TEACHER,
            lambda values: TeacherScores(**values),
            kind=SweepError,
            what=f"{_TEACHER} of sweep {folder.store.uri} is damaged or of another version of histoscale",
            expected="what the sweep measured of its teacher",
            remedy=f"delete {_TEACHER}, and run the sweep again, which measures the teacher anew",
        )
    found = run_on_a_node(lambda device, say: _judge_teacher(place, evaluation, device, say), 1, tell)
    folder.store.put(_TEACHER, json.dumps(asdict(found), indent=1).encode())
    return found


def _judge_teacher(place: str, evaluation: EvaluationSpec, device: str, say: Tell) -> TeacherScores:
    """On a node."""
    network = find_network(place)
    comparison = Comparison.of_network(network, torch.device(device), tell=say)
    judged = judge(comparison, evaluation, comparison.evaluate)
    parameters = sum(parameter.numel() for parameter in network.backbone.parameters())
    return TeacherScores(network.name, parameters, judged.latency_ms, judged.scores, judged.chance)
