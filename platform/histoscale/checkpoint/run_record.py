"""What a run folder says of its run: the recipe, the index, and what the run learns from beside slides."""

from collections.abc import Callable
from typing import Any, TypeVar

from histoscale.config.decode import recorded_recipe
from histoscale.config.recipe import Recipe
from histoscale.errors import RunError
from histoscale.storage import Store
from histoscale.storage.json_object import read_json, text_of

T = TypeVar("T")

RECIPE_KEY = "recipe.yaml"
INDEX_KEY = "index.json"
ORIGINS_KEY = "origins.json"


def find_recipe(store: Store) -> Recipe | None:
    """The recipe that a folder records; None where it is no run folder.

    Raises:
        RecipeError: The recipe is damaged, or was written by another version.
    """
    if not store.exists(RECIPE_KEY):
        return None
    return recorded_recipe(store.get(RECIPE_KEY), f"{store.uri}/{RECIPE_KEY}")


def find_index(store: Store) -> tuple[str, str] | None:
    """URI and snapshot of the index of a run; None where it records none.

    Raises:
        RunError: The record is damaged.
    """
    return recorded_index(store) if store.exists(INDEX_KEY) else None


def recorded_index(store: Store) -> tuple[str, str]:
    """URI and snapshot of the index that a run was started on.

    Raises:
        RunError: The record is damaged.
        StorageError: There is none.
    """
    return _read(
        store,
        INDEX_KEY,
        lambda values: (text_of(values["index"]), text_of(values["snapshot_id"])),
        "the index of the run and its snapshot",
    )


def recorded_origins(store: Store) -> list[str]:
    """Lines on the weights that a run learns from beside slides: a teacher's, or published ones.

    Raises:
        RunError: The record is damaged.
    """
    if not store.exists(ORIGINS_KEY):
        return []
    return _read(store, ORIGINS_KEY, _lines_of, "a list of lines on the weights that the run began with")


def _lines_of(values: object) -> list[str]:
    if not isinstance(values, list):
        raise TypeError("no list")
    return [text_of(value) for value in values]


def _read(store: Store, key: str, decode: Callable[[Any], T], expected: str) -> T:
    return read_json(
        store,
        key,
        decode,
        kind=RunError,
        what=f"{key} of run {store.uri} is damaged",
        expected=expected,
        remedy="restore it as the run wrote it: without it nobody can tell what the run is",
    )
