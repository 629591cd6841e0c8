"""The plan on an archive of 200,000 slides: what it costs to make, and that late steps are like early ones."""

import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from histoscale.bench import plan as bench_plan
from histoscale.config.recipe import Recipe
from histoscale.sampling.plan import Plan
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.synthetic import SyntheticArchive, make_archive

SLIDES = 200_000
SPEC = replace(
    PlanSpec.from_recipe(Recipe()), balance=("site", "scanner"), temperature=2.0, max_tiles_per_slide=100_000
)


@pytest.fixture(scope="module")
def archive() -> SyntheticArchive:
    return make_archive(SLIDES)


def make_plan(archive: SyntheticArchive, spec: PlanSpec = SPEC) -> Plan:
    return Plan(spec, archive.rows, archive.columns, archive.values, archive.mask)


def test_a_plan_takes_bytes_for_each_slide_and_none_for_a_tile(archive: SyntheticArchive) -> None:
    tracemalloc.start()
    try:
        start_s = time.perf_counter()
        plan = make_plan(archive)
        made_s = time.perf_counter() - start_s
        kept_bytes, peak_bytes = tracemalloc.get_traced_memory()
        plan.chapter(0, 0, 3)
        tracemalloc.reset_peak()
        plan.chapter(7, 10**9, 10**9 + 3)
        chapter_bytes = tracemalloc.get_traced_memory()[1] - kept_bytes
    finally:
        tracemalloc.stop()
    sys.stdout.write(f"{made_s:.2f} s; {kept_bytes / 1e6:.1f} MB kept, {peak_bytes / 1e6:.1f} MB at the peak\n")
    assert kept_bytes < 40 * SLIDES
    assert peak_bytes < 100 * SLIDES
    assert chapter_bytes < 8e6


def test_a_plan_over_a_memory_map_holds_no_copy_of_it(archive: SyntheticArchive, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", archive.rows)
    mapped = SyntheticArchive(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    tracemalloc.start()
    try:
        plan = make_plan(mapped)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < archive.rows.nbytes
    chapter = plan.chapter(5, 40, 43)
    np.testing.assert_array_equal(chapter.x_px0, make_plan(archive).chapter(5, 40, 43).x_px0)


def test_bins_of_a_range_cost_no_table_each(archive: SyntheticArchive) -> None:
    supply = make_plan(archive, replace(SPEC, mix=(((0.25, 2.0), 1.0),), max_tiles_per_slide=None))._supply
    assert len(supply.table_of) == 24
    assert len(supply.cycle_at) <= 4  # five scanners, whose scales lie in few bins


@pytest.mark.parametrize("first_step", [0, 1_000_000])
def test_tiles_follow_the_report_early_and_late_in_the_run(archive: SyntheticArchive, first_step: int) -> None:
    plan = make_plan(archive)
    step = [plan.chapter(replica, first_step, first_step) for replica in range(512)]
    rows, mpp = (np.concatenate([getattr(part, name).reshape(-1) for part in step]) for name in ("rows", "mpp"))
    assert len(rows) == 4096
    for line in plan.report().magnifications:
        drawn = archive.rows["strata"][rows[mpp == line.mpp]]
        assert len(drawn) == pytest.approx(4096 * line.share, abs=1)
        sites = [int(stratum.name.split("site-")[1].split(",")[0]) for stratum in line.strata]
        expected = np.bincount(sites, [stratum.share for stratum in line.strata], minlength=40)
        found = np.bincount(drawn[:, 0], minlength=40)
        served = expected > 0
        assert not found[~served].any()
        assert stats.chisquare(found[served], expected[served] * len(drawn)).pvalue > 0.01


def test_the_benchmark_measures_what_it_says(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", make_archive(2_000).rows)
    recipe = bench_plan._RECIPE
    with pytest.MonkeyPatch.context() as patch:
        data = recipe.data.model_copy(update={"max_tiles_per_slide": None})
        patch.setattr(bench_plan, "_RECIPE", recipe.model_copy(update={"data": data}))
        patch.setattr(bench_plan, "_CHAPTERS", 2)
        found = bench_plan.measure(tmp_path / "rows.npy")
    assert 0 < found["plan_s"] < found["first_batch_at_s"] <= time.monotonic()
    assert min(*found["early"].values(), *found["late"].values()) > 0
    assert found["file_bytes"] == (tmp_path / "rows.npy").stat().st_size
    assert found["peak_rss_bytes"] > found["file_bytes"]
