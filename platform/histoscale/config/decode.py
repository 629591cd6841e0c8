"""From YAML files and `--set a.b=c` to a recipe, with every problem of a file reported at once."""

import copy
import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from histoscale.config.recipe import Recipe
from histoscale.errors import RecipeError

# What a run is looked at with, and what it runs on, are no part of the experiment: a run may resume with others.
OUTSIDE_THE_FINGERPRINT = ("on_alarm", "evaluation", "tracking", "cluster")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Recipe of a YAML file, with overrides such as `model.arch=vit_s14` applied.

    Raises:
        RecipeError: The file cannot be read, is no YAML mapping, or holds anything invalid; all problems at once.
    """
    return decode_recipe(read_yaml(path, "recipe"), overrides, source=str(path))


def read_yaml(path: str | Path, kind: str) -> dict[str, Any]:
    """The mapping in a YAML file of this machine; `kind` is what it is to be, and its folder's name in the singular.

    Raises:
        RecipeError: The file cannot be read, or is no YAML mapping.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise RecipeError(
            f"{kind} {path} cannot be read: {reason}",
            expected="a YAML file",
            remedy=f"see jobs/{kind}s for the ones that come with histoscale",
        ) from error
    return parse_yaml(text, str(path), kind)


def decode_recipe(values: dict[str, Any], overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """Recipe of nested mappings; `source` names them in errors."""
    merged = copy.deepcopy(values)
    for override in overrides:
        _apply_override(merged, override)
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise invalid(error, Recipe, source) from error


def invalid(error: ValidationError, root: type[BaseModel], source: str) -> RecipeError:
    """The error for values that are not those of a model: every problem, unknown fields with the nearest known one.

    Args:
        error: What the model says.
        root: The model.
        source: Names the values.
    """
    problems = [_problem(details, root) for details in _leaves(error.errors())]
    return RecipeError(
        f"{source} has {len(problems)} problem{'s' if len(problems) > 1 else ''}: " + "; ".join(problems)
    )


def recorded_recipe(data: bytes, source: str) -> Recipe:
    """The recipe that a run recorded, of `dump_recipe`.

    Args:
        data: The file.
        source: Names it in errors.

    Raises:
        RecipeError: It is damaged, or was written by another version.
    """
    try:
        values = parse_yaml(data, source)
        # A file that was cut short would be another recipe: what it lacks has defaults.
        # Runs of earlier versions have no `tracking`; a file that was cut short lacks what comes after it, too.
        missing = sorted(set(Recipe.model_fields) - set(values) - {"tracking"})
        if missing:
            raise RecipeError(f"{source} is incomplete", value=f"no {missing[0]}", expected="every section of a recipe")
        return decode_recipe(values, source=source)
    except RecipeError as error:
        raise RecipeError(
            error.what,
            value=error.value,
            expected=error.expected,
            remedy="restore the file as the run wrote it, or use the version of histoscale that did",
        ) from error


def parse_yaml(text: str | bytes, source: str, kind: str = "recipe") -> dict[str, Any]:
    """The mapping that a YAML text holds; `kind` is what it is to be.

    Raises:
        RecipeError: It is no YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise RecipeError(f"{source} is not valid YAML: {error}", expected="nested `field: value` lines") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RecipeError(
            f"{source} is not a {kind}", value=type(values).__name__, expected="nested `field: value` lines"
        )
    return values


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every field, defaults included."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def fingerprint(recipe: Recipe) -> str:
    """16 hex digits that name the experiment: every field but those of `OUTSIDE_THE_FINGERPRINT`."""
    content = recipe.model_dump(mode="json", exclude=set(OUTSIDE_THE_FINGERPRINT))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differences(ours: Recipe, theirs: Recipe) -> list[str]:
    """The fields of the experiment that differ, as `field: ours != theirs`."""
    left, right = (flat_fields(recipe) for recipe in (ours, theirs))
    return [
        f"{name}: {left.get(name)!r} != {right.get(name)!r}"
        for name in sorted({*left, *right})
        if left.get(name) != right.get(name) and name.partition(".")[0] not in OUTSIDE_THE_FINGERPRINT
    ]


def flat_fields(recipe: Recipe) -> dict[str, Any]:
    """Every field as `section.field` -> value, as JSON knows them."""
    return _flatten(recipe.model_dump(mode="json"))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not all(name.split(".")):
        raise RecipeError(
            "an override cannot be read", value=override, expected="field=value, such as model.arch=vit_s14"
        )
    *sections, field = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(
                "an override names a field inside a value", value=override, expected="section.field=value"
            )
    try:
        values[field] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError("an override's value is not valid YAML", value=override, expected="field=value") from error


def _leaves(problems: list[ErrorDetails]) -> list[ErrorDetails]:
    """The problems without those that only say that something inside them is wrong."""
    places = [details["loc"] for details in problems]
    return [
        details
        for details in problems
        if not any(
            len(place) > len(details["loc"]) and place[: len(details["loc"])] == details["loc"] for place in places
        )
    ]


def _problem(details: ErrorDetails, root: type[BaseModel]) -> str:
    path = [str(part) for part in details["loc"]]
    name = ".".join(path) or root.__name__.lower()
    if details["type"] == "extra_forbidden":
        known = _fields_at(path[:-1], root)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
        return f"{name} is not a field (nearest: {'.'.join([*path[:-1], near[0]]) if near else 'none'})"
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return f"{name}: {message}"
    return f"{name} = {details['input']!r}: {message[0].lower()}{message[1:]}"


def _fields_at(path: list[str], root: type[BaseModel]) -> list[str]:
    """Fields of the section at a path; of a section that may be of several kinds, the path also names the kind."""
    models: list[type[BaseModel]] = [root]
    for part in path:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = _sections(fields[0].annotation)
        else:
            models = [model for model in models if "kind" in model.model_fields and _kind(model) == part] or models
    return [name for model in models for name in model.model_fields]


def _sections(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _kind(section: type[BaseModel]) -> object:
    return section.model_fields["kind"].default
