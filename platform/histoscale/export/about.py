"""What a run folder tells about the model beside its weights: gathered for the card, without slide names and paths."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.run_record import find_index, recorded_origins
from histoscale.config.recipe import Recipe
from histoscale.errors import DatasetError, HistoscaleError
from histoscale.evaluate.report import FOLDER, EvaluationReport, decode
from histoscale.observe.alarms import Alarms
from histoscale.observe.code_record import code_lines
from histoscale.observe.metrics import read_metrics
from histoscale.sampling.plan import Plan
from histoscale.sampling.report import PlanReport
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.catalogue import open_catalogue
from histoscale.storage import Store

_MEAN_STEPS = 50
_PATH = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|(?<![\w.])/)[^\s,;]*")


@dataclass(frozen=True)
class About:
    """What a card tells.

    Attributes:
        origins: Lines on the weights that the run learnt from beside slides.
        snapshot: Of the slide index; "" where the run records none.
        slides: In the snapshot; None where the index cannot be read.
        plan: What was drawn from where; None likewise.
        left_out: Slides that were quarantined in the run.
        evaluations: The newest one on each dataset, none of a later step than the export.
        health: Means over the last steps, by name.
        alarms: What rang, each with its step.
        code: One line for each source and set of versions that the run was trained with.
    """

    origins: tuple[str, ...] = ()
    snapshot: str = ""
    slides: int | None = None
    plan: PlanReport | None = None
    left_out: int = 0
    evaluations: tuple[EvaluationReport, ...] = ()
    health: Mapping[str, float] | None = None
    alarms: tuple[str, ...] = ()
    code: tuple[str, ...] = ()


def gather(store: Store, recipe: Recipe, commit: Commit) -> About:
    """What the run folder, and the index that it names, tell of a checkpoint.

    Raises:
        StorageError: The run folder cannot be read.
    """
    index_uri, snapshot = find_index(store) or ("", "")
    slides, plan = _plan(index_uri, snapshot, recipe)
    health, alarms = _health(store, recipe, commit.step)
    return About(
        origins=tuple(without_paths(line, _places(recipe)) for line in recorded_origins(store)),
        snapshot=snapshot,
        slides=slides,
        plan=plan,
        left_out=len(commit.quarantine),
        evaluations=tuple(_evaluations(store, commit.step)),
        health=health,
        alarms=alarms,
        code=tuple(code_lines(store)),
    )


def without_paths(line: str, known: Iterable[str] = ()) -> str:
    """A line with the last name of each path and URI in place of the whole: where things lie is nobody else's matter.

    Args:
        line: Any text.
        known: Paths that may stand in it and hold spaces, which end a path of which nothing is known.
    """
    for path in known:
        line = line.replace(path, _last_name(path))
    return _PATH.sub(lambda match: _last_name(match[0]), line)


def _last_name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or "..."


def _places(recipe: Recipe) -> list[str]:
    found = [recipe.model.weights, recipe.distill.teacher if recipe.distill else None]
    return [place for place in found if place]


def _plan(index_uri: str, snapshot: str, recipe: Recipe) -> tuple[int | None, PlanReport | None]:
    if not index_uri:
        return None, None
    try:
        catalogue = open_catalogue(index_uri, snapshot)
        spec = PlanSpec.from_recipe(recipe)
        plan = Plan(spec, catalogue.rows, catalogue.columns, catalogue.values, catalogue.mask)
    except HistoscaleError:  # an index that is gone is no reason to keep the weights back: the card says that it is
        return None, None
    return len(catalogue), plan.report()


def _evaluations(store: Store, step: int) -> Iterable[EvaluationReport]:
    newest: dict[str, EvaluationReport] = {}
    for info in store.list(FOLDER):
        if not info.key.endswith(".json") or "-step-" not in info.key:
            continue
        try:
            report = decode(store.get(info.key))
        except DatasetError:  # of another version
            continue
        if report.step <= step and (report.dataset not in newest or newest[report.dataset].step < report.step):
            newest[report.dataset] = report
    return [newest[name] for name in sorted(newest)]


def _health(store: Store, recipe: Recipe, stop: int) -> tuple[dict[str, float] | None, tuple[str, ...]]:
    alarms = Alarms(recipe)
    rung: list[str] = []
    last: list[dict[str, float]] = []
    for values in read_metrics(store, stop):
        try:
            rung += [f"step {int(values['step']):,}: {line}" for line in alarms.update(values)]
        except KeyError:  # of a version that measured less
            continue
        last = [*last[1 - _MEAN_STEPS :], values]
    if not last:
        return None, ()
    names = [name for name in last[-1] if name.startswith(("health/", "loss/", "optim/grad_norm"))]
    return {name: sum(each.get(name, 0.0) for each in last) / len(last) for name in names}, tuple(rung)
