"""A warm start on several workers: one of them reads the published weights, and a run that goes on needs none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import workers
from safetensors.torch import load_file, save_file
from workers import launch, tiny_recipe, train

from histoscale.config.recipe import Recipe
from histoscale.errors import HistoscaleError
from histoscale.models import VisionTransformer
from histoscale.models.weights import initialise
from histoscale.storage import open_store

STEPS = 3

pytestmark = pytest.mark.timeout(600)


def warm_recipe(folder: Path, stage: int) -> Recipe:
    values = tiny_recipe(zero_stage=stage).model_dump()
    values["model"] |= {"weights": str(folder / "weights.safetensors"), "qk_norm": True}  # which the file lacks
    return Recipe.model_validate(values)


def one(rank: int, folder: Path) -> None:
    train(rank, warm_recipe(folder, 2), folder / "one", STEPS)


def two(rank: int, folder: Path) -> None:
    """Runs whose second rank cannot read; when they have a commit the file is removed, and they go on."""
    from histoscale.train import warm_start
    from histoscale.train.trainer import build_trainer

    if rank:
        warm_start.load_for = cannot_read
    started = build_trainer(warm_recipe(folder, 2), torch.device("cpu"), open_store(folder / "unused"))
    state = dict(started.student.deepspeed.module.backbone.named_parameters())
    weights = load_file(folder / "weights.safetensors")
    report: dict[str, Any] = {"started": [name for name in weights if torch.equal(state[name], weights[name])]}
    for stage in (2, 3):
        train(rank, warm_recipe(folder, stage), folder / f"two-{stage}", STEPS - 1)
    dist.barrier()
    if rank == 0:
        (folder / "weights.safetensors").unlink()
    dist.barrier()
    for stage in (2, 3):
        train(rank, warm_recipe(folder, stage), folder / f"two-{stage}", STEPS)
    try:
        train(rank, warm_recipe(folder, 2), folder / "unused", STEPS)
    except HistoscaleError as error:
        report["without"] = str(error)
    (folder / f"report-{rank}.json").write_text(json.dumps(report))


def cannot_read(recipe: Recipe, path: str) -> None:
    raise AssertionError(f"this rank reads {path}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    net = VisionTransformer(workers.LIVELY_ARCH, 42)
    initialise(net, seed=9, matrix_std=0.1)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / "weights.safetensors")
    launch(one, 1, folder)
    launch(two, 2, folder)
    return folder


def losses_of(run: Path, rank: int = 0) -> list[float]:
    parts = sorted(run.glob(f"metrics-*-rank-{rank}.json"))
    return [step["loss"] for part in parts for step in json.loads(part.read_text())]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_starts_from_what_the_first_one_reads(runs: Path, rank: int) -> None:
    names = [name for name, _ in VisionTransformer(workers.LIVELY_ARCH, 42).named_parameters()]
    assert sorted(json.loads((runs / f"report-{rank}.json").read_text())["started"]) == sorted(names)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_without_the_file(runs: Path, stage: int) -> None:
    assert len(losses_of(runs / "one")) == STEPS
    for rank in (0, 1):
        assert losses_of(runs / f"two-{stage}", rank) == pytest.approx(losses_of(runs / "one"), rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_new_run_is_refused_without_the_file_on_every_rank(runs: Path, rank: int) -> None:
    assert "weights.safetensors" in json.loads((runs / f"report-{rank}.json").read_text())["without"]
