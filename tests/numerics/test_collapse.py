"""KDE keeps the tokens of different tiles apart; with its sign flipped a run collapses, and the alarm rings."""

from pathlib import Path

import pytest
import torch
from plain_reference import tiles_of
from safetensors.torch import load_file, save_file
from workers import launch, tiny_recipe

from histoscale.config.recipe import Recipe
from histoscale.observe.alarms import CollapseAlarm

STEPS = 90

pytestmark = pytest.mark.timeout(300)


def toy_recipe() -> Recipe:
    recipe = tiny_recipe(zero_stage=1).model_dump()
    recipe["batch"] |= {"tiles": 8, "replicas": 1}
    recipe["loss"] |= {"kde_weight": 1.0}
    recipe["optim"] |= {"warmup_images": 80, "freeze_last_layer_images": 0}
    recipe["schedule"] = {"images": 8 * STEPS}
    return Recipe.model_validate(recipe)


def toy_runs(rank: int, folder: Path) -> None:
    from histoscale.storage import open_store
    from histoscale.train.trainer import build_trainer

    recipe = toy_recipe()
    for sign in (1.0, -1.0):
        trainer = build_trainer(recipe, torch.device("cpu"), open_store(folder / str(sign)))
        weights = trainer._train_step._weights
        weights[trainer.objective.names.index("kde")] *= sign
        metrics = [trainer.step(step, [tiles_of(recipe, step, 0)]) for step in range(STEPS)]
        curves = {name: torch.tensor([vars(each)[name] for each in metrics]) for name in ("mean_cosine", "images_seen")}
        save_file(curves, folder / f"curves-{sign:+.0f}")


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("toy")
    launch(toy_runs, 1, folder)
    return {
        sign: {name: values.tolist() for name, values in load_file(folder / f"curves-{sign}").items()}
        for sign in ("+1", "-1")
    }


def alarms(curve: dict[str, list[float]]) -> list[str]:
    alarm = CollapseAlarm(toy_recipe().optim.warmup_images)
    said = [
        alarm.update({"progress/images_seen": images, "health/mean_cosine": cosine})
        for images, cosine in zip(curve["images_seen"], curve["mean_cosine"], strict=True)
    ]
    return [each for each in said if each is not None]


def test_kde_lowers_the_mean_cosine(curves: dict[str, dict[str, list[float]]]) -> None:
    cosines = curves["+1"]["mean_cosine"]
    assert sum(cosines[-10:]) / 10 < min(0.5, cosines[0] - 0.1)
    assert alarms(curves["+1"]) == []


def test_the_flipped_sign_collapses_the_run_and_the_alarm_rings(curves: dict[str, dict[str, list[float]]]) -> None:
    assert min(curves["-1"]["mean_cosine"][-10:]) > 0.98
    assert len(alarms(curves["-1"])) == 1
