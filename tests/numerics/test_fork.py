"""A fork begins with the parent's state, bit for bit, at another world size and ZeRO stage, and resumes as any run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from workers import STEPS, TILES_PER_STEP, flat, launch, tiny_recipe, turns, whole_state

from histoscale.checkpoint.fragments import Fragment
from histoscale.checkpoint.parent import parent_at, write_parent
from histoscale.checkpoint.reader import commit_at
from histoscale.config.recipe import Recipe
from histoscale.storage import open_store

WORKERS = 3
HALF = STEPS // 2

pytestmark = pytest.mark.timeout(600)


def longer(stage: int, **crops: int) -> Recipe:
    """The parent's recipe with another schedule, and other crops where they are given."""
    values = tiny_recipe(zero_stage=stage).model_dump()
    values["schedule"] |= {"images": 20 * TILES_PER_STEP}
    values["crops"] |= crops
    values["data"] |= {"region_px": 66}
    return Recipe.model_validate(values)


def begin(parent: Path, recipe: Recipe, run: Path) -> Any:
    from histoscale.train.trainer import build_trainer

    theirs, store = open_store(parent), open_store(run)
    write_parent(store, parent_at(theirs.uri, commit_at(theirs, HALF), None))
    return build_trainer(recipe, torch.device("cpu"), store)


def differing(trainer: Any, whole: dict[str, Fragment]) -> list[str]:
    """Which tensors of this rank's state are not those of the parent's commit."""
    return [
        f"{name} {kind}"
        for name, part in trainer._state().items()
        for kind, tensor in part.tensors.items()
        if part.shape != whole[name].shape
        or not torch.equal(tensor, whole[name].tensors[kind][part.offset : part.offset + part.numel])
    ]


def go_on(rank: int, trainer: Any, recipe: Recipe, stop: int) -> list[dict[str, Any]]:
    start = trainer.next_step
    metrics = [flat(trainer.step(step, turns(recipe, rank, step))) for step in range(start, stop)]
    trainer.save(stop)
    return metrics


def three_workers(rank: int, halfway: Path, folder: Path) -> None:
    from histoscale.train.trainer import build_trainer

    for stage in (1, 2, 3):
        parent, recipe = halfway / f"zero-{stage}", longer(stage % 3 + 1)
        trainer = begin(parent, recipe, folder / f"whole-{stage}")
        report: dict[str, Any] = {"start": trainer.resume(), "differing": differing(trainer, whole_state(parent, HALF))}
        optimizer = trainer.student.deepspeed.optimizer.optimizer
        report["updates"] = sorted({int(state["step"]) for state in optimizer.state.values()})
        # Runs of all stages agree to rounding, not to the bit.
        report["teacher"] = {name: p.double().sum().item() for name, p in trainer.teacher.network.named_parameters()}
        report["whole"] = go_on(rank, trainer, recipe, 2)

        parts = folder / f"parts-{stage}"
        trainer = begin(parent, recipe, parts)
        trainer.resume()
        report["parts"] = go_on(rank, trainer, recipe, 1)
        trainer = build_trainer(recipe, torch.device("cpu"), open_store(parts))
        report["resumed at"] = trainer.resume()
        report["parts"] += go_on(rank, trainer, recipe, 2)

        recipe = longer(stage, global_px=56)
        trainer = begin(parent, recipe, folder / f"larger-{stage}")
        trainer.resume()
        report["larger"] = differing(trainer, whole_state(parent, HALF))
        report["larger loss"] = trainer.step(0, turns(recipe, rank, 0)).loss
        (folder / f"report-{stage}-rank-{rank}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def forks(two_workers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forks")
    launch(three_workers, WORKERS, two_workers / "halfway", folder)
    return folder


@pytest.fixture(params=[1, 2, 3], ids="from-zero-{}".format)
def reports(forks: Path, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    paths = [forks / f"report-{request.param}-rank-{rank}.json" for rank in range(WORKERS)]
    return [json.loads(path.read_text()) for path in paths]


def test_weights_moments_and_average_are_the_parents(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert (report["start"], report["differing"], report["updates"]) == (0, [], [HALF])


def test_every_rank_computes_with_the_parents_teacher(reports: list[dict[str, Any]], two_workers: Path) -> None:
    assert all(report["teacher"] == reports[0]["teacher"] for report in reports)
    whole = whole_state(two_workers / "halfway" / "zero-1", HALF)
    sums = {name: part.tensors["ema"].double().sum().item() for name, part in whole.items()}
    assert reports[0]["teacher"] == pytest.approx(sums, rel=1e-4, abs=1e-4)


def test_a_fork_in_two_parts_equals_the_whole_bit_for_bit(reports: list[dict[str, Any]], forks: Path) -> None:
    assert reports[0]["resumed at"] == 1
    assert reports[0]["parts"] == reports[0]["whole"]
    for stage in (1, 2, 3):
        whole, parts = (whole_state(forks / f"{kind}-{stage}", 2) for kind in ("whole", "parts"))
        assert all(
            torch.equal(tensor, parts[name].tensors[kind])
            for name, part in whole.items()
            for kind, tensor in part.tensors.items()
        )


def test_larger_crops_change_the_position_embedding_alone(reports: list[dict[str, Any]]) -> None:
    assert {name.split()[0] for report in reports for name in report["larger"]} == {"backbone.pos_embed"}
    assert all(math.isfinite(report["larger loss"]) for report in reports)
