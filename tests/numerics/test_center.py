"""Centring instead of Sinkhorn-Knopp: its running mean is state of the run, whatever the world size."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from workers import TILES_PER_STEP, launch, tiny_recipe, train

from histoscale.checkpoint.fragments import CENTER_PREFIX
from histoscale.checkpoint.reader import latest_commit, load_teacher, read_manifest
from histoscale.config.recipe import Recipe
from histoscale.storage import open_store

STOPS = (2, 5)

pytestmark = pytest.mark.timeout(300)


def center_recipe() -> Recipe:
    recipe = tiny_recipe(zero_stage=2).model_dump()
    recipe["loss"] |= {"centering": "center", "center_momentum": 0.5, "koleo_weight": 0.1, "spread_group": 3}
    recipe["heads"] |= {"shared": True}
    return Recipe.model_validate(recipe)


def in_one_go(rank: int, folder: Path) -> None:
    train(rank, center_recipe(), folder / "whole", STOPS[-1])


def first_half(rank: int, folder: Path) -> None:
    train(rank, center_recipe(), folder / "parts", STOPS[0])


def second_half(rank: int, folder: Path) -> None:
    train(rank, center_recipe(), folder / "parts", STOPS[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("centers")
    launch(in_one_go, 1, folder)
    launch(first_half, 2, folder)
    launch(second_half, 1, folder)
    return folder


def metrics_of(run: Path, start: int) -> list[dict[str, Any]]:
    return json.loads((run / f"metrics-{start}-rank-0.json").read_text())


def test_a_run_in_parts_at_two_world_sizes_follows_the_whole_one(runs: Path) -> None:
    whole = metrics_of(runs / "whole", 0)
    parts = metrics_of(runs / "parts", 0) + metrics_of(runs / "parts", STOPS[0])
    for name in ("loss", "dino", "ibot", "koleo", "grad_norm"):
        assert [step[name] for step in parts] == pytest.approx([step[name] for step in whole], rel=1e-5), name


def test_centres_are_committed_and_are_no_part_of_the_network(runs: Path) -> None:
    store = open_store(runs / "parts")
    commit = latest_commit(store)
    assert commit is not None
    assert commit.images_seen == STOPS[1] * TILES_PER_STEP
    centers = {name: shape for name, shape in read_manifest(store, commit).shapes.items() if "center" in name}
    assert centers == {f"{CENTER_PREFIX}dino": (96,), f"{CENTER_PREFIX}ibot": (96,)}
    teacher = load_teacher(store, commit)
    assert "dino_head.prototypes.weight" in teacher
    assert not any(name.startswith(CENTER_PREFIX) for name in teacher)


def test_the_centre_is_the_running_mean_of_the_teachers_logits() -> None:
    from histoscale.train.objective import PrototypeObjective

    recipe = center_recipe()
    objective = PrototypeObjective(recipe, lambda crops, mask: {}, lambda x: x, hide_masked=True)
    features, prototypes = torch.randn(4, 8), torch.randn(96, 8)
    outputs = [{"dino": features, "dino_prototypes": prototypes}]
    objective._assign("dino", outputs, 0.05, 4)
    assert not objective.centers["dino"].any()
    objective.advance()
    torch.testing.assert_close(objective.centers["dino"], 0.5 * (features @ prototypes.T).mean(dim=0))
    before = objective.centers["dino"].clone()
    objective._assign("dino", [{"dino": features[:0], "dino_prototypes": prototypes}], 0.05, 0)
    objective.advance()
    assert torch.equal(objective.centers["dino"], before)
