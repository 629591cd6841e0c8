"""KDE keeps the tokens of different tiles apart; with its sign flipped a run collapses, and the alarm rings."""

import json
from pathlib import Path

import pytest
import torch
from plain_reference import tiles_of
from workers import launch, tiny_recipe

from histoscale.config.recipe import Recipe
from histoscale.observe.alarms import Alarms
from histoscale.observe.runaway import Ring

STEPS = 90
RINGS_WITHIN = 40

pytestmark = pytest.mark.timeout(300)

Curve = list[dict[str, float]]


def toy_recipe() -> Recipe:
    recipe = tiny_recipe(zero_stage=1).model_dump()
    recipe["batch"] |= {"tiles": 8, "replicas": 1}
    recipe["loss"] |= {"kde_weight": 1.0}
    recipe["optim"] |= {"warmup_images": 80, "freeze_last_layer_images": 0}
    recipe["schedule"] = {"images": 8 * STEPS}
    return Recipe.model_validate(recipe)


def toy_runs(rank: int, folder: Path) -> None:
    from histoscale.cluster.worker import _scalars
    from histoscale.storage import open_store
    from histoscale.train.trainer import build_trainer

    recipe = toy_recipe()
    for sign in (1.0, -1.0):
        trainer = build_trainer(recipe, torch.device("cpu"), open_store(folder / str(sign)))
        weights = trainer._train_step._weights
        weights[trainer.objective.names.index("kde")] *= sign
        metrics = [trainer.step(step, [tiles_of(recipe, step, 0)]) for step in range(STEPS)]
        lines = [{"step": each.step, "time/wait_share": 0.0, **_scalars(each)} for each in metrics]
        (folder / f"curve{sign:+.0f}.json").write_text(json.dumps(lines))


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    folder = tmp_path_factory.mktemp("toy")
    launch(toy_runs, 1, folder)
    return {sign: json.loads((folder / f"curve{sign}.json").read_text()) for sign in ("+1", "-1")}


def rings(curve: Curve) -> list[tuple[float, Ring]]:
    alarms = Alarms(toy_recipe())
    return [(values["step"], ring) for values in curve for ring in alarms.update(values)]


def test_kde_lowers_the_mean_cosine(curves: dict[str, Curve]) -> None:
    cosines = [values["health/mean_cosine"] for values in curves["+1"]]
    assert sum(cosines[-10:]) / 10 < min(0.5, cosines[0] - 0.1)
    assert rings(curves["+1"]) == []


def test_the_flipped_sign_collapses_the_run_and_the_alarm_rings(curves: dict[str, Curve]) -> None:
    assert min(values["health/mean_cosine"] for values in curves["-1"][-10:]) > 0.98
    [(step, ring)] = rings(curves["-1"])
    assert ring.alarm == "collapse"
    assert step < RINGS_WITHIN


def test_a_collapse_shows_in_the_effective_rank(curves: dict[str, Curve]) -> None:
    apart, together = ([line["health/effective_rank"] for line in curves[sign][20::10]] for sign in ("+1", "-1"))
    assert min(apart) > 2 * max(together)
