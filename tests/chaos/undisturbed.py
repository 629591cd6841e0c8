"""The run that nothing happens to: the same recipe in one plain process, without Ray, window or restart.

    python -m tests.chaos.undisturbed --index INDEX --out RUN --recipe RECIPE [--set FIELD=VALUE]

Prints the loss of every step as JSON, and leaves one commit in RUN: that of the last step.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import torch
import torch.distributed as dist

from histoscale.cluster.run_folder import resolve_precision
from histoscale.config.decode import load_recipe
from histoscale.config.recipe import Recipe
from histoscale.slides.catalogue import open_catalogue
from histoscale.storage import open_store
from histoscale.stream.chapters import deal
from histoscale.stream.feed import RankFeed
from histoscale.stream.reader import Reader, ReaderSpec
from histoscale.stream.windows import FeedSpec
from histoscale.train.trainer import build_trainer

THREADS = 2


@dataclass
class _WholePlan:
    """All blocks of the plan, read one after the other where they are used."""

    spec: ReaderSpec
    rank: int = 0
    workers: int = 1

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self.spec)

    def open(self, steps: range, prefetch: int) -> Iterator[pa.Table]:
        for chapter in deal(self.spec.plan, self.workers, steps.start, steps.stop):
            yield self._reader(chapter.to_row())


def train(recipe: Recipe, index_uri: str, run_uri: str) -> list[float]:
    """Train the whole run; returns the loss of each step."""
    catalogue = open_catalogue(index_uri)
    spec = ReaderSpec.from_recipe(recipe, index_uri, catalogue.snapshot_id, {})
    feed = RankFeed(FeedSpec(recipe.steps, spec, (1, 1)), _WholePlan(spec), 0)
    trainer = build_trainer(recipe, torch.device("cpu"), open_store(run_uri))
    losses = [trainer.step(step, feed.micro_batches(step)).loss for step in range(trainer.resume(), recipe.steps)]
    trainer.save(recipe.steps)
    feed.close()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--index", "--out", "--recipe"):
        parser.add_argument(name, required=True)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    recipe = resolve_precision(load_recipe(arguments.recipe, arguments.set), "fp32")
    sys.stdout.write(json.dumps(train(recipe, arguments.index, arguments.out)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
