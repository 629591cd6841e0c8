"""A tiny run folder with an index of real slides beside it, for the tests of pictures."""

from pathlib import Path
from typing import Any

import torch
from tests.small_archive import grey_squares, write_small_archive

from histoscale.checkpoint.fragments import EMA, MASTER, Fragment
from histoscale.checkpoint.ledger import StepRecord
from histoscale.checkpoint.writer import Snapshot, write_checkpoint
from histoscale.cluster.run_folder import start_run
from histoscale.config.decode import decode_recipe, fingerprint
from histoscale.config.recipe import Recipe
from histoscale.models import build_ssl_net
from histoscale.slides.catalogue import open_catalogue
from histoscale.storage import Store, open_store
from histoscale.stream.faults import Fault

TILES, STEPS = 8, 12
IDS = [f"{number:032x}" for number in range(0xABC00001, 0xABC00005)]
SITES = ("north", "south", "north", "south")
VALUES: dict[str, Any] = {
    "precision": "fp32",
    "data": {
        "mix": [{"mpp": 0.5, "share": 3}, {"mpp": 1.0, "share": 1}],
        "region_px": 70,
        "balance": ["site"],
        "min_tissue": 0.5,
        "min_tile_tissue": 0.0,
        "min_sharpness": 0.0,
    },
    "batch": {"tiles": TILES, "replicas": 2, "chapter_steps": 2, "tiles_per_visit": 1},
    "model": {"arch": "vit_test14"},
    "heads": {"dino_prototypes": 64, "ibot_prototypes": 64},
    "crops": {"global_px": 56, "local_px": 28, "local_count": 2},
    "schedule": {"images": STEPS * TILES},
}


def recipe_of(**evaluation: Any) -> Recipe:
    """The recipe of the run, with this evaluation."""
    return decode_recipe(VALUES | {"evaluation": evaluation})


def write_slides(folder: Path) -> str:
    """Four slides of noise at 0.5 um/px with their index; gives the index."""
    slides = [grey_squares(number, 40, 230, (960, 960)) for number in range(len(IDS))]
    write_small_archive(folder, slides, "Mustermann", IDS, ("site",), [(site,) for site in SITES])
    return open_store(folder / "index").uri


def begin(folder: Path, index_uri: str) -> Store:
    """The run folder before its first step."""
    store = open_store(folder)
    start_run(store, recipe_of(), index_uri, open_catalogue(index_uri).snapshot_id)
    return store


def commit(store: Store, first: int, stop: int, faults: dict[int, Fault] | None = None) -> None:
    """Commit steps `first` to `stop - 1`, whose teacher differs from that of every other commit."""
    torch.manual_seed(stop)
    faults, teacher = faults or {}, dict(build_ssl_net(recipe_of()).named_parameters())
    kinds = (MASTER, "exp_avg", "exp_avg_sq", EMA)
    flat = {name: (0.3 * torch.randn(value.shape)).flatten() for name, value in teacher.items()}
    fragments = {
        name: Fragment(0, value.numel(), tuple(value.shape), dict.fromkeys(kinds, flat[name]))
        for name, value in teacher.items()
    }
    records = [
        StepRecord(step, ((step * TILES, TILES),), tuple(f for k, f in faults.items() if k // TILES == step))
        for step in range(first, stop)
    ]
    shapes = {name: tuple(value.shape) for name, value in teacher.items()}
    content = fingerprint(recipe_of()), fragments, shapes, records, {"workers": "1"}
    write_checkpoint(store, Snapshot(stop, stop * TILES, *content), keep_last=3)
