"""Starts groups of training processes on gloo, and what these do. Results go to files in the folder of a test."""

import json
import logging
import math
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from plain_reference import tiles_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from histoscale.checkpoint.fragments import EMA, MASTER, MOMENTS, Fragment, master_fragments
from histoscale.checkpoint.reader import commit_at, load_into, read_manifest
from histoscale.config.archs import ARCHS
from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.errors import HistoscaleError, StorageError
from histoscale.models.vit import Block
from histoscale.sampling.replicas import replicas_of
from histoscale.storage import open_store
from histoscale.storage.local import LocalStore

STEPS = 6
TILES_PER_STEP = 12

# LayerScale starts at 1e-5 otherwise: six steps would hardly reach the blocks, and all class tokens would be one.
LIVELY_ARCH = replace(ARCHS["vit_test14"], layer_scale=None)


def tiny_recipe(**cluster: Any) -> Recipe:
    """Four replicas of three tiles, everything scheduled, clipped, dropped and masked within six steps."""
    return decode_recipe(
        {
            "seed": 5,
            "precision": "fp32",
            "data": {"region_px": 56},
            "batch": {"tiles": TILES_PER_STEP, "replicas": 4, "chapter_steps": 2, "tiles_per_visit": 2},
            "model": {"arch": "vit_test14", "drop_path": 0.2},
            "heads": {
                "dino_prototypes": 96,
                "ibot_prototypes": 64,
                "hidden_dim": 48,
                "dino_bottleneck_dim": 24,
                "ibot_bottleneck_dim": 16,
            },
            "crops": {"global_px": 42, "local_px": 28, "local_count": 2},
            "loss": {"kde_weight": 0.3, "teacher_temperature_warmup_images": 3 * TILES_PER_STEP},
            "optim": {
                "lr": 2e-3,
                "warmup_images": 2 * TILES_PER_STEP,
                "clip_norm": 1.0,
                "ema_momentum": [0.8, 1.0],
                "layer_decay": 0.8,
                "freeze_last_layer_images": TILES_PER_STEP,
            },
            "schedule": {"images": (STEPS + 2) * TILES_PER_STEP},
            "checkpoint": {"every_steps": 3, "keep_last": 2},
            "cluster": cluster,
        }
    )


def launch(target: Callable[..., None], workers: int, *args: Any) -> None:
    """Run `target(rank, *args)` in a process group of `workers` new processes.

    They are forks of one process that has imported everything and computed nothing: imports take seconds.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    multiprocessing.set_forkserver_preload(["deepspeed.runtime.zero.muon.muon_optimizer", "histoscale.train.trainer"])
    with tempfile.TemporaryDirectory() as folder:
        args = (workers, f"{folder}/rendezvous", target, args)
        mp.start_processes(_enter, args=args, nprocs=workers, start_method="forkserver")


def _enter(rank: int, workers: int, rendezvous: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    logging.getLogger("histoscale").addHandler(logging.NullHandler())
    ARCHS["vit_test14"] = LIVELY_ARCH
    target(rank, *args)
    dist.barrier()
    dist.destroy_process_group()
    # Results are in files. Ending the interpreter in order would race with threads of native libraries, which abort.
    os._exit(0)


def three_workers(rank: int, folder: Path) -> None:
    """Runs of ZeRO 2 and 3 in one go; three workers pad, as three do not divide four."""
    for stage in (2, 3):
        train(rank, tiny_recipe(zero_stage=stage), folder / f"zero-{stage}", STEPS)


def two_workers(rank: int, folder: Path) -> None:
    """Runs of ZeRO 1, 2 and 3, with copies of what they left halfway; one of blocks that are computed twice; and all
    that must be refused.
    """
    for stage in (1, 2, 3):
        recipe, run = tiny_recipe(zero_stage=stage), folder / f"zero-{stage}"
        train(rank, recipe, run, STEPS // 2)
        if rank == 0:
            shutil.copytree(run, folder / "halfway" / f"zero-{stage}")
        train(rank, recipe, run, STEPS)
    compute_blocks_twice(rank, folder)
    resume_foreign(rank, folder)
    resume_in_part(rank, folder)
    commit_beside_training(rank, folder)
    for stage in (1, 2, 3):
        misbehave(rank, stage, folder)


def one_worker(rank: int, halfway: Path, folder: Path) -> None:
    """Goes on with the runs that two workers left, with another ZeRO stage each: 1 by 2, 2 by 3, 3 by 1.

    Then, in bf16, for ZeRO 1, 2 and 3: a run in one go beside a run that stops, and resumes from its own checkpoint.
    """
    for stage in (1, 2, 3):
        train(rank, tiny_recipe(zero_stage=stage % 3 + 1), halfway / f"zero-{stage}", STEPS)
    for stage in (1, 2, 3):
        recipe = tiny_recipe(zero_stage=stage).model_copy(update={"precision": "bf16"})
        train(rank, recipe, folder / f"whole-{stage}", STEPS)
        for stop in (STEPS // 2, STEPS):
            train(rank, recipe, folder / f"parts-{stage}", stop)


def train(rank: int, recipe: Recipe, run: Path, stop: int) -> None:
    """Resume the run, train to step `stop`, save, report."""
    from histoscale.train.trainer import build_trainer

    trainer = build_trainer(recipe, torch.device("cpu"), open_store(run))
    start = trainer.resume()
    metrics = [flat(trainer.step(step, turns(recipe, rank, step))) for step in range(start, stop)]
    trainer.save(stop)
    (run / f"metrics-{start}-rank-{rank}.json").write_text(json.dumps(metrics))


def flat(metrics: Any) -> dict[str, Any]:
    """The metrics of a step with its terms, and what is told apart or of some steps only, among them."""
    values = dict(vars(metrics))
    parts = [values.pop(name) for name in ("terms", "groups", "watched")]
    return {**values, **{name: value for part in parts for name, value in part.items()}}


def turns(recipe: Recipe, rank: int, step: int) -> list[Any]:
    """This rank's micro-batches of a step, None for padding."""
    mine = replicas_of(rank, dist.get_world_size(), recipe.batch.replicas)
    return [None if replica is None else tiles_of(recipe, step, replica) for replica in mine]


def whole_state(run: Path, step: int) -> dict[str, Fragment]:
    """Every tensor of a commit."""
    store = open_store(run)
    commit = commit_at(store, step)
    shapes = read_manifest(store, commit).shapes
    kinds = (MASTER, EMA, *MOMENTS)
    whole = {
        name: Fragment(0, math.prod(shape), shape, {kind: torch.empty(math.prod(shape)) for kind in kinds})
        for name, shape in shapes.items()
    }
    load_into(store, commit, whole, shapes)
    return whole


class RefusesOnce(LocalStore):
    """A folder whose first write fails; a fake."""

    refused = False

    def put_parts(self, key: str, parts: Sequence[memoryview]) -> None:
        if not self.refused:
            self.refused = True
            raise StorageError("the disk of this rank is full")
        super().put_parts(key, parts)


def commit_beside_training(rank: int, folder: Path) -> None:
    """A run committed while it trains, whose first checkpoint fails on the last rank; then its newest one is damaged.

    The damage is in what only the last rank reads.
    """
    from histoscale.train.trainer import build_trainer

    recipe, run = tiny_recipe(zero_stage=2), folder / "beside"
    last = rank == dist.get_world_size() - 1
    trainer = build_trainer(recipe, torch.device("cpu"), RefusesOnce(run) if last else open_store(run))
    trainer.resume()
    committed = []
    for step in range(STEPS):
        trainer.step(step, turns(recipe, rank, step))
        found = trainer.settle(wait=False)
        if step + 1 in (1, 2, 4):
            found = trainer.begin_save(step + 1) or found
        committed += [found.step] if found else []
    committed.append(trainer.save(STEPS).step)
    again = trainer.save(STEPS).folder
    if last:
        flip_a_bit(run / again / "rank-1-of-2.safetensors")
    dist.barrier()
    resumed = build_trainer(recipe, torch.device("cpu"), open_store(run))
    start = resumed.resume()
    dist.barrier()
    markers = sorted(path.name for path in (run / "checkpoints").glob("*.json"))
    for step in range(start, STEPS):
        resumed.step(step, turns(recipe, rank, step))
    resumed.begin_save(STEPS)
    resumed.settle(wait=True)
    report = {"committed": committed, "resumed at": start, "markers": markers}
    (folder / f"beside-rank-{rank}.json").write_text(json.dumps(report))


def resume_foreign(rank: int, folder: Path) -> None:
    """Resume a run with another learning rate, and report the refusal of every rank."""
    from histoscale.train.trainer import build_trainer

    recipe = tiny_recipe(zero_stage=1)
    other = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"lr": 1e-3})})
    trainer = build_trainer(other, torch.device("cpu"), open_store(folder / "zero-1"))
    (folder / f"refusal-{rank}.txt").write_text(_error_of(trainer.resume))


def compute_blocks_twice(rank: int, folder: Path) -> None:
    """A run under ZeRO 3 that keeps no activations of its blocks; reports how often a block was computed."""
    calls: list[nn.Module] = []
    hook = register_module_forward_pre_hook(lambda module, _: calls.append(module) if type(module) is Block else None)
    train(rank, tiny_recipe(zero_stage=3, activation_checkpointing=True), folder / "twice", STEPS)
    hook.remove()
    (folder / f"twice-rank-{rank}.json").write_text(json.dumps(len(calls)))


def resume_in_part(rank: int, folder: Path) -> None:
    """Resume from a checkpoint of which what the last rank reads is damaged, and try to go on; report all refusals."""
    from histoscale.train.trainer import build_trainer

    recipe, run = tiny_recipe(zero_stage=2), folder / "damaged"
    if rank == 0:
        shutil.copytree(folder / "halfway" / "zero-2", run)
        flip_a_bit(next(run.glob("checkpoints/*/rank-1-of-2.safetensors")))
    dist.barrier()
    trainer = build_trainer(recipe, torch.device("cpu"), open_store(run))
    masters = master_fragments(trainer.student.deepspeed)
    before = {name: part.tensors[MASTER].clone() for name, part in masters.items()}
    report = {
        "resume": _error_of(trainer.resume),
        "read": [name for name, part in masters.items() if not torch.equal(before[name], part.tensors[MASTER])],
        "step": _error_of(partial(trainer.step, 0, turns(recipe, rank, 0))),
        "save": _error_of(partial(trainer.save, STEPS // 2)),
    }
    (folder / f"in-part-rank-{rank}.json").write_text(json.dumps(report))


def flip_a_bit(file: Path) -> None:
    """In the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def misbehave(rank: int, stage: int, folder: Path) -> None:
    """Good steps, and between them, on the last rank only, what must not be trained on; report all."""
    from histoscale.train.trainer import build_trainer

    recipe = tiny_recipe(zero_stage=stage)
    last = rank == dist.get_world_size() - 1
    trainer = build_trainer(recipe, torch.device("cpu"), open_store(folder / f"misbehaved-{stage}"))
    forward = trainer.student.forward
    report: dict[str, Any] = {}
    for step, case in enumerate(("gradient", "loss")):
        report[f"asked to stop at {step}"] = trainer.step(step, turns(recipe, rank, step), last and step == 0).stop
        before = _state_of(trainer)
        if last:
            trainer.student.forward = partial(_poisoned, forward, case)  # type: ignore[method-assign]
        report[f"{case}: error"] = _error_of(partial(trainer.step, step + 1, turns(recipe, rank, step + 1)))
        report[f"{case}: unchanged"] = _same(before, _state_of(trainer))
        trainer.student.forward = forward  # type: ignore[method-assign]
    report["order: error"] = _error_of(partial(trainer.step, 3, turns(recipe, rank, 3)))
    report["save: error"] = _error_of(partial(trainer.save, 3))
    (folder / f"report-{stage}-rank-{rank}.json").write_text(json.dumps(report))


def _poisoned(
    forward: Callable[..., dict[str, Tensor]], case: str, *inputs: Tensor, hide_masked: bool
) -> dict[str, Tensor]:
    outputs = forward(*inputs, hide_masked=hide_masked)
    if case == "loss":
        return outputs | {"dino": outputs["dino"] * math.nan}
    outputs["dino"].register_hook(lambda gradient: gradient * math.inf)
    return outputs


def _state_of(trainer: Any) -> dict[str, Tensor]:
    state = {
        f"{name}/{kind}": tensor.clone()
        for name, part in trainer._state().items()
        for kind, tensor in part.tensors.items()
    }
    return state | {f"teacher/{name}": p.detach().clone() for name, p in trainer.teacher.network.named_parameters()}


def _same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def _error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except HistoscaleError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
