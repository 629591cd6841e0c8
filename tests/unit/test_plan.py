"""The plan: exact shares, fair slides, no place twice before a slide is used up, one tile for each sample id."""

import hashlib
import pickle
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from histoscale.config.recipe import Recipe
from histoscale.errors import PlanError
from histoscale.sampling import plan as plan_module
from histoscale.sampling.mixture import PARTS, Mixture, parts_per_million
from histoscale.sampling.places import places
from histoscale.sampling.plan import Plan
from histoscale.sampling.spec import PlanSpec

SPEC = PlanSpec(
    seed=7,
    tiles_per_step=16,
    replicas=4,
    chapter_steps=4,
    tiles_per_visit=2,
    region_px=32,
    mix=((0.25, 0.2), (0.5, 0.4), (1.0, 0.2), (2.0, 0.2)),
    max_upsample=1.1,
    min_tissue=0.4,
)


@dataclass(frozen=True)
class FakeSlide:
    slide_id: str
    mpp: float
    width_px0: int
    height_px0: int
    mask: NDArray[np.bool_]
    mask_px0: float = 16.0


def fake_slide(number: int, mpp: float, width_px0: int = 900, height_px0: int = 700) -> FakeSlide:
    shape = (height_px0 // 16 + 1, width_px0 // 16 + 1)
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    mask = np.hypot(yy / shape[0] - 0.5, xx / shape[1] - 0.5) < 0.42
    return FakeSlide(f"{number:032x}", mpp, width_px0, height_px0, mask)


SLIDES = [fake_slide(n, mpp) for n, mpp in enumerate((0.2525, 0.25, 0.25, 0.5, 0.5, 0.46, 1.0))]


def tiles_of(plan: Plan, steps: range) -> list[tuple[int, int, float, float, float, int]]:
    """(step, slide, mpp, x, y, sample id) of every tile of these steps."""
    out = []
    for step in steps:
        for replica in range(plan.spec.replicas):
            m = plan.micro_batch(step, replica)
            columns = (m.slides, m.mpp, m.x_px0, m.y_px0, m.sample_ids)
            out += [(step, *(c.item() for c in row)) for row in zip(*columns, strict=True)]
    return out


def test_small_plan_has_not_changed() -> None:
    plan = Plan(SPEC, SLIDES)
    digest = hashlib.sha256()
    for step in (0, 1, 2, 17, 4001):
        for replica in range(4):
            m = plan.micro_batch(step, replica)
            for column in (m.sample_ids, m.slides, m.mpp, m.x_px0, m.y_px0):
                digest.update(column.astype("<f8").tobytes())
    assert digest.hexdigest() == "2e792e5c4a1d364bcac60f052a1026657efb916d63b7fb31d7a936540b008c52"


def test_columns_have_the_types_of_the_contract() -> None:
    m = Plan(SPEC, SLIDES).micro_batch(3, 1)
    assert (m.sample_ids.dtype, m.slides.dtype) == (np.int64, np.int32)
    for column in (m.mpp, m.x_px0, m.y_px0):
        assert column.dtype == np.float64
        assert column.shape == (4,)


def test_every_sample_id_stands_once_and_in_order() -> None:
    plan = Plan(SPEC, SLIDES)
    ids = [tile[-1] for tile in tiles_of(plan, range(10))]
    assert ids == list(range(10 * 16))


def test_a_micro_batch_is_a_function_of_step_and_replica_alone() -> None:
    used, fresh = Plan(SPEC, SLIDES), pickle.loads(pickle.dumps(Plan(SPEC, SLIDES)))
    tiles_of(used, range(6))
    for step, replica in ((5, 3), (0, 0), (900, 2)):
        for left, right in zip(
            vars(used.micro_batch(step, replica)).values(),
            vars(fresh.micro_batch(step, replica)).values(),
            strict=True,
        ):
            np.testing.assert_array_equal(left, right)


def test_the_seed_changes_the_plan() -> None:
    first = tiles_of(Plan(SPEC, SLIDES), range(4))
    assert first != tiles_of(Plan(replace(SPEC, seed=8), SLIDES), range(4))


@pytest.mark.parametrize("tiles", [2, 5, 16, 4096])
@pytest.mark.parametrize("shares", [(0.2, 0.4, 0.2, 0.2), (1, 1, 1), (0.001, 0.5, 7.0), (3.0,)])
def test_each_group_holds_floor_or_ceiling_of_every_share(shares: tuple[float, ...], tiles: int) -> None:
    mixture, parts = Mixture(shares, tiles), parts_per_million(shares)
    seen = [0] * len(shares)
    for group in range(500):
        assert mixture.before(group) == seen
        bounds = mixture.bounds(group)
        assert (bounds[0], bounds[-1]) == (0, tiles)
        for q, part in enumerate(parts):
            count = bounds[q + 1] - bounds[q]
            assert count in (tiles * part // PARTS, -(-tiles * part // PARTS))
            seen[q] += count
            assert abs(seen[q] - (group + 1) * tiles * part / PARTS) < 3


def test_shares_are_exact_after_a_million_groups() -> None:
    shares = (0.123456, 0.4, 0.476544)
    for laps in (1, 7):
        assert Mixture(shares, 5).before(laps * PARTS) == [5 * laps * p for p in parts_per_million(shares)]


def test_parts_sum_to_exactly_a_million() -> None:
    for shares in ((1, 1, 1), (0.2, 0.4, 0.2, 0.2), (1e-3, 1e6), (1 / 7,) * 7):
        assert sum(parts_per_million(shares)) == PARTS


def test_a_step_holds_the_mix_and_a_micro_batch_comes_close() -> None:
    spec = replace(SPEC, tiles_per_step=80, replicas=4)
    plan = Plan(spec, SLIDES)
    for step in range(6):
        whole = Counter(mpp for replica in range(4) for mpp in plan.micro_batch(step, replica).mpp.tolist())
        assert whole == {0.25: 16, 0.5: 32, 1.0: 16, 2.0: 16}
        for replica in range(4):
            own = Counter(plan.micro_batch(step, replica).mpp.tolist())
            for mpp, share in spec.mix:
                assert abs(own[mpp] - 20 * share) <= 1


def test_a_slide_is_never_drawn_at_a_scale_that_it_cannot_serve() -> None:
    for _, slide, mpp, *_ in tiles_of(Plan(SPEC, SLIDES), range(60)):
        assert SLIDES[slide].mpp <= mpp * SPEC.max_upsample


def test_every_slide_is_visited_once_in_a_round() -> None:
    spec = replace(SPEC, mix=((0.5, 1.0),), tiles_per_visit=2, tiles_per_step=12, replicas=2)
    visits = [tile[1] for tile in tiles_of(Plan(spec, SLIDES[:6]), range(0, 40, 2))]
    assert len(visits) == 240
    assert Counter(visits) == dict.fromkeys(range(6), 40)


def test_no_place_comes_again_before_its_slide_is_used_up() -> None:
    spec = replace(SPEC, mix=((1.0, 1.0),))
    slides = [fake_slide(n, mpp) for n, mpp in enumerate((0.5, 0.6, 0.9))]
    free = {n: {tuple(xy) for xy in places(s, 1.0, 32, 0.4).tolist()} for n, s in enumerate(slides)}
    fewest = min(map(len, free.values()))
    for _, slide, _, x, y, _ in tiles_of(Plan(spec, slides), range(fewest * len(slides) // 16 - 2)):
        free[slide].remove((x, y))
    assert min(map(len, free.values())) < 20


def test_an_epoch_draws_each_place_exactly_once() -> None:
    spec = replace(SPEC, mix=((1.0, 1.0),), tiles_per_step=1, replicas=1, tiles_per_visit=1)
    slide = fake_slide(0, 0.5, width_px0=700)
    own = places(slide, 1.0, 32, spec.min_tissue)
    plan = Plan(spec, [slide])
    first = [(x, y) for _, _, _, x, y, _ in tiles_of(plan, range(len(own)))]
    assert sorted(first) == sorted(map(tuple, own.tolist()))
    assert first != list(map(tuple, own.tolist()))


def test_later_epochs_move_each_place_by_at_most_half_a_region() -> None:
    spec = replace(SPEC, mix=((1.0, 1.0),), tiles_per_step=1, replicas=1, tiles_per_visit=1)
    slide = fake_slide(0, 0.5)
    side_px0 = 64
    own = places(slide, 1.0, 32, spec.min_tissue)
    later = np.array([t[3:5] for t in tiles_of(Plan(spec, [slide]), range(len(own), 2 * len(own)))])
    nearest = np.abs(later[:, None, :] - own[None, :, :]).max(axis=2).min(axis=1)
    assert nearest.max() <= side_px0 / 2 + 1
    assert nearest.max() > side_px0 / 4
    assert later.min() >= 0
    assert (later + side_px0 <= [slide.width_px0, slide.height_px0]).all()


def test_the_tiles_of_a_visit_go_to_different_steps_of_one_slot() -> None:
    plan = Plan(SPEC, SLIDES)
    for group in range(8):
        for replica in range(4):
            first, second = (plan.micro_batch(2 * group + turn, replica) for turn in (0, 1))
            np.testing.assert_array_equal(first.slides, second.slides)
            np.testing.assert_array_equal(first.mpp, second.mpp)
            assert ((first.x_px0 != second.x_px0) | (first.y_px0 != second.y_px0)).all()


def test_the_slides_of_a_micro_batch_differ_while_a_round_is_long_enough() -> None:
    slides = [fake_slide(n, 0.25) for n in range(64)]
    plan = Plan(replace(SPEC, mix=((0.5, 1.0),)), slides)
    for step in range(0, 8, 2):
        drawn = [s for replica in range(4) for s in plan.micro_batch(step, replica).slides.tolist()]
        assert len(set(drawn)) == 16


def test_the_cache_of_places_is_bounded_and_does_not_change_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiles_of(Plan(SPEC, SLIDES), range(12))
    monkeypatch.setattr(plan_module, "_CACHED_PLACES", 500)
    plan = Plan(SPEC, SLIDES)
    assert tiles_of(plan, range(12)) == expected
    assert sum(map(len, plan._cache.values())) == plan._cached_places
    assert plan._cached_places <= 500 or len(plan._cache) == 1


def test_the_report_counts_slides_and_places() -> None:
    rows = Plan(SPEC, SLIDES).report()
    assert [(row.mpp, row.slides) for row in rows] == [(0.25, 3), (0.5, 6), (1.0, 7), (2.0, 7)]
    total = sum(len(places(slide, 0.5, 32, SPEC.min_tissue)) for slide in SLIDES[:6])
    assert rows[1].places == total
    assert rows[1].share == 0.4


def test_a_magnification_that_no_slide_serves_is_a_diagnosis() -> None:
    with pytest.raises(PlanError, match=r"0\.25 um/px \(40x\).*4 slides at 0\.46 to 1 um/px.*data\.mix"):
        Plan(SPEC, SLIDES[3:])


def test_slides_without_tissue_serve_nothing() -> None:
    bare = replace(SLIDES[0], mask=np.zeros_like(SLIDES[0].mask))
    with pytest.raises(PlanError, match=r"40% tissue"):
        Plan(SPEC, [bare])
    with pytest.raises(PlanError, match="no slides"):
        Plan(SPEC, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicas": 3}, "replicas must divide"),
        ({"tiles_per_visit": 3}, "tiles_per_visit must divide"),
        ({"tiles_per_visit": 0}, "tiles_per_visit must divide"),
        ({"mix": ()}, "positive share"),
        ({"mix": ((0.5, 0.0),)}, "positive share"),
    ],
)
def test_a_spec_that_does_not_divide_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(SPEC, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(("step", "replica"), [(-1, 0), (0, -1), (0, 4)])
def test_unknown_micro_batches_are_refused(step: int, replica: int) -> None:
    with pytest.raises(PlanError, match="a replica below 4"):
        Plan(SPEC, SLIDES).micro_batch(step, replica)


def test_the_spec_takes_every_field_from_the_recipe() -> None:
    recipe = Recipe()
    spec = PlanSpec.from_recipe(recipe)
    assert (spec.tiles_per_step, spec.replicas, spec.tiles_per_micro_batch) == (4096, 512, 8)
    assert spec.mix == ((0.25, 0.2), (0.5, 0.4), (1.0, 0.2), (2.0, 0.2))
    assert (spec.seed, spec.chapter_steps, spec.tiles_per_visit) == (0, 4, 4)
    assert (spec.region_px, spec.max_upsample, spec.min_tissue) == (392, 1.1, recipe.data.min_tissue)
