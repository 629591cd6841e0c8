"""Runs of one recipe by any number of workers: what each of their steps had, and what they leave behind.

Under torch.multiprocessing tiles are read without Ray; under Ray the whole of the product's own path is taken.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archive import DATA, open_reader, read, read_turns
from plain_reference import MicroBatch, PlainRun, relative_distance, run_plain
from torch import Tensor
from workers import LIVELY_ARCH, TILES_PER_STEP, flat, tiny_recipe, whole_state

from histoscale.augment import augment, block_masks
from histoscale.config.archs import ARCHS
from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.storage import open_store
from histoscale.train.objective import Inputs

STEPS = 30
STAGES = (1, 2, 3)
TERMS = ("loss", "dino", "ibot", "kde")
KINDS = ("fp32", "ema", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Leg:
    """Steps of a run until one of them, by one group of workers.

    Attributes:
        run: Its folder below that of the index.
        order: In which a worker takes its turns, where that is not the order of the replicas.
    """

    run: str
    zero_stage: int
    stop: int = STEPS
    precision: str = "fp32"
    order: tuple[int, ...] = ()
    threads: int = 1


# What groups of so many workers do, one after the other: a run that is resumed, and the beginning of runs in bf16.
GROUPS = [
    (3, [Leg("resumed", 2, stop=15), *(Leg(f"bf16-3-{stage}", stage, stop=1, precision="bf16") for stage in STAGES)]),
    (2, [Leg("resumed", 3, stop=22)]),
    (1, [Leg("resumed", 1), *(Leg(f"bf16-1-{stage}", stage, stop=1, precision="bf16") for stage in STAGES)]),
]


@dataclass(frozen=True)
class Record:
    """What was seen of one run.

    Attributes:
        metrics: Of each step.
        rates: Of each step, the learning rates and weight decays that groups of parameters had, each pair once.
        inputs: "step/replica" -> digests of what was made of its micro-batch.
    """

    metrics: list[dict[str, Any]]
    rates: list[list[tuple[float, float]]]
    inputs: dict[str, dict[str, str]]


def grid_recipe(precision: str = "fp32", **cluster: Any) -> Recipe:
    """The tiny recipe over thirty steps, on the tiles of an index."""
    values = tiny_recipe().model_dump(mode="json") | {"precision": precision}
    values["data"] |= DATA
    values["schedule"] = {"images": STEPS * TILES_PER_STEP}
    values["cluster"] |= cluster
    return decode_recipe(values)


def run_plain_grid(folder: Path) -> PlainRun:
    """The run as one plain process does it, on the index in this folder."""
    recipe = grid_recipe()
    return run_plain(recipe, STEPS, partial(read, open_reader(recipe, folder)))


def train_legs(rank: int, folder: Path, legs: Sequence[Leg]) -> None:
    """Take each leg in turn, on the index in this folder."""
    from histoscale.train.trainer import build_trainer

    for leg in legs:
        torch.set_num_threads(leg.threads)
        recipe, run = grid_recipe(leg.precision, zero_stage=leg.zero_stage), folder / leg.run
        reader = open_reader(recipe, folder)
        with recorded(run, rank):
            trainer = build_trainer(recipe, torch.device("cpu"), open_store(run))
            for step in range(trainer.resume(), leg.stop):
                turns = read_turns(reader, recipe, rank, step)
                trainer.step(step, [turns[turn] for turn in leg.order] if leg.order else turns)
            trainer.save(leg.stop)


def train_under_ray(folder: Path, run: str, workers: int, zero_stage: int) -> None:
    """The same by the job's own path: a driver, Ray Train, and tiles that Ray Data feeds."""
    from histoscale.cluster import launch
    from histoscale.cluster.pretrain import PretrainRequest, check_request, pretrain

    recipe = grid_recipe(zero_stage=zero_stage, workers=workers, readers=1, device="cpu")
    request = PretrainRequest(recipe, str(folder / "index"), str(folder / run), holder="the grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "train_worker", train_ray_worker)
        pretrain(check_request(request), lambda line: None)


def train_ray_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker: the product's own function, watched."""
    import ray.train

    from histoscale.cluster.worker import train_worker

    ARCHS["vit_test14"] = LIVELY_ARCH
    with recorded(Path(config["spec"].run_uri), ray.train.get_context().get_world_rank()):
        train_worker(config)


@contextlib.contextmanager
def recorded(run: Path, rank: int) -> Iterator[None]:
    """Write what the steps of this process had into the run's folder."""
    from histoscale.train.trainer import Trainer

    steps: list[dict[str, Any]] = []
    update = Trainer.update

    def update_and_note(self: Trainer, step: int, micro_batches: Any, prepared: Any, stop: bool = False) -> Any:
        metrics = update(self, step, micro_batches, prepared, stop)
        used = [batch for batch in micro_batches if batch is not None]
        inputs = {batch.replica: digests(batch, made) for batch, made in zip(used, prepared.inputs, strict=True)}
        groups = self.student.deepspeed.optimizer.param_groups
        rates = sorted({(group["lr"], group["weight_decay"]) for group in groups})
        steps.append({"metrics": flat(metrics), "rates": rates, "inputs": inputs})
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", update_and_note)
        yield
    first = steps[0]["metrics"]["step"]
    (run / f"steps-{first:02d}-rank-{rank}.json").write_text(json.dumps(steps))


def expected_inputs(folder: Path) -> dict[str, dict[str, str]]:
    """Digests of all micro-batches of the recipe on the index in this folder, each made for itself."""
    recipe = grid_recipe()
    reader, expected = open_reader(recipe, folder), {}
    patches = recipe.crops.global_px // LIVELY_ARCH.patch_px
    for step, replica in product(range(STEPS), range(recipe.batch.replicas)):
        batch = read(reader, recipe, step, replica)
        views = augment(torch.from_numpy(batch.tiles), batch.sample_ids, recipe)
        mask = torch.from_numpy(block_masks(batch.sample_ids, recipe.seed, patches, recipe.loss))
        expected[f"{step}/{replica}"] = digests(batch, Inputs(replica, views, mask))
    return expected


def digests(batch: MicroBatch, inputs: Inputs) -> dict[str, str]:
    """Of sample ids, tiles, crops and mask of one micro-batch."""
    views = inputs.views
    arrays = {
        "samples": np.asarray(batch.sample_ids),
        "tiles": np.asarray(batch.tiles),
        "global crops": views.global_crops.float().numpy(),
        "local crops": views.local_crops.float().numpy(),
        "mask": inputs.mask.numpy(),
    }
    return {name: hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for name, array in arrays.items()}


def record_of(run: Path) -> Record:
    """What all ranks saw of a run, which must agree."""
    record = Record([], [], {})
    for path in sorted(run.glob("steps-*-rank-0.json")):
        ranks = [json.loads(each.read_text()) for each in sorted(run.glob(path.name.replace("rank-0", "rank-*")))]
        for turn in zip(*ranks, strict=True):
            assert all(each["metrics"] == turn[0]["metrics"] for each in turn)
            assert all(each["rates"] == turn[0]["rates"] for each in turn)
            step = turn[0]["metrics"]["step"]
            seen = [(f"{step}/{replica}", found) for each in turn for replica, found in each["inputs"].items()]
            assert len(dict(seen)) == len(seen), "a replica is one rank's"
            record.metrics.append(turn[0]["metrics"])
            record.rates.append([tuple(pair) for pair in turn[0]["rates"]])
            record.inputs.update(seen)
    return record


def state_of(run: Path, step: int = STEPS) -> dict[str, dict[str, Tensor]]:
    """Kind -> name -> tensor of a commit."""
    whole = whole_state(run, step)
    return {kind: {name: part.tensors[kind].view(part.shape) for name, part in whole.items()} for kind in KINDS}


def curve_distance(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], name: str) -> float:
    """The largest relative difference of two curves.

    KDE is the logarithm of a density and passes through zero: its difference is the relative one of the density.
    """
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / max(abs(b), 1.0 if name == "kde" else 0.0) for a, b in pairs)


def tensor_distances(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> relative distance of each tensor, the biases of attention's keys left out.

    Such a bias adds the same to all scores of a query, so its gradient is zero but for rounding; and AdamW makes
    updates of that.
    """
    parts = {}
    for name in theirs:
        pairs = [(ours[name], theirs[name])]
        if name.endswith("attn.qkv.bias"):
            query, _, value = zip(ours[name].chunk(3), theirs[name].chunk(3), strict=True)
            pairs = [query, value]
        for number, (a, b) in enumerate(pairs):
            parts[f"{name} {number}"] = relative_distance({name: a}, {name: b})
    return parts
