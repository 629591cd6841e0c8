"""No dead fields: every field of the recipe is read somewhere outside `config/`."""

import ast
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from histoscale.config.recipe import Recipe

PACKAGE = Path(__file__).parents[2] / "platform" / "histoscale"


def leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        nested = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        names += leaves(nested, f"{prefix}{name}.") if nested else [prefix + name]
    return names


def attributes_read() -> set[str]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "config":
            continue
        found |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    return found


@pytest.mark.parametrize("field", leaves(Recipe))
def test_every_field_is_read(field: str) -> None:
    read = attributes_read()
    name = field.split(".")[-1]
    through_recipe = {"images": "steps"}  # `schedule.images` is read as `recipe.steps`
    assert name in read or through_recipe.get(name) in read, f"{field} changes nothing"
