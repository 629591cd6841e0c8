"""Twenty whole steps of the platform against the plain PyTorch step: losses, gradients, weights and average."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_reference import relative_distance, tiles_of
from safetensors.torch import load_file, save_file
from torch import Tensor
from workers import launch, tiny_recipe

from histoscale.bench.plain_step import PlainStep
from histoscale.config.archs import ARCHS, Arch
from histoscale.config.recipe import Recipe
from histoscale.models import build_ssl_net

STEPS = 20
PLAIN_ARCH = Arch(patch_px=14, depth=2, width=32, heads=2, layer_scale=None)

pytestmark = pytest.mark.timeout(600)


def plain_recipe() -> Recipe:
    recipe = tiny_recipe(zero_stage=2).model_dump()
    recipe["batch"] |= {"tiles": 6, "replicas": 1}
    recipe["model"] |= {"drop_path": 0.0}
    recipe["optim"] |= {"layer_decay": 1.0, "patch_embed_lr": 0.2, "freeze_last_layer_images": 30}
    recipe["schedule"] = {"images": 6 * (STEPS + 2)}
    return Recipe.model_validate(recipe)


def platform_run(rank: int, folder: Path) -> None:
    from histoscale.storage import open_store
    from histoscale.train.trainer import build_trainer

    ARCHS["vit_test14"] = PLAIN_ARCH
    recipe = plain_recipe()
    trainer = build_trainer(recipe, torch.device("cpu"), open_store(folder))
    metrics = [trainer.step(step, [tiles_of(recipe, step, 0)]) for step in range(STEPS)]
    state = trainer._state()
    for kind in ("fp32", "ema", "exp_avg"):
        save_file({name: part.tensors[kind].view(part.shape).clone() for name, part in state.items()}, folder / kind)
    (folder / "metrics.json").write_text(json.dumps([{"grad_norm": m.grad_norm, **m.terms} for m in metrics]))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("platform")
    launch(platform_run, 1, folder)
    return folder


@pytest.fixture(scope="module")
def theirs(ours: Path) -> tuple[PlainStep, list[dict[str, float]]]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHS, "vit_test14", PLAIN_ARCH)
        recipe = plain_recipe()
        plain = PlainStep(recipe, build_ssl_net(recipe).state_dict(), torch.float32)
        batches = (tiles_of(recipe, step, 0) for step in range(STEPS))
        return plain, [plain.run(step, each.tiles, each.sample_ids) for step, each in enumerate(batches)]


def weights_of(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("name", ["dino", "ibot", "kde", "grad_norm"])
def test_curves_are_the_same(ours: Path, theirs: tuple[PlainStep, list[dict[str, float]]], name: str) -> None:
    metrics: list[dict[str, Any]] = json.loads((ours / "metrics.json").read_text())
    curve = [step[name] for step in theirs[1]]
    assert [step[name] for step in metrics] == pytest.approx(curve, rel=2e-5)
    assert np.std(curve) > 1e-3 * abs(np.mean(curve))


def test_weights_average_and_gradients_are_the_same(
    ours: Path, theirs: tuple[PlainStep, list[dict[str, float]]]
) -> None:
    plain = theirs[0]
    assert relative_distance(load_file(ours / "fp32"), weights_of(plain.student)) < 1e-5
    assert relative_distance(load_file(ours / "ema"), weights_of(plain.teacher)) < 1e-5
    gradients = {
        group["name"]: plain.optimizer.state[group["params"][0]]["exp_avg"] for group in plain.optimizer.param_groups
    }
    assert relative_distance(load_file(ours / "exp_avg"), gradients) < 1e-4
    assert relative_distance(weights_of(plain.teacher), weights_of(plain.student)) > 1e-3
