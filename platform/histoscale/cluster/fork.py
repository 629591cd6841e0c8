"""The driver's side of a fork: which checkpoint it begins from, held against the recipe before anything starts."""

import re
from dataclasses import dataclass

from histoscale.checkpoint.parent import Parent, open_parent, parent_at, read_parent
from histoscale.checkpoint.reader import commit_at, latest_commit, read_manifest, require_commit, require_recipe
from histoscale.checkpoint.run_record import recorded_origins
from histoscale.cluster.job import location
from histoscale.cluster.run_folder import read_run, require_run
from histoscale.config.decode import differences, fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import RecipeError, RunError
from histoscale.storage import Store, open_store
from histoscale.train.fork import misfits, shapes_of

_WITH_STEP = re.compile(r"(.+)@(\d+)", re.DOTALL)
# What decides the shapes of parameters, the side of global crops apart.
_SHAPE_FIELDS = ("model.arch", "model.qk_norm", "heads.", "distill.mode", "distill.teacher")


@dataclass(frozen=True)
class ForkSource:
    """What `--fork-from` names: a run folder, and a step of it; None is its newest checkpoint."""

    uri: str
    step: int | None


def fork_source(text: str) -> ForkSource:
    """What `RUN` or `RUN@STEP` names.

    Raises:
        HistoscaleError: The place is relative inside a submitted job, or a URI of another kind.
    """
    match = _WITH_STEP.fullmatch(text)
    uri, step = (match[1], int(match[2])) if match else (text, None)
    return ForkSource(location(uri, "--fork-from"), step)


def origin_of(source: ForkSource | None, recipe: Recipe, store: Store) -> tuple[Parent | None, tuple[str, ...]]:
    """The parent of the run in `store`, and lines on what it stems from.

    A run that stands there goes on with the parent that it recorded; without a commit of its own it still needs it.

    Raises:
        HistoscaleError: The parent cannot be read, does not fit the recipe, or is not the one recorded.
    """
    if read_run(store) is not None:
        require_same_parent(store, source)
        parent = read_parent(store)
        if parent is not None and latest_commit(store) is None:
            open_parent(parent)
        return parent, (parent.line(),) if parent else ()
    if source is None:
        return None, ()
    parent = find_parent(source, recipe, store)
    return parent, (parent.line(), *recorded_origins(open_store(parent.uri)))


def find_parent(source: ForkSource, recipe: Recipe, store: Store) -> Parent:
    """The checkpoint that a new run begins from, fit for its recipe.

    Raises:
        HistoscaleError: There is no such checkpoint, or the recipe's network is another one.
    """
    theirs = open_store(source.uri)
    if theirs.uri == store.uri:
        raise RunError(
            "a run cannot be forked into its own folder",
            value=store.uri,
            expected="a new --out",
            remedy="give the new run a folder of its own, or leave --fork-from out to resume",
        )
    stored_recipe = require_run(theirs)
    commit = require_commit(theirs) if source.step is None else commit_at(theirs, source.step)
    require_recipe(commit, fingerprint(stored_recipe))
    if recipe.model.weights is not None:
        raise RecipeError(
            "a fork begins with its parent's weights, and model.weights names others",
            value=recipe.model.weights,
            expected="null",
            remedy="add --set model.weights=null, or leave --fork-from out to start from those weights",
        )
    _require_same_network(recipe, stored_recipe, read_manifest(theirs, commit).shapes)
    return parent_at(theirs.uri, commit, read_parent(theirs))


def require_same_parent(store: Store, source: ForkSource | None) -> None:
    """Refuse to go on with a run as the fork of another checkpoint; without `--fork-from` every run may go on.

    Raises:
        RunError: The run records another parent, or none.
    """
    if source is None:
        return
    parent = read_parent(store)
    if parent is None or parent.uri != open_store(source.uri).uri or source.step not in (None, parent.step):
        wanted = source.uri if source.step is None else f"{source.uri}@{source.step}"
        raise RunError(
            f"run {store.uri} was not forked from there",
            value=wanted,
            expected=f"{parent.uri}@{parent.step}" if parent else "no --fork-from: it began from new weights",
            remedy="leave --fork-from out to resume this run, or give a new --out to fork into",
        )


def _require_same_network(recipe: Recipe, stored_recipe: Recipe, stored: dict[str, tuple[int, ...]]) -> None:
    """Refuse a recipe whose parameters are not those of the checkpoint; names the fields that make the difference."""
    wanted = shapes_of(recipe)
    names = misfits(stored, wanted)
    if not names:
        return
    fields = [line for line in differences(recipe, stored_recipe) if line.startswith(_SHAPE_FIELDS)]
    name = names[0]
    parameters = f"{name} {wanted.get(name, 'absent')} != {stored.get(name, 'absent')}"
    raise RecipeError(
        f"the parent's network is another one than the recipe's: {len(names)} parameters differ",
        value="; ".join(fields) or parameters,
        expected="the parent's values of what decides the shapes of parameters",
        remedy="set these fields as the parent has them; to take its backbone alone along, export the parent and set "
        "model.weights to the export instead of --fork-from",
    )
