"""The plan over slides that are read from copies: a few slides in use at once, many visits for one download."""

import pickle
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from histoscale.config.recipe import DataSection, Recipe
from histoscale.errors import PlanError
from histoscale.sampling.places import find_places
from histoscale.sampling.plan import Plan
from histoscale.sampling.rows import COPIED, ROW_DTYPE
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.synthetic import make_archive
from histoscale.sampling.visits import Visits

SPEC = PlanSpec(
    seed=11,
    tiles=100_000,
    tiles_per_step=20,
    replicas=2,
    chapter_steps=4,
    tiles_per_visit=2,
    region_px=32,
    mix=((0.5, 0.6), (1.0, 0.4)),
    max_upsample=1.1,
    min_tissue=0.4,
    balance=("site",),
    resident_slides=4,
    resident_visits=5,
)
IN_PLACE, AS_COPIES = 0, COPIED
MASK_UM = 8.0


class World:
    """A few slides: (patient, site, flags) each, with tissue in a disc."""

    def __init__(self, slides: Sequence[tuple[int, int, int]], size_px0: tuple[int, int] = (900, 700)) -> None:
        self.rows = np.zeros(len(slides), ROW_DTYPE)
        self.rows["mpp"], self.rows["mask_um"] = 0.5, MASK_UM
        self.rows["width_px0"], self.rows["height_px0"] = size_px0
        for row, (patient, site, flags) in zip(self.rows, slides, strict=True):
            row["patient"], row["strata"][0], row["flags"] = patient, site, flags
        shape = [int(side_px0 * 0.5 / MASK_UM) + 1 for side_px0 in (size_px0[1], size_px0[0])]
        yy, xx = np.mgrid[: shape[0], : shape[1]]
        disc = np.hypot(yy / shape[0] - 0.5, xx / shape[1] - 0.5) < 0.42
        self.masks = [disc.copy() for _ in slides]

    def plan(self, spec: PlanSpec = SPEC, exclusions: Mapping[int, int] | None = None) -> Plan:
        return Plan(spec, self.rows, ("site",), (("north", "south"),), self.masks.__getitem__, exclusions)

    def in_place(self) -> "World":
        other = pickle.loads(pickle.dumps(self))
        other.rows["flags"] = 0
        return other  # type: ignore[no-any-return]

    def places(self, row: int, mpp: float) -> int:
        size_px0 = int(self.rows["width_px0"][row]), int(self.rows["height_px0"][row])
        found = find_places(self.masks[row], size_px0, SPEC.region_px * mpp / 0.5, MASK_UM / 0.5, SPEC.min_tissue)
        return len(found.cells)


WORLDS = {
    "a patient each": World([(n, 0, AS_COPIES) for n in range(11)]),
    "two slides each": World([(n // 2, 0, AS_COPIES) for n in range(14)]),
    "patients unlike": World([(n, 0, AS_COPIES) for n in (0, 0, 0, 1, 2, 2, 3)]),
    "one patient": World([(0, 0, AS_COPIES) for _ in range(9)]),
    "two slides": World([(n, 0, AS_COPIES) for n in range(2)]),
    "a site of each kind": World([(n, n % 2, IN_PLACE if n % 2 else AS_COPIES) for n in range(22)]),
}


def visits_of(plan: Plan, groups: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(number of the visit, q, pool, row, visits of the row at q before), in the order of the numbers."""
    parts: list[Visits] = [plan._visitor.visits(replica, range(groups)) for replica in range(plan.spec.replicas)]
    columns = [np.concatenate([getattr(p, name) for p in parts]) for name in ("number", "q", "pool", "row", "earlier")]
    order = np.argsort(columns[0])
    return zip(*(column[order].tolist() for column in columns), strict=True)


def rows_by_pool(plan: Plan, groups: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(q, pool) -> (row, earlier visits) of its visits in their order."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for _, q, pool, row, earlier in visits_of(plan, groups):
        found[q, pool].append((row, earlier))
    return found


def counted(slides: Sequence[int], block: int, at_once: int, stay: int) -> Iterator[tuple[int, int]]:
    """(row, earlier visits), by letting slides stay in the order in which they would be visited in place."""
    queue, seen = deque(slides), Counter[int]()
    while queue:
        left = min(block, len(queue))
        while left:
            resident = [queue.popleft() for _ in range(min(at_once, left))]
            left -= len(resident)
            for _ in range(stay):
                for row in resident:
                    yield row, seen[row]
                    seen[row] += 1


@pytest.mark.parametrize(("at_once", "stay"), [(4, 5), (3, 1), (64, 7), (1, 2)])
@pytest.mark.parametrize(
    ("name", "block"),
    [("a patient each", 11), ("two slides each", 14), ("patients unlike", 4), ("one patient", 9), ("two slides", 2)],
)
def test_visits_are_those_that_counting_gives(name: str, block: int, at_once: int, stay: int) -> None:
    spec = replace(SPEC, resident_slides=at_once, resident_visits=stay)
    in_order = rows_by_pool(WORLDS[name].in_place().plan(spec), 60)
    found = rows_by_pool(WORLDS[name].plan(spec), 60)
    assert set(found) == set(in_order)
    assert len(found) == 2
    for pool, visits in found.items():
        expected = counted([row for row, _ in in_order[pool]], block, at_once, stay)
        assert visits == [next(expected) for _ in visits]


@pytest.mark.parametrize("name", WORLDS)
def test_slides_in_use_at_once_differ_and_a_new_one_comes_for_every_stay(name: str) -> None:
    world = WORLDS[name]
    for visits in rows_by_pool(world.plan(), 400).values():
        if not world.rows["flags"][visits[0][0]]:
            continue
        rows = [row for row, _ in visits]
        in_use = set(rows[:1])
        new = 1
        for first in range(0, len(rows), SPEC.resident_slides):
            turn = rows[first : first + SPEC.resident_slides]
            new += len(set(turn) - in_use)
            in_use = set(turn)
        window = SPEC.resident_slides * SPEC.resident_visits
        assert max(len(set(rows[first : first + window])) for first in range(0, len(rows), window)) <= 2 * 4
        assert new <= 2 * len(rows) / SPEC.resident_visits + 4


def test_slides_that_are_read_in_place_are_visited_as_if_there_were_no_copies() -> None:
    world = WORLDS["a site of each kind"]
    mixed, plain = rows_by_pool(world.plan(), 40), rows_by_pool(world.in_place().plan(), 40)
    same = {pool for pool in plain if mixed[pool] == plain[pool]}
    assert {world.rows["strata"][plain[pool][0][0], 0] for pool in same} == {1}
    assert len(same) == 2


@pytest.mark.parametrize("name", WORLDS)
def test_no_place_comes_again_before_its_slide_is_used_up(name: str) -> None:
    world = WORLDS[name]
    plan = world.plan()
    chapters = [plan.chapter(replica, 0, 399) for replica in range(SPEC.replicas)]
    columns = [
        np.concatenate([getattr(chapter, field).reshape(-1) for chapter in chapters])
        for field in ("visit", "sample_ids", "rows", "mpp", "x_px0", "y_px0")
    ]
    order = np.lexsort((columns[1], columns[0]))
    drawn: dict[tuple[int, float], list[tuple[float, float]]] = defaultdict(list)
    for _, _, row, mpp, x_px0, y_px0 in zip(*(column[order].tolist() for column in columns), strict=True):
        drawn[row, mpp].append((x_px0, y_px0))
    used_up = 0
    for (row, mpp), places in drawn.items():
        epoch = places[: world.places(row, mpp)]
        assert len(set(epoch)) == len(epoch)
        used_up += len(epoch) == world.places(row, mpp)
    assert used_up


def tiles_of(plan: Plan, steps: range) -> dict[int, tuple[Any, ...]]:
    found = {}
    for replica in range(plan.spec.replicas):
        chapter = plan.chapter(replica, steps.start, steps.stop - 1)
        columns = (chapter.rows, chapter.mpp, chapter.x_px0, chapter.y_px0, chapter.attempts, chapter.visit)
        lists = [column.reshape(-1).tolist() for column in columns]
        found |= dict(zip(chapter.sample_ids.reshape(-1).tolist(), zip(*lists, strict=True), strict=True))
    return found


def test_chapters_and_tiles_agree_from_any_step_on() -> None:
    world = WORLDS["a site of each kind"]
    whole = tiles_of(world.plan(SPEC, {4: 6}), range(60))
    fresh = world.plan(SPEC, {4: 6})
    for sample_id in sorted(whole, reverse=True)[::7]:
        tile = fresh.tile(sample_id)
        assert (tile.row, tile.mpp, tile.x_px0, tile.y_px0, tile.attempt, tile.visit) == whole[sample_id]
    assert tiles_of(pickle.loads(pickle.dumps(fresh)), range(33, 40)) == {k: whole[k] for k in range(660, 800)}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_copied_slides_take_the_same_part_of_a_stratum_as_in_place(temperature: float) -> None:
    spec = replace(SPEC, temperature=temperature)
    # North: patients 0 to 5 in place, 6 to 8 copied, 9 half and half; south: 3 patients, all copied.
    north = [(n, 0, IN_PLACE) for n in range(6)] + [(n, 0, AS_COPIES) for n in (6, 7, 8)]
    world = World([*north, (9, 0, IN_PLACE), (9, 0, AS_COPIES), *((n, 1, AS_COPIES) for n in (10, 11, 12))])
    before = {s.name: s for s in world.in_place().plan(spec).report().magnifications[0].strata}
    after = {s.name: s for s in world.plan(spec).report().magnifications[0].strata}
    assert list(after) == ["site=north", "site=north, copied", "site=south, copied"]
    share = before["site=north"].share
    assert after["site=north"].share == pytest.approx(share * 6.5 / 10, abs=1e-4)
    assert after["site=north, copied"].share == pytest.approx(share * 3.5 / 10, abs=1e-4)
    assert after["site=south, copied"].share == pytest.approx(before["site=south"].share, abs=1e-4)
    assert [(s.patients, s.slides) for s in after.values()] == [(7, 7), (4, 4), (3, 3)]
    rows = np.array([row for visits in rows_by_pool(world.plan(spec), 900).values() for row, _ in visits])
    copied_north = np.isin(rows, np.flatnonzero(world.rows["flags"] & (world.rows["strata"][:, 0] == 0) * COPIED))
    assert copied_north.mean() == pytest.approx(after["site=north, copied"].share, abs=0.01)


def test_the_report_counts_whole_stays() -> None:
    world = World([(n, 0, AS_COPIES) for n in range(50)])
    spec = replace(SPEC, mix=((0.5, 1.0),), tiles=600)
    (stratum,) = world.plan(spec).report().magnifications[0].strata
    assert (stratum.tiles_per_slide, stratum.most_tiles_per_slide) == (12, 20)
    assert Counter(row for _, _, _, row, _ in visits_of(world.plan(spec), 15)).most_common(1)[0][1] == 20 // 2
    (short,) = world.plan(replace(spec, tiles=8)).report().magnifications[0].strata
    assert short.most_tiles_per_slide == 8


def test_weights_and_caps_act_on_copied_slides_too() -> None:
    world = World([(n, n % 2, AS_COPIES if n < 10 else IN_PLACE) for n in range(40)])
    weighted = world.plan(replace(SPEC, weights={"site": {"south": 0.0}})).report().magnifications[0]
    assert [s.name for s in weighted.strata] == ["site=north", "site=north, copied"]
    assert sum(s.share for s in weighted.strata) == pytest.approx(1.0)
    with pytest.raises(PlanError, match="max_tiles_per_slide is too low"):
        world.plan(replace(SPEC, max_tiles_per_slide=SPEC.tiles // 40 - 1))
    capped = world.plan(replace(SPEC, max_tiles_per_slide=SPEC.tiles // 40)).report().magnifications[0]
    assert {round(s.share, 3) for s in capped.strata} == {0.125, 0.375}


def test_spares_come_from_the_slides_in_use() -> None:
    world = World([(n, 0, AS_COPIES) for n in range(40)])
    world.masks[7][:] = False
    in_use: dict[tuple[int, int], set[int]] = defaultdict(set)
    plan, stays = world.plan(), SPEC.resident_slides * SPEC.resident_visits
    turns: Counter[int] = Counter()
    set_of_visit = {}
    for number, q, _, row, _ in visits_of(plan, 400):
        set_of_visit[number] = q, turns[q] // stays
        in_use[set_of_visit[number]].add(row)
        turns[q] += 1
    found = tiles_of(plan, range(800))
    spares = {k: tile for k, tile in found.items() if tile[4]}
    visit_of = {(k // 40, k % 20): tile[5] for k, tile in found.items() if tile[5] >= 0}
    assert len(spares) > 20
    assert not set(visit_of) & {(k // 40, k % 20) for k in spares}  # all tiles of a visit to slide 7 are spares
    for k, tile in spares.items():
        assert tile[0] != 7
        assert tile[5] == -1 - k
        assert any(tile[0] in rows and 7 in rows for rows in in_use.values())
    again = [plan.tile(0, attempt).row for attempt in range(1, 17)]
    assert set(again) == in_use[set_of_visit[found[0][5]]] - {7}
    assert not set(plan.tile(0, attempt).row for attempt in range(17, 33)) <= set(again)


def test_where_no_slide_in_use_has_a_place_any_other_gives_the_spare() -> None:
    world = World([(n, 0, AS_COPIES) for n in range(40)])
    spec = replace(SPEC, mix=((0.5, 1.0),), resident_visits=50)
    in_use = {row for _, _, _, row, _ in visits_of(world.plan(spec), 10)}
    assert len(in_use) == SPEC.resident_slides
    tiles = tiles_of(world.plan(spec, dict.fromkeys(in_use, 0)), range(20))
    assert not in_use & {tile[0] for tile in tiles.values()}
    assert min(tile[4] for tile in tiles.values()) == 17


def test_the_recipe_says_how_many_slides_stay_for_how_many_visits() -> None:
    plain = PlanSpec.from_recipe(Recipe())
    assert (plain.resident_slides, plain.resident_visits) == (64, 64)
    data = DataSection.model_validate({"resident_slides": 8, "resident_visits": 100})
    spec = PlanSpec.from_recipe(Recipe(data=data))
    assert (spec.resident_slides, spec.resident_visits) == (8, 100)
    names = [WORLDS["two slides"].plan(replace(SPEC, resident_slides=n)).fingerprint("snapshot") for n in (4, 5)]
    assert names[0] != names[1]


@pytest.mark.parametrize("field", ["resident_slides", "resident_visits"])
def test_a_stay_without_slides_or_visits_is_refused(field: str) -> None:
    with pytest.raises(PlanError, match="a stratum needs a resident slide and a visit to it"):
        replace(SPEC, **{field: 0})  # type: ignore[arg-type]


def test_a_large_archive_downloads_one_slide_for_each_stay() -> None:
    archive = make_archive(20_000)
    archive.rows["flags"] = COPIED
    spec = replace(PlanSpec.from_recipe(Recipe()), mix=((1.0, 1.0),))

    def full(_: int) -> NDArray[np.bool_]:
        return np.ones((600, 600), bool)

    plan = Plan(spec, archive.rows, archive.columns, archive.values, full)
    visits = list(visits_of(plan, 8))
    slides = {row for _, _, _, row, _ in visits}
    assert len(visits) == 8 * 4096
    assert len(slides) == len(visits) // spec.resident_visits
