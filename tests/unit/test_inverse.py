"""The plan backwards finds exactly the samples that the plan forwards draws from a slide."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from tests.unit.test_plan import BALANCED, RANGES, SPEC, World

from histoscale.sampling.plan import Plan
from histoscale.sampling.rows import COPIED
from histoscale.sampling.spec import PlanSpec
from histoscale.seeding import permute_many, subkeys, uniforms, uniforms_below, unpermute_many

SLIDES = [
    (0.25, 1, 0, 0),
    (0.25, 1, 0, 0),
    (0.2525, 2, 0, 1),
    (0.5, 3, 1, 0),
    (0.25, 4, 1, 1),
    (1.0, 5, 0, 0),
    (2.0, 5, 0, 0),
    (0.25, 4, 1, 1),
    (0.25, 6, 0, 0),
]


def forwards(plan: Plan, stop: int) -> dict[int, list[int]]:
    """Row -> its samples, by drawing all of them."""
    found = defaultdict(list)
    for replica in range(plan.spec.replicas):
        chapter = plan.chapter(replica, 0, stop - 1)
        for sample, row in zip(chapter.sample_ids.ravel().tolist(), chapter.rows.ravel().tolist(), strict=True):
            found[row].append(sample)
    return {row: sorted(samples) for row, samples in found.items()}


@pytest.mark.parametrize("stop", [1, 17])
@pytest.mark.parametrize(
    "spec",
    [SPEC, BALANCED, RANGES, replace(SPEC, max_tiles_per_slide=20_000, tiles_per_visit=1)],
    ids=["plain", "balanced", "ranges", "capped"],
)
def test_backwards_equals_forwards(spec: PlanSpec, stop: int) -> None:
    plan = World(SLIDES).plan(spec)
    expected = forwards(plan, stop)
    for row in range(len(SLIDES)):
        assert plan.samples_of(row, stop).tolist() == expected.get(row, []), row


def test_slides_that_are_out_and_slides_without_places_give_their_samples_to_others() -> None:
    world = World(SLIDES)
    world.masks[1][:] = False
    plan = world.plan(SPEC, exclusions={0: 5, 4: 0, 3: 11})
    expected = forwards(plan, 16)
    assert 1 not in expected
    assert max(expected[0]) < 5 * SPEC.tiles_per_step
    for row in range(len(SLIDES)):
        assert plan.samples_of(row, 16).tolist() == expected.get(row, []), row


@pytest.mark.parametrize(("resident_slides", "resident_visits"), [(2, 3), (64, 64), (1, 5)])
def test_stays_at_copied_slides_are_undone(resident_slides: int, resident_visits: int) -> None:
    world = World(SLIDES)
    world.rows["flags"][[0, 1, 4, 8]] = COPIED
    world.masks[8][:] = False
    plan = world.plan(
        replace(SPEC, resident_slides=resident_slides, resident_visits=resident_visits), exclusions={1: 4}
    )
    expected = forwards(plan, 8)
    for row in (0, 1, 4, 8):
        assert plan.samples_of(row, 8).tolist() == expected.get(row, []), row


def test_spares_of_refused_tiles_are_found_among_many() -> None:
    plan = World(SLIDES).plan(SPEC)
    samples = np.arange(0, 40)
    for attempt in (1, 3):
        rows = np.array([plan.tile(int(k), attempt).row for k in samples])
        for row in range(len(SLIDES)):
            assert plan.spares_of(row, samples, attempt).tolist() == samples[rows == row].tolist()


def test_permutations_and_keyed_draws_are_undone_and_repeated() -> None:
    draws = np.random.default_rng(0)
    lengths = draws.integers(1, 200, 5000)
    lengths[:5] = [1, 2, 3, 2**40, 2**48]
    indices = draws.integers(0, lengths)
    keys = subkeys(7, np.arange(5000))
    assert np.array_equal(unpermute_many(keys, permute_many(keys, indices, lengths), lengths), indices)
    rows = uniforms_below(keys[:50], 9, 3)
    assert np.array_equal(rows, np.concatenate([uniforms(int(k), np.array([9]), 3) for k in keys[:50]]))


def test_a_million_steps_are_searched_in_a_moment() -> None:
    spec = replace(SPEC, tiles=16_000_000, tiles_per_visit=4)
    plan = World([(0.25, patient, 0, 0) for patient in range(200)], (400, 300)).plan(spec)
    samples = plan.samples_of(17, 1_000_000)
    assert len(samples) == pytest.approx(16_000_000 / 200, rel=0.02)
    assert all(plan.tile(int(k)).row == 17 for k in samples[:: len(samples) // 20])
