"""No dead fields: every field of the recipe is read somewhere outside `config/` and the benchmarks."""

import ast
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from histoscale.config.recipe import Recipe

PACKAGE = Path(__file__).parents[2] / "platform" / "histoscale"


def sections(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections(part)]


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        nested = sections(field.annotation)
        for kind in nested:
            names += leaves(kind, f"{prefix}{name}.")
        if not nested and name != "kind":  # which says what class the section is
            names.append(prefix + name)
    return list(dict.fromkeys(names))


@cache
def attributes_read() -> set[str]:
    """Every `section.field` and `recipe.field` that the package reads outside `config/` and `bench/`."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in ("config", "bench"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
                found.add(f"{name.strip('_')}.{node.attr}")
    return found


THROUGH_ANOTHER_NAME = {
    "schedule.images": "recipe.steps",
    "data.mix.mpp": "entry.mpp",
    "cluster.readers": "cluster.reader_bounds",
    "data.mix.share": "entry.share",
}


@pytest.mark.parametrize("field", leaves(Recipe))
def test_every_field_is_read(field: str) -> None:
    read = attributes_read()
    field = field.replace("augment.", "strengths.")  # what `augment/` calls the section beside its own name
    section_and_name = ".".join(field.split(".")[-2:])
    wanted = THROUGH_ANOTHER_NAME.get(field, section_and_name if "." in field else f"recipe.{field}")
    assert wanted in read, f"{field} changes nothing"
