"""Runs with a real commit, small enough to export in a test, and what is wanted of their exports."""

from pathlib import Path

import torch

from histoscale.checkpoint.fragments import EMA, MASTER, Fragment
from histoscale.checkpoint.writer import Snapshot, write_checkpoint
from histoscale.config.archs import ARCHS
from histoscale.config.decode import decode_recipe, fingerprint
from histoscale.config.recipe import Recipe
from histoscale.export.run import ExportRequest, ExportResult, export_run
from histoscale.models import SSLNet, build_ssl_net
from histoscale.storage import Store, open_store


def tiny_recipe(arch: str = "vit_test14", seed: int = 0, qk_norm: bool = False, patches: int = 2) -> Recipe:
    patch_px = ARCHS[arch].patch_px
    return decode_recipe(
        {
            "seed": seed,
            "data": {"region_px": 64},
            "batch": {"tiles": 4, "replicas": 2},
            "model": {"arch": arch, "drop_path": 0.1, "qk_norm": qk_norm},
            "heads": {"dino_prototypes": 8, "ibot_prototypes": 8, "hidden_dim": 8},
            "crops": {"global_px": patches * patch_px, "local_px": patch_px},
            "schedule": {"images": 8},
        }
    )


def teacher_of(recipe: Recipe) -> SSLNet:
    """A net whose every parameter is far from its initial value."""
    net = build_ssl_net(recipe)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return net


def committed_run(folder: Path, recipe: Recipe, step: int = 2) -> Store:
    """A run with a real commit in which the student differs from the teacher."""
    teacher = dict(teacher_of(recipe).named_parameters())
    fragments = {
        name: Fragment(
            0,
            tensor.numel(),
            tuple(tensor.shape),
            {
                MASTER: torch.zeros(tensor.numel()),
                "exp_avg": torch.zeros(tensor.numel()),
                "exp_avg_sq": torch.zeros(tensor.numel()),
                EMA: tensor.detach().flatten(),
            },
        )
        for name, tensor in teacher.items()
    }
    snapshot = Snapshot(
        step=step,
        images_seen=step * recipe.batch.tiles,
        fingerprint=fingerprint(recipe),
        fragments=fragments,
        shapes={name: tuple(tensor.shape) for name, tensor in teacher.items()},
        records=[],
        written_by={},
    )
    store = open_store(folder)
    write_checkpoint(store, snapshot, keep_last=2)
    return store


def exported(tmp_path: Path, recipe: Recipe, layout: str = "timm", licence: str | None = None) -> ExportResult:
    """The export of a new run, in tmp_path/out."""
    store = committed_run(tmp_path / "run", recipe)
    return export_run(store, recipe, ExportRequest(str(tmp_path / "out"), layout, licence=licence))
