"""Faults planted in runs that train for real: each rings its alarm within a stated number of steps, a healthy run none.

The flipped sign of KDE is in `test_collapse.py`.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from plain_reference import tiles_of
from workers import launch, tiny_recipe

from histoscale.config.recipe import Recipe
from histoscale.observe.alarms import STARVED_STEPS, Alarms
from histoscale.observe.runaway import RECENT_STEPS, Ring
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.tile_groups import SlideStrata
from histoscale.slides.tile_check import TileCheck
from histoscale.storage import open_store
from histoscale.stream.chapters import Chapter, ChapterTiles, deal
from histoscale.stream.feed import RankFeed
from histoscale.stream.reader import ReaderSpec
from histoscale.stream.windows import FeedSpec
from histoscale.train.health import WATCH_EVERY_STEPS

STEPS = 160
FAULT_AT = 90
SLIDES = 8
STRATA = SlideStrata(("site=A", "site=B", "site=C", "site=D"), (np.arange(SLIDES) // 2).astype(np.uint8))
CORRUPT = "site=D"
SLOW_READ_S = 0.3

pytestmark = pytest.mark.timeout(600)

Tiles = Callable[[Recipe, int, int], Any]


def recipe_of(steps: int = STEPS, **optim: Any) -> Recipe:
    """A run in which DINO has something to learn: the colours of tiles, which are left as they are."""
    recipe = tiny_recipe(zero_stage=1).model_dump()
    recipe["batch"] |= {"tiles": 16, "replicas": 2}
    recipe["model"] |= {"drop_path": 0.0}
    recipe["heads"] |= {"dino_prototypes": 32, "ibot_prototypes": 32}
    recipe["augment"] |= {"hue": 0.02, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1}
    recipe["augment"] |= {"grayscale_p": 0.0, "solarize_p": 0.0, "blur_p": (0.0, 0.0, 0.0)}
    recipe["loss"] |= {"kde_weight": 0.1, "ibot_weight": 0.1, "teacher_temperature": (0.04, 0.04)}
    recipe["optim"] |= {"lr": 5e-4, "warmup_images": 320, "freeze_last_layer_images": 0, "clip_norm": 3.0}
    recipe["optim"] |= {"ema_momentum": (0.9, 1.0), "layer_decay": 1.0} | optim
    recipe["schedule"] = {"images": 16 * steps}
    return Recipe.model_validate(recipe)


def corrupted(recipe: Recipe, step: int, replica: int) -> Any:
    """Tiles of which those of a stratum are noise from a step on."""
    batch = tiles_of(recipe, step, replica)
    for row in np.flatnonzero(STRATA.of_row[batch.slides] == STRATA.names.index(CORRUPT)):
        if step >= FAULT_AT:
            draws = np.random.default_rng(int(batch.sample_ids[row]))
            batch.tiles[row] = draws.integers(0, 256, batch.tiles[row].shape)
    return batch


class SlowShare:
    """Blocks of one rank, each of which takes its time; no Ray."""

    rank, workers = 0, 1

    def __init__(self, recipe: Recipe, tiles: Tiles, read_s: float) -> None:
        self._recipe, self._tiles, self._read_s = recipe, tiles, read_s

    def open(self, steps: range, prefetch: int) -> Iterator[pa.Table]:
        for chapter in deal(PlanSpec.from_recipe(self._recipe), 1, steps.start, steps.stop):
            time.sleep(self._read_s)
            yield self._block(chapter)

    def _block(self, chapter: Chapter) -> pa.Table:
        steps = range(chapter.first_step, chapter.last_step + 1)
        batches = [self._tiles(self._recipe, step, int(chapter.replica or 0)) for step in steps]
        columns = [np.stack([getattr(each, name) for each in batches]) for name in ("sample_ids", "slides", "mpp")]
        return ChapterTiles(*columns, np.stack([each.tiles for each in batches]), ()).to_block(chapter)


def run(folder: Path, name: str, recipe: Recipe, tiles: Tiles, read_s: float = 0.0) -> None:
    """Train as a worker does, and keep what it would write."""
    from histoscale.cluster.worker import _Clock, _scalars
    from histoscale.train.trainer import build_trainer

    reader = ReaderSpec("/index", "0" * 16, PlanSpec.from_recipe(recipe), {}, TileCheck(0.0, 0.0), folder, 1)
    feed = RankFeed(FeedSpec(recipe.steps, reader, (1, 1)), SlowShare(recipe, tiles, read_s), 0)
    trainer = build_trainer(recipe, torch.device("cpu"), open_store(folder / name), strata=STRATA)
    clock, lines = _Clock(recipe.batch.tiles), []
    for step in range(recipe.steps):
        metrics = trainer.step(step, feed.micro_batches(step))
        lines.append({"step": step, **_scalars(metrics), **clock.tick(feed.wait_s)})
    feed.close()
    (folder / f"{name}.json").write_text(json.dumps(lines))


def all_runs(rank: int, folder: Path) -> None:
    recipe = recipe_of()
    run(folder, "healthy", recipe, tiles_of)
    run(folder, "rate", recipe_of(lr=100 * recipe.optim.lr), tiles_of)
    run(folder, "starved", recipe_of(steps=STARVED_STEPS + 10), tiles_of, SLOW_READ_S)
    run(folder, "corrupt", recipe, corrupted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    launch(all_runs, 1, folder)
    return folder


def rings(folder: Path, name: str) -> list[tuple[int, Ring]]:
    alarms, lines = Alarms(recipe_of()), json.loads((folder / f"{name}.json").read_text())
    return [(int(values["step"]), ring) for values in lines for ring in alarms.update(values)]


def test_a_healthy_run_rings_none(folder: Path) -> None:
    assert rings(folder, "healthy") == []


def test_a_hundredfold_rate_is_told_within_thirty_steps(folder: Path) -> None:
    step, ring = rings(folder, "rate")[0]
    assert ring.alarm == "divergence"
    assert step < 3 * WATCH_EVERY_STEPS


def test_a_slow_reader_is_told_as_soon_as_there_are_steps_enough(folder: Path) -> None:
    [(step, ring)] = rings(folder, "starved")
    assert (step, ring.alarm) == (STARVED_STEPS - 1, "starvation")


def test_a_corrupt_stratum_is_told_by_name(folder: Path) -> None:
    [(step, ring)] = rings(folder, "corrupt")
    assert ring.alarm == "group"
    assert CORRUPT in ring.said
    assert FAULT_AT < step <= FAULT_AT + RECENT_STEPS
    assert ring.since >= FAULT_AT - RECENT_STEPS
