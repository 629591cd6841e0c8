"""The run folder: what a run is, written once and compared at every resume."""

import json
from collections.abc import Sequence

from histoscale.checkpoint.parent import PARENT_KEY, Parent, write_parent
from histoscale.checkpoint.reader import latest_commit
from histoscale.checkpoint.run_record import INDEX_KEY, ORIGINS_KEY, RECIPE_KEY, find_recipe, recorded_index
from histoscale.config.decode import differences, dump_recipe, fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import RunError
from histoscale.storage import Store

QUICKSTART_RUN = "run"  # in the --out of jobs/quickstart.py
DEFAULT_PRECISION = {"cuda": "bf16", "cpu": "fp32"}
_MAY_COME_FIRST = {"lease.json", INDEX_KEY, ORIGINS_KEY, PARENT_KEY}


def resolve_precision(recipe: Recipe, default: str) -> Recipe:
    """The recipe with `precision: auto` settled as `default`: that of the run, or of the device."""
    return recipe if recipe.precision != "auto" else recipe.model_copy(update={"precision": default})


def read_run(store: Store) -> Recipe | None:
    """The recipe that a run folder records, or None where no run was started.

    Raises:
        RunError: The folder holds something else.
        RecipeError: Its recipe is damaged, or was written by another version.
    """
    recipe = find_recipe(store)
    if recipe is not None:
        return recipe
    strangers = [info.key for info in store.list() if info.key not in _MAY_COME_FIRST]
    if strangers:
        raise RunError(
            f"{store.uri} holds something else than a run",
            value=strangers[0],
            expected="an empty folder or the folder of a run",
            remedy="give another place with --out",
        )
    return None


def require_run(store: Store) -> Recipe:
    """The recipe of a run that exists.

    Raises:
        RunError: There is none.
    """
    recipe = read_run(store) if store.exists(RECIPE_KEY) else None
    if recipe is None:
        inside = store.exists(f"{QUICKSTART_RUN}/{RECIPE_KEY}")
        raise RunError(
            f"{store.uri} is not a run folder",
            expected="the --out of jobs/pretrain.py",
            remedy=f"give {store.uri}/{QUICKSTART_RUN}" if inside else "start a run there first, or correct the path",
        )
    return recipe


def committed_step(store: Store) -> int:
    """Steps of the newest commit; 0 where there is none."""
    commit = latest_commit(store)
    return commit.step if commit else 0


def check_same_experiment(store: Store, recipe: Recipe, stored: Recipe, snapshot_id: str) -> None:
    """Refuse to go on with a run under another recipe or another index.

    Raises:
        RunError: A field of the experiment or the snapshot of the index differs.
    """
    if fingerprint(recipe) != fingerprint(stored):
        raise RunError(
            f"run {store.uri} was started with another recipe",
            value="; ".join(differences(recipe, stored)),
            expected="the recipe that the run records (only `on_alarm`, `evaluation`, `tracking` and `cluster` may "
            "change)",
            remedy="undo these changes to resume, or give a new --out to start another run",
        )
    recorded = recorded_snapshot(store)
    if recorded != snapshot_id:
        raise RunError(
            f"run {store.uri} was started on another index",
            value=snapshot_id,
            expected=f"snapshot {recorded}",
            remedy="give the index that the run was started on, or a new --out to start another run",
        )


def recorded_snapshot(store: Store) -> str | None:
    """The snapshot of the index that a run was started on; None where no run was.

    Raises:
        RunError: The record is damaged.
    """
    return recorded_index(store)[1] if store.exists(RECIPE_KEY) else None


def start_run(
    store: Store,
    recipe: Recipe,
    index_uri: str,
    snapshot_id: str,
    origins: Sequence[str] = (),
    parent: Parent | None = None,
) -> None:
    """Record what the run is; the recipe comes last, so that a folder with one is complete.

    Args:
        store: The run folder.
        recipe: With its precision resolved.
        index_uri: The index.
        snapshot_id: Of the index.
        origins: Lines on the weights that the run learns from beside slides: a teacher's, or published ones.
        parent: The checkpoint that the run is forked from.
    """
    index = {"index": index_uri, "snapshot_id": snapshot_id}
    store.put(INDEX_KEY, json.dumps(index, indent=1).encode())
    store.put(ORIGINS_KEY, json.dumps(list(origins), indent=1).encode())
    write_parent(store, parent)
    store.put(RECIPE_KEY, dump_recipe(recipe).encode())
