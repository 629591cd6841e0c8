"""What the plan costs on an archive of 3,100,000 slides: until the first tiles, in memory, and for each tile."""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from histoscale.bench.figure import Figure
from histoscale.config.recipe import BatchSection, DataSection, Recipe
from histoscale.sampling.plan import Plan
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.synthetic import SyntheticArchive, make_archive

_SLIDES = 3_100_000
_RECIPE = Recipe(
    data=DataSection(balance=("site", "scanner", "stain", "tissue"), temperature=2.0, max_tiles_per_slide=4_000),
    batch=BatchSection(tiles=4096, replicas=512, chapter_steps=4, tiles_per_visit=4),
)
_EARLY_STEP, _LATE_STEP = 0, 1_000_000
_CHAPTERS, _PASSES = 64, 7


def plan() -> Iterator[Figure]:
    """`plan.first_batch_s`, `plan.peak_rss_bytes` and `plan.cost_us_per_tile`, of new processes on a file."""
    with tempfile.TemporaryDirectory(prefix="histoscale-plan-") as folder:
        path = Path(folder) / "catalogue.npy"
        _child("write", str(path), str(_SLIDES))
        start_s = time.monotonic()
        found = json.loads(_child("measure", str(path)))
    details = {"slides": _SLIDES, "strata": found["strata"], "tiles_of_the_run": _RECIPE.schedule.images}
    first_s = found["first_batch_at_s"] - start_s
    yield Figure("plan.first_batch_s", first_s, "s", details=details | {"of_it_plan_s": found["plan_s"]})
    yield Figure("plan.peak_rss_bytes", found["peak_rss_bytes"], "bytes", details={"file_bytes": found["file_bytes"]})
    early, late = found["early"], found["late"]
    yield Figure(
        "plan.cost_us_per_tile",
        late["cached_us"],
        "us",
        details={
            f"step_{_EARLY_STEP}": early["cached_us"],
            f"step_{_LATE_STEP}": late["cached_us"],
            f"step_{_EARLY_STEP}_with_masks": early["with_masks_us"],
            f"step_{_LATE_STEP}_with_masks": late["with_masks_us"],
            "tiles_a_chapter": _RECIPE.batch.per_replica * _RECIPE.batch.chapter_steps,
        },
    )


def _child(*arguments: str) -> str:
    # The peak memory of a process starts at that of its parent: so this one stays small.
    command = [sys.executable, "-m", "histoscale.bench.plan", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(path: Path) -> dict[str, Any]:
    """Plan the first chapter over the catalogue in a file, then time early and late ones."""
    archive = SyntheticArchive(np.load(path, mmap_mode="r"))
    start_s = time.monotonic()
    planned = Plan(PlanSpec.from_recipe(_RECIPE), archive.rows, archive.columns, archive.values, archive.mask)
    plan_s = time.monotonic() - start_s
    planned.chapter(0, 0, _RECIPE.batch.chapter_steps - 1)
    first_batch_at_s = time.monotonic()
    early, late = _cost(planned, _EARLY_STEP), _cost(planned, _LATE_STEP)
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "first_batch_at_s": first_batch_at_s,
        "plan_s": plan_s,
        "strata": [len(line.strata) for line in planned.report().magnifications],
        "early": early,
        "late": late,
        "peak_rss_bytes": peak_rss_bytes,
        "file_bytes": path.stat().st_size,
    }


def _cost(planned: Plan, first_step: int) -> dict[str, float]:
    """Microseconds a tile: when every mask is read, and (median of several passes) when none is."""
    tiles = _CHAPTERS * _RECIPE.batch.chapter_steps * _RECIPE.batch.per_replica
    passes_us = []
    for _ in range(1 + _PASSES):
        start_s = time.perf_counter()
        for replica in range(1, 1 + _CHAPTERS):
            planned.chapter(replica, first_step, first_step + _RECIPE.batch.chapter_steps - 1)
        passes_us.append((time.perf_counter() - start_s) / tiles * 1e6)
    return {"with_masks_us": passes_us[0], "cached_us": statistics.median(passes_us[1:])}


def _main() -> None:
    what, path, *rest = sys.argv[1:]
    if what == "write":
        np.save(path, make_archive(int(rest[0])).rows)
    else:
        sys.stdout.write(json.dumps(measure(Path(path))))


if __name__ == "__main__":
    _main()
