"""What a step tells of a run's health: the same at any world size, and what the words say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from plain_reference import tiles_of
from tests.documented_metrics import as_documented, documented
from workers import flat, launch, tiny_recipe, turns

from histoscale.config.recipe import Recipe
from histoscale.sampling.tile_groups import SlideStrata
from histoscale.storage import open_store
from histoscale.train.health import WATCH_EVERY_STEPS

STEPS = WATCH_EVERY_STEPS + 1
STRATA = SlideStrata(("site=A", "site=B"), np.array([0, 0, 0, 0, 0, 1, 1, 1], np.uint8))
ALWAYS = ("mean_cosine", "grad_norm", "loss_by_mpp/0.25", "loss_by_mpp/0.5", "loss_by_mpp/1", "loss_by_mpp/2")
WATCHED = (
    "health/effective_rank",
    "health/target_entropy",
    "health/prototype_use",
    "optim/update_norm",
    "optim/ema_distance",
)

pytestmark = pytest.mark.timeout(300)


def recipe_of(zero_stage: int) -> Recipe:
    recipe = tiny_recipe(zero_stage=zero_stage).model_dump()
    recipe["schedule"] = {"images": STEPS * recipe["batch"]["tiles"]}
    return Recipe.model_validate(recipe)


def watched_run(rank: int, folder: Path, zero_stage: int) -> None:
    """Steps to the second one that is watched; what they tell, and what the first one's is made of."""
    from histoscale.cluster.worker import _scalars
    from histoscale.train.trainer import build_trainer

    recipe, workers = recipe_of(zero_stage), dist.get_world_size()
    trainer = build_trainer(recipe, torch.device("cpu"), open_store(folder / f"run-{workers}"), strata=STRATA)
    tokens: list[torch.Tensor] = []
    losses = trainer.objective.losses

    def kept(*arguments: Any) -> Any:
        made = losses(*arguments)
        tokens.append(made.cls_bD.clone())
        return made

    trainer.objective.losses = kept  # type: ignore[method-assign]
    before = {name: part.tensors["fp32"].clone() for name, part in trainer.teacher.masters.items()}
    told, names, oracle = [], [], {}
    for step in range(STEPS):
        metrics = trainer.step(step, turns(recipe, rank, step))
        told.append(flat(metrics))
        names.append(sorted(_scalars(metrics)))
        if step == 0 and workers == 1:
            singular = np.linalg.svd(torch.cat(tokens).double().numpy(), compute_uv=False)
            shares = singular / singular.sum()
            now = torch.cat([part.tensors["fp32"] for part in trainer.teacher.masters.values()])
            mean = torch.cat([part.tensors["ema"] for part in trainer.teacher.fragments.values()])
            oracle = {
                "health/effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
                "optim/update_norm": float((now - torch.cat(list(before.values()))).norm() / now.norm()),
                "optim/ema_distance": float((mean - now).norm() / now.norm()),
            }
    (folder / f"told-{workers}-{rank}.json").write_text(json.dumps({"told": told, "names": names, "oracle": oracle}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("health")
    launch(watched_run, 1, folder, 2)
    launch(watched_run, 3, folder, 3)
    return folder


def told(folder: Path, workers: int, rank: int = 0) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = json.loads((folder / f"told-{workers}-{rank}.json").read_text())["told"]
    return lines


def test_three_workers_tell_what_one_tells(folder: Path) -> None:
    one, three = told(folder, 1), told(folder, 3)
    for ours, theirs in zip(three, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in (*ALWAYS, *(name for name in (*WATCHED, "loss_by_stratum/site=A") if name in theirs)):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (theirs["step"], name)


def test_all_ranks_tell_the_same(folder: Path) -> None:
    assert told(folder, 3, 0) == told(folder, 3, 1) == told(folder, 3, 2)


def test_what_is_costly_is_told_of_some_steps_only(folder: Path) -> None:
    for step, values in enumerate(told(folder, 1)):
        assert [name for name in WATCHED if name in values] == (list(WATCHED) if step in (0, STEPS - 1) else [])


def test_every_name_is_documented_and_every_documented_name_is_told(folder: Path) -> None:
    """But for what the worker's clock adds: a job's own file is held against the table in the integration tests."""
    for step, names in enumerate(json.loads((folder / "told-1-0.json").read_text())["names"]):
        wanted = documented(watched=step in (0, STEPS - 1), strata=True)
        clocks = {name for name in wanted if name.startswith("time/")} | {"step", "progress/goodput"}
        assert as_documented(names, wanted) == wanted - clocks


def test_norms_and_rank_are_those_of_plain_formulas(folder: Path) -> None:
    oracle = json.loads((folder / "told-1-0.json").read_text())["oracle"]
    values = told(folder, 1)[0]
    assert {name: values[name] for name in oracle} == pytest.approx(oracle, rel=1e-5)


def test_groups_make_up_the_whole(folder: Path) -> None:
    recipe = recipe_of(2)
    for step, values in enumerate(told(folder, 1)):
        batches = [tiles_of(recipe, step, replica) for replica in range(recipe.batch.replicas)]
        mpp = np.concatenate([batch.mpp for batch in batches])
        of_stratum = STRATA.of_row[np.concatenate([batch.slides for batch in batches])]
        scales = [values[f"loss_by_mpp/{scale:g}"] for scale in mpp]
        assert np.mean(scales) == pytest.approx(values["dino"], rel=1e-5)
        strata = [values[f"loss_by_stratum/{STRATA.names[stratum]}"] for stratum in of_stratum]
        assert np.mean(strata) == pytest.approx(values["dino"], rel=1e-5)
        absent = set(range(2)) - set(of_stratum.tolist())
        assert not [name for name in absent if f"loss_by_stratum/{STRATA.names[name]}" in values]
