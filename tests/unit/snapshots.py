"""Snapshots of a small network for the tests of checkpoints, each step with a state of its own."""

import math
from pathlib import Path

import torch
from torch import Tensor

from histoscale.checkpoint.fragments import Fragment
from histoscale.checkpoint.ledger import StepRecord
from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.writer import Snapshot
from histoscale.storage.store import Store

SHAPES: dict[str, tuple[int, ...]] = {"backbone.a": (5, 7), "backbone.b": (11,), "head.c": (2, 3, 4)}
KINDS = ("fp32", "exp_avg", "exp_avg_sq", "ema")
SHARD = "rank-0-of-1.safetensors"


def state(seed: int) -> dict[str, Tensor]:
    """The values of `name/kind`, flat."""
    draws = torch.Generator().manual_seed(seed)
    return {
        f"{name}/{kind}": torch.randn(math.prod(shape), generator=draws)
        for name, shape in SHAPES.items()
        for kind in KINDS
    }


def snapshot(step: int, *, start: int | None = None) -> Snapshot:
    """The state after `step` steps, with the records of those from `start` on."""
    values = state(step)
    fragments = {
        name: Fragment(0, math.prod(shape), shape, {kind: values[f"{name}/{kind}"] for kind in KINDS})
        for name, shape in SHAPES.items()
    }
    first = step - 1 if start is None else start
    records = [StepRecord(number, ((10 * number, 10),)) for number in range(first, step)]
    return Snapshot(step, 10 * step, "recipe", fragments, SHAPES, records, {"workers": "1"})


def shard_path(store: Store, commit: Commit) -> Path:
    """The only shard of a commit of one worker."""
    return Path(store.uri) / commit.folder / SHARD
