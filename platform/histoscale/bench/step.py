"""How much of the machine a training step uses, and what it costs beside the same step in plain PyTorch.

On the CPU, ViT-S/14 in fp32 and bf16, against two baselines of the same call: a naive stack of the same blocks, forward
and backward alone, and the plain step of `plain_step.py`. On a GPU, ViT-S, L and H with 131,072 prototypes. The peak is
that of the machine's own matrix products. Nothing here needs Ray.
"""

import contextlib
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from histoscale.augment import augment, block_masks
from histoscale.bench.figure import Figure
from histoscale.bench.plain_step import PlainBlock, PlainStep
from histoscale.config.archs import ARCHS
from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.models import build_ssl_net
from histoscale.storage import open_store
from histoscale.train.flops import block_flops, step_flops_per_tile, tokens_of
from histoscale.train.trainer import Trainer, build_trainer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_TILES = 8
GPU_TILES = {"vit_s14_reg4": 128, "vit_l14_reg4": 64, "vit_h14_reg4": 32}
_ROUNDS = 9
# Rows of square matrices, and how often they are multiplied: enough to outlast the start of a GPU's kernels.
_PRODUCTS = {"cpu": (2048, 1), "cuda": (8192, 20)}
_STEPS_OF_PEAK = 2  # the first one's moments are made in it


@dataclass(frozen=True)
class Tiles:
    """One replica's tiles in memory."""

    tiles: NDArray[np.uint8]
    sample_ids: NDArray[np.int64]
    replica: int = 0
    faults: tuple[()] = ()

    @property
    def mpp(self) -> NDArray[np.float64]:
        """All of one scale."""
        return np.full(len(self.sample_ids), 0.5)

    @property
    def slides(self) -> NDArray[np.int32]:
        """All of one slide."""
        return np.zeros(len(self.sample_ids), np.int32)


def step(device: str = "cpu") -> Iterator[Figure]:
    """`step.mfu`, `step.mfu_vs_blocks`, `step.overhead_ratio`, `step.augment_share`; on CUDA tiles and memory."""
    with only_rank(device) as folder:
        if device == "cuda":
            for arch in GPU_TILES:
                yield from _on_gpu(arch, folder)
        else:
            for precision in DTYPES:
                yield from _on_cpu(precision, folder)


@contextlib.contextmanager
def trainer_of(recipe: Recipe, device: torch.device, run: Path) -> Iterator[Trainer]:
    """A trainer that begins with the memory of those before it given back, and lets go of its own in the end."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = build_trainer(recipe, device, open_store(run))
    try:
        yield trainer
    finally:
        trainer.student.close()


@contextlib.contextmanager
def only_rank(device: str) -> Iterator[Path]:
    """A process group of this process alone, and a folder for its runs."""
    with tempfile.TemporaryDirectory(prefix="histoscale-bench-") as folder:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        if device == "cuda":
            torch.cuda.set_device(0)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        try:
            yield Path(folder)
        finally:
            dist.destroy_process_group()


def _on_cpu(precision: str, folder: Path) -> Iterator[Figure]:
    recipe, dtype = step_recipe("vit_s14", CPU_TILES, 4096, precision), DTYPES[precision]
    tiles = random_tiles(recipe)
    trainer = build_trainer(recipe, torch.device("cpu"), open_store(folder / precision))
    plain = PlainStep(recipe, build_ssl_net(recipe).state_dict(), dtype)
    steps, plain_steps = iter(range(10**9)), iter(range(10**9))
    seconds = fastest(
        {
            "product": _product("cpu", dtype),
            "blocks": _naive_blocks(recipe, dtype),
            "plain": lambda: plain.run(next(plain_steps), tiles.tiles, tiles.sample_ids),
            "step": lambda: trainer.step(next(steps), [tiles]),
            "augment": lambda: all_views(recipe, tiles, torch.device("cpu")),
        }
    )
    peak = _product_flops("cpu") / seconds["product"]
    mfu = step_flops_per_tile(recipe, ARCHS["vit_s14"]) * recipe.batch.tiles / seconds["step"] / peak
    blocks_mfu = _naive_flops(recipe) / seconds["blocks"] / peak
    details = {"precision": precision, "tiles": recipe.batch.tiles, "peak_flop_per_s": peak, "seconds": seconds}
    yield Figure("step.mfu", mfu, "share", blocks_mfu, details)
    yield Figure("step.mfu_vs_blocks", mfu / blocks_mfu, "ratio", 1.0, details)
    yield Figure("step.overhead_ratio", seconds["step"] / seconds["plain"], "ratio", 1.0, details)
    yield Figure("step.augment_share", seconds["augment"] / seconds["step"], "share", details=details)


def _on_gpu(arch: str, folder: Path) -> Iterator[Figure]:
    recipe, device = step_recipe(arch, GPU_TILES[arch], 131_072, "bf16"), torch.device("cuda", 0)
    tiles, steps = random_tiles(recipe), iter(range(10**9))
    with trainer_of(recipe, device, folder / arch) as trainer:

        def run() -> None:
            trainer.step(next(steps), [tiles])

        for _ in range(_STEPS_OF_PEAK):
            run()
        # Before the product takes its share.
        peak_memory_bytes = torch.cuda.max_memory_allocated(device)
        seconds = fastest({"product": _product("cuda", torch.bfloat16), "step": run})
    peak = _product_flops("cuda") / seconds["product"]
    tiles_per_s = recipe.batch.tiles / seconds["step"]
    mfu = step_flops_per_tile(recipe, ARCHS[arch]) * tiles_per_s / peak
    details = {
        "arch": arch,
        "gpu": torch.cuda.get_device_name(device),
        "tiles": recipe.batch.tiles,
        "peak_flop_per_s": peak,
        "peak_memory_bytes": peak_memory_bytes,
        "seconds": seconds,
    }
    yield Figure("step.mfu", mfu, "share", details=details)
    yield Figure("step.tiles_per_s", tiles_per_s, "tiles/s", details=details)


def step_recipe(arch: str, tiles: int, prototypes: int, precision: str) -> Recipe:
    """One replica, one worker, no stochastic depth: what the FLOP are counted for."""
    return decode_recipe(
        {
            "precision": precision,
            "batch": {"tiles": tiles, "replicas": 1},
            "model": {"arch": arch, "drop_path": 0.0},
            "heads": {"dino_prototypes": prototypes, "ibot_prototypes": prototypes},
            "schedule": {"images": 1_000_000},
        }
    )


def random_tiles(recipe: Recipe) -> Tiles:
    """Noise, as large as the recipe's regions."""
    side_px = recipe.data.region_px
    pixels = np.random.default_rng(0).integers(0, 256, (recipe.batch.tiles, side_px, side_px, 3), np.uint8)
    return Tiles(pixels, np.arange(recipe.batch.tiles, dtype=np.int64))


def fastest(actions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Least seconds of each over some rounds, in turn: what is compared meets the same noise."""
    for action in actions.values():
        action()
    seconds = dict.fromkeys(actions, float("inf"))
    for _ in range(_ROUNDS):
        for name, action in actions.items():
            start_s = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start_s)
    return seconds


def _product(device: str, dtype: torch.dtype) -> Callable[[], None]:
    size, times = _PRODUCTS[device]
    left, right, out = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))

    def run() -> None:
        for _ in range(times):
            torch.mm(left, right, out=out)

    return run


def _product_flops(device: str) -> int:
    size, times = _PRODUCTS[device]
    return times * 2 * size**3


def _naive_blocks(recipe: Recipe, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of the student's blocks alone, the crops of each size by themselves."""
    arch, tiles, crops = ARCHS[recipe.model.arch], recipe.batch.tiles, recipe.crops
    blocks = nn.Sequential(*(PlainBlock(arch) for _ in range(arch.depth))).to(dtype)
    shapes = ((2, crops.global_px), (crops.local_count, crops.local_px))
    inputs = [torch.randn(count * tiles, tokens_of(arch, px), arch.width, dtype=dtype) for count, px in shapes]

    def run() -> None:
        sum(blocks(each).float().sum() for each in inputs).backward()

    return run


def _naive_flops(recipe: Recipe) -> float:
    arch, crops = ARCHS[recipe.model.arch], recipe.crops
    large, small = (block_flops(arch, tokens_of(arch, px)) for px in (crops.global_px, crops.local_px))
    return 3.0 * recipe.batch.tiles * arch.depth * (2 * large + crops.local_count * small)


def all_views(recipe: Recipe, tiles: Tiles, device: torch.device) -> None:
    """Everything that a step does to pixels before a network sees them."""
    grid = recipe.crops.global_px // ARCHS[recipe.model.arch].patch_px
    augment(torch.from_numpy(tiles.tiles).to(device), tiles.sample_ids, recipe)
    block_masks(tiles.sample_ids, recipe.seed, grid, recipe.loss)
