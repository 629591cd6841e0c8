"""What the workers of the capture tests do: train on tiles of an index, break the state, fail, compare."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import archive
import numpy as np
import torch
import torch.distributed as dist
import workers
from numpy.typing import NDArray

from histoscale.checkpoint.capture import read_capture
from histoscale.checkpoint.fragments import MASTER, Fragment, master_fragments, parameter_shapes, refresh_parameters
from histoscale.checkpoint.reader import load_into
from histoscale.cluster.replay import ReplayRequest, replay
from histoscale.cluster.run_folder import start_run
from histoscale.config.archs import ARCHS
from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.errors import NonFiniteError
from histoscale.slides.catalogue import open_catalogue
from histoscale.storage import open_store

ARCH = ARCHS["vit_test14"]
WHITE = f"{1:032x}"  # the id of the slide that is white all over
HUGE = 3.4e38  # finite in fp32, and above what bf16 holds


@dataclass(frozen=True)
class Case:
    """What is broken in the student's weights before which step, and in which run."""

    name: str
    zero_stage: int
    step: int
    spoil: dict[str, Callable[[torch.Tensor], object]]
    precision: str = "fp32"

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.zero_stage, self.precision)


def _brighten(weight: torch.Tensor) -> None:
    """The first channel sums a patch so enlarged that the square of a white one, and of no other, overflows."""
    weight[: 3 * 14 * 14] = 1.4e17


def _fill(value: float) -> Callable[[torch.Tensor], None]:
    def fill(weight: torch.Tensor) -> None:
        weight[0] = value

    return fill


FC1 = "backbone.blocks.0.mlp.fc1.weight"
CASES = [
    Case("white", 2, 1, {"backbone.patch_embed.proj.weight": _brighten}),
    Case("inf", 3, 1, {FC1: _fill(math.inf)}),
    Case("bf16", 2, 0, {"dino_head.prototypes.weight": _fill(HUGE)}, "bf16"),
    Case("first", 3, 0, {FC1: _fill(math.inf)}),
    # Nothing comes out of the head, so the forward pass is finite; but its last layer learns from inputs that are huge.
    Case(
        "gradient",
        2,
        1,
        {
            "ibot_head.mlp.2.weight": lambda weight: weight.mul_(1e33),
            "ibot_head.mlp.4.weight": torch.Tensor.zero_,
            "ibot_head.mlp.4.bias": torch.Tensor.zero_,
        },
        "bf16",
    ),
]


def recipe_of(zero_stage: int = 2, precision: str = "fp32") -> Recipe:
    """The tiny recipe on the tiny index, without colour jitter, so that white stays white."""
    values = workers.tiny_recipe(zero_stage=zero_stage).model_dump(mode="json") | {"precision": precision}
    values["augment"] |= {"jitter_p": 0.0, "grayscale_p": 0.0, "solarize_p": 0.0, "blur_p": [0.0, 0.0, 0.0]}
    values["data"] |= archive.DATA
    return decode_recipe(values)


def slides() -> list[NDArray[np.uint8]]:
    """Five, of which the first is white."""
    return [np.full((640, 800, 3), 255, np.uint8), *(archive.noise(seed, 120, 137) for seed in range(1, 5))]


def fail_and_capture(rank: int, folder: Path) -> None:
    """One run of each case: a good step, a broken state, a captured failure; reports what is in the capture."""
    from histoscale.train.trainer import build_trainer

    ARCHS["vit_test14"] = ARCH  # what other processes have
    snapshot_id = open_catalogue(str(folder / "index")).snapshot_id
    for case in CASES:
        recipe, run = case.recipe, folder / case.name
        store = open_store(run)
        if rank == 0:
            start_run(store, recipe, str(folder / "index"), snapshot_id)
        reader = archive.open_reader(recipe, folder)
        trainer = build_trainer(recipe, torch.device("cpu"), store)
        for step in range(case.step):
            trainer.step(step, archive.read_turns(reader, recipe, rank, step))
        masters = master_fragments(trainer.student.deepspeed)
        for name in case.spoil.keys() & masters.keys():
            case.spoil[name](masters[name].tensors[MASTER])
        refresh_parameters(trainer.student.deepspeed)
        before = _state_of(trainer, case.step)
        try:
            trainer.step(case.step, archive.read_turns(reader, recipe, rank, case.step))
        except NonFiniteError as error:
            report = {"error": str(error), "unchanged": workers._same(before, _state_of(trainer, case.step))}
        capture = read_capture(store, f"captures/{next((run / 'captures').iterdir()).name}")
        held = _held(trainer)
        load_into(store, capture.state, held, parameter_shapes(trainer.student.deepspeed))
        live = trainer._state()
        report["held"] = all(
            torch.equal(tensor, live[name].tensors[kind])
            for name, part in held.items()
            for kind, tensor in part.tensors.items()
        )
        (folder / f"{case.name}-{rank}.json").write_text(json.dumps(report))
        dist.barrier()


def replay_all(rank: int, requests: dict[str, ReplayRequest], told: Path) -> None:
    """The lines of each, in one process."""
    ARCHS["vit_test14"] = ARCH
    told.write_text(json.dumps({name: list(replay(request)) for name, request in requests.items()}))


def _state_of(trainer: Any, step: int) -> dict[str, torch.Tensor]:
    """All of the state; before the first step there are no moments."""
    if step:
        return workers._state_of(trainer)
    masters = master_fragments(trainer.student.deepspeed)
    return {name: part.tensors[MASTER].clone() for name, part in masters.items()}


def _held(trainer: Any) -> dict[str, Fragment]:
    return {
        name: replace(part, tensors={kind: torch.full_like(tensor, 7.0) for kind, tensor in part.tensors.items()})
        for name, part in trainer._state().items()
    }
