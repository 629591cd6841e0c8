"""The plan: exact shares, fair patients, no place twice before a slide is used up, one tile for each sample."""

import hashlib
import pickle
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from histoscale.config.recipe import DataSection, Recipe
from histoscale.errors import PlanError
from histoscale.sampling import plan as plan_module
from histoscale.sampling.mixture import Mixture
from histoscale.sampling.places import find_places
from histoscale.sampling.plan import MAX_ATTEMPTS, ChapterPlan, Plan
from histoscale.sampling.replicas import replicas_of
from histoscale.sampling.rows import ROW_DTYPE
from histoscale.sampling.shares import whole_slots
from histoscale.sampling.spec import PlanSpec
from histoscale.seeding import key, permute, subkey, uniforms

SPEC = PlanSpec(
    seed=7,
    tiles=100_000,
    tiles_per_step=16,
    replicas=4,
    chapter_steps=4,
    tiles_per_visit=2,
    region_px=32,
    mix=((0.25, 0.2), (0.5, 0.4), (1.0, 0.2), (2.0, 0.2)),
    max_upsample=1.1,
    min_tissue=0.4,
)
BALANCED = replace(SPEC, balance=("site",), temperature=2.0, tiles_per_visit=4)
RANGES = replace(SPEC, mix=(((0.25, 0.5), 0.5), (1.0, 0.5)), balance=("site", "stain"))
COLUMNS = ("site", "stain")
VALUES = (("north", "south"), ("H&E", "IHC"))
MASK_UM = 8.0


class World:
    """A few slides: (mpp, patient, site, stain) each, with round tissue."""

    def __init__(self, slides: Sequence[tuple[float, int, int, int]], size_px0: tuple[int, int] = (900, 700)) -> None:
        self.rows = np.zeros(len(slides), ROW_DTYPE)
        self.masks = []
        for row, (mpp, patient, site, stain) in zip(self.rows, slides, strict=True):
            row["mpp"], row["patient"], row["strata"][:2], row["mask_um"] = mpp, patient, (site, stain), MASK_UM
            row["width_px0"], row["height_px0"] = size_px0
            shape = [int(side_px0 * mpp / MASK_UM) + 1 for side_px0 in (size_px0[1], size_px0[0])]
            yy, xx = np.mgrid[: shape[0], : shape[1]]
            self.masks.append(np.hypot(yy / shape[0] - 0.5, xx / shape[1] - 0.5) < 0.42)

    def plan(self, spec: PlanSpec = SPEC, exclusions: Mapping[int, int] | None = None) -> Plan:
        return Plan(spec, self.rows, COLUMNS, VALUES, self.masks.__getitem__, exclusions)

    def places(self, row: int, mpp: float, spec: PlanSpec = SPEC) -> set[tuple[float, float]]:
        """Corners of the grid's squares with enough tissue."""
        slide = self.rows[row]
        size_px0 = int(slide["width_px0"]), int(slide["height_px0"])
        side_px0, mask_px0 = spec.region_px * mpp / slide["mpp"], float(slide["mask_um"]) / slide["mpp"]
        found = find_places(self.masks[row], size_px0, side_px0, mask_px0, spec.min_tissue)
        grid = found.squares
        return {
            (grid.left_px0 + cell % grid.columns * grid.pitch_px0, grid.top_px0 + cell // grid.columns * grid.pitch_px0)
            for cell in found.cells.tolist()
        }


WORLD = World(
    [
        (0.2525, 0, 0, 0),
        (0.25, 0, 0, 0),
        (0.25, 1, 0, 1),
        (0.5, 2, 0, 0),
        (0.5, 2, 1, 1),
        (0.46, 3, 1, 1),
        (1.0, 4, 1, 0),
    ]
)
SPECS = [SPEC, BALANCED, RANGES]


def tiles_of(plan: Plan, steps: range) -> dict[int, tuple[int, float, float, float, int, int]]:
    """Sample id -> (row, mpp, x, y, attempt, visit) of every tile of these steps."""
    found = {}
    for replica in range(plan.spec.replicas):
        chapter = plan.chapter(replica, steps.start, steps.stop - 1)
        columns = (chapter.rows, chapter.mpp, chapter.x_px0, chapter.y_px0, chapter.attempts, chapter.visit)
        lists = [column.reshape(-1).tolist() for column in columns]
        found |= dict(zip(chapter.sample_ids.reshape(-1).tolist(), zip(*lists, strict=True), strict=True))
    return found


def digest_of(plan: Plan) -> str:
    digest = hashlib.sha256()
    for first in (0, 1, 17, 4001):
        chapter = plan.chapter(first % 4, first, first + 3)
        for field in fields(ChapterPlan):
            digest.update(getattr(chapter, field.name).astype("<f8").tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("number", "golden"),
    [
        (0, "0a8331b600785c0bb049310f043a0a6eb7417aba5c3bbcebcd8c0fb1f1ee412f"),
        (1, "e7a3048816c1b59df412a162803ee4667d8f24447b495a8e961b50a0641b8e57"),
        (2, "04341dc15394a2eb95724c1953bee4cd116c7164c3a84249bc5ce792caab795e"),
    ],
)
def test_small_plans_have_not_changed(number: int, golden: str) -> None:
    assert digest_of(WORLD.plan(SPECS[number])) == golden


def test_a_plan_with_exclusions_has_not_changed() -> None:
    assert (
        digest_of(WORLD.plan(SPEC, {1: 2, 5: 18})) == "917cd324c3a3a27a284af14d88f326ee9bd374c274a00c29b440332d89df503f"
    )


def test_columns_have_the_types_of_the_contract() -> None:
    chapter = WORLD.plan().chapter(1, 3, 7)
    kinds = {
        "sample_ids": "i8",
        "rows": "i4",
        "mpp": "f8",
        "x_px0": "f8",
        "y_px0": "f8",
        "attempts": "i2",
        "visit": "i8",
    }
    for name, kind in kinds.items():
        column = getattr(chapter, name)
        assert column.dtype == np.dtype(kind)
        assert column.shape == (5, 4)


def test_every_sample_id_stands_once() -> None:
    assert sorted(tiles_of(WORLD.plan(), range(10))) == list(range(10 * 16))


class Sequential:
    """The plan as it would be made from the first visit on, counting: no formula for a visit's number."""

    def __init__(self, world: World, spec: PlanSpec) -> None:
        self.world, self.spec, self.seed = world, spec, spec.seed
        self.tables = self._tables()

    def _tables(self) -> list[tuple[int, ...]]:
        return [
            tuple(np.flatnonzero(self.world.rows["mpp"] <= scale.finest_mpp * self.spec.max_upsample).tolist())
            for scale in self.spec.magnifications
        ]

    def _pools(self) -> dict[tuple[int, tuple[int, ...]], tuple[int, dict[int, tuple[int, list[int]]]]]:
        """(table, stratum's codes) -> (number of the pool, patient -> (number of the patient, its rows))."""
        columns = [COLUMNS.index(name) for name in self.spec.balance]
        pools: dict[Any, Any] = {}
        patients = 0
        for table, rows in enumerate(dict.fromkeys(self.tables)):
            groups: dict[tuple[int, ...], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
            for row in rows:
                codes = tuple(int(self.world.rows["strata"][row][column]) for column in columns)
                groups[codes][int(self.world.rows["patient"][row])].append(row)
            for codes in sorted(groups):
                members = {}
                for patient in sorted(groups[codes]):
                    members[patient] = (patients, groups[codes][patient])
                    patients += 1
                pools[table, codes] = (len(pools), members)
        return pools

    def visits(self, groups: int) -> dict[int, tuple[int, int, int]]:
        """Number of a visit -> (q, row, visits of the row at q before)."""
        spec = self.spec
        mixture = Mixture([scale.share for scale in spec.magnifications], spec.tiles_per_step)
        distinct, pools = list(dict.fromkeys(self.tables)), self._pools()
        patterns = {table: self._pattern(table, pools) for table in range(len(distinct))}
        turns: Counter[tuple[int, int]] = Counter()
        of_patient: Counter[tuple[int, int]] = Counter()
        of_row: Counter[tuple[int, int]] = Counter()
        j: Counter[int] = Counter()
        found = {}
        for group in range(groups):
            bounds = mixture.bounds(group)
            for position in range(spec.tiles_per_step):
                q = max(index for index, bound in enumerate(bounds[:-1]) if bound <= position)
                table = distinct.index(self.tables[q])
                pattern = patterns[table]
                pool, members = pattern[j[q] % len(pattern)]
                j[q] += 1
                entries = list(members.values())
                patient_round, index = divmod(turns[q, pool], len(entries))
                turns[q, pool] += 1
                patient_key = subkey(key(self.seed, "plan", "patient"), q, pool, patient_round)
                patient, rows = entries[permute(patient_key, index, len(entries))]
                slide_round, index = divmod(of_patient[q, patient], len(rows))
                of_patient[q, patient] += 1
                slide_key = subkey(key(self.seed, "plan", "slide"), q, patient, slide_round)
                row = rows[permute(slide_key, index, len(rows))]
                found[group * spec.tiles_per_step + position] = (q, row, of_row[q, row])
                of_row[q, row] += 1
        return found

    def _pattern(self, table: int, pools: Any) -> list[Any]:
        own = [(codes, entry) for (of, codes), entry in pools.items() if of == table]
        slides = np.array([sum(len(rows) for _, rows in members.values()) for _, (_, members) in own])
        slots = whole_slots((slides / slides.max()) ** (1 / self.spec.temperature))
        codes_of = sorted(
            {tuple(int(r["strata"][COLUMNS.index(n)]) for n in self.spec.balance) for r in self.world.rows}
        )
        wanted = []
        for (codes, entry), count in zip(own, slots.tolist(), strict=True):
            phase_key = key(self.seed, "plan", "phase")
            phase = uniforms(phase_key, np.array([codes_of.index(codes)]), 1)[0, 0]
            wanted += [((r + phase) / count, codes, entry) for r in range(count)]
        return [entry for _, _, entry in sorted(wanted, key=lambda slot: slot[:2])]

    def place(self, q: int, row: int, earlier: int, turn: int) -> tuple[int, int, int]:
        """(epoch, x, y of the square) of a tile, by writing the whole epoch down."""
        spec, slide = self.spec, self.world.rows[row]
        side_px0 = spec.region_px * spec.magnifications[q].coarsest_mpp / slide["mpp"]
        size_px0 = int(slide["width_px0"]), int(slide["height_px0"])
        mask_px0 = float(slide["mask_um"]) / slide["mpp"]
        found = find_places(self.world.masks[row], size_px0, side_px0, mask_px0, spec.min_tissue)
        epoch, index = divmod(earlier * spec.tiles_per_visit + turn, len(found.cells))
        strips = len(found.cells) // spec.tiles_per_visit
        strip_key = subkey(key(self.seed, "plan", "strip"), q, row, epoch)
        order = [permute(strip_key, strip, strips) for strip in range(strips)]
        width = spec.tiles_per_visit
        sequence = [cell for strip in order for cell in found.cells[strip * width : (strip + 1) * width].tolist()]
        sequence += found.cells[strips * width :].tolist()
        grid = found.squares
        row_in_grid, column = divmod(sequence[index], grid.columns)
        x_px0 = grid.left_px0 + column * grid.pitch_px0
        return epoch, x_px0, grid.top_px0 + row_in_grid * grid.pitch_px0


@pytest.mark.parametrize("spec", SPECS)
def test_the_plan_is_the_one_that_counting_from_the_first_visit_gives(spec: PlanSpec) -> None:
    groups = 24
    oracle = Sequential(WORLD, spec)
    visits = oracle.visits(groups)
    tiles = tiles_of(WORLD.plan(spec), range(groups * spec.tiles_per_visit))
    seen: Counter[int] = Counter()
    first_epochs = 0
    for sample_id, (row, mpp, x_px0, y_px0, attempt, visit) in tiles.items():
        q, expected_row, earlier = visits[visit]
        assert (row, attempt) == (expected_row, 0)
        scale = spec.magnifications[q]
        assert scale.finest_mpp <= mpp <= scale.coarsest_mpp
        turn = sample_id // spec.tiles_per_step % spec.tiles_per_visit
        epoch, grid_x, grid_y = oracle.place(q, row, earlier, turn)
        side_px0 = spec.region_px * mpp / WORLD.rows["mpp"][row]
        inset = np.floor((spec.region_px * scale.coarsest_mpp / WORLD.rows["mpp"][row] - side_px0) / 2)
        if epoch == 0:
            assert (x_px0, y_px0) == (grid_x + inset, grid_y + inset)
            first_epochs += 1
        else:
            assert abs(x_px0 - grid_x - inset) <= side_px0 / 2 + 1
        seen[visit] += 1
    assert set(seen.values()) == {spec.tiles_per_visit}
    assert len(seen) == groups * spec.tiles_per_step
    assert first_epochs > len(tiles) / 4


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("exclusions", [{}, {1: 2, 5: 5}])
def test_chapters_tiles_and_single_steps_agree_from_any_step_on(spec: PlanSpec, exclusions: dict[int, int]) -> None:
    used = WORLD.plan(spec, exclusions)
    whole = tiles_of(used, range(8))
    fresh = WORLD.plan(spec, exclusions)
    for sample_id in sorted(whole, reverse=True):
        tile = fresh.tile(sample_id)
        row, mpp, x_px0, y_px0, attempt, visit = whole[sample_id]
        assert (tile.sample_id, tile.row, tile.mpp) == (sample_id, row, mpp)
        assert (tile.x_px0, tile.y_px0, tile.attempt, tile.visit) == (x_px0, y_px0, attempt, visit)
    for first, last in ((0, 0), (3, 5), (7, 7)):
        part = tiles_of(pickle.loads(pickle.dumps(used)), range(first, last + 1))
        assert part == {k: whole[k] for k in range(first * 16, (last + 1) * 16)}


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_any_number_of_workers_computes_the_same_tiles(workers: int) -> None:
    expected = tiles_of(WORLD.plan(), range(4))
    found: dict[int, float] = {}
    for rank in range(workers):
        plan = WORLD.plan()
        for replica in replicas_of(rank, workers, SPEC.replicas):
            if replica is not None:
                chapter = plan.chapter(replica, 0, 3)
                ids, x_px0 = chapter.sample_ids.reshape(-1).tolist(), chapter.x_px0.reshape(-1).tolist()
                assert not set(ids) & set(found)
                found |= dict(zip(ids, x_px0, strict=True))
    assert found == {sample_id: tile[2] for sample_id, tile in expected.items()}


def test_the_seed_changes_the_plan() -> None:
    assert tiles_of(WORLD.plan(), range(4)) != tiles_of(WORLD.plan(replace(SPEC, seed=8)), range(4))


def test_a_step_holds_the_mix_and_a_micro_batch_comes_close() -> None:
    spec = replace(SPEC, tiles_per_step=80)
    plan = WORLD.plan(spec)
    for step in range(6):
        own = [Counter(plan.chapter(replica, step, step).mpp[0].tolist()) for replica in range(4)]
        assert sum(own, Counter()) == {0.25: 16, 0.5: 32, 1.0: 16, 2.0: 16}
        for counts in own:
            for mpp, share in spec.mix:
                assert isinstance(mpp, float)
                assert abs(counts[mpp] - 20 * share) <= 1


@pytest.mark.parametrize("spec", SPECS)
def test_a_slide_is_never_drawn_at_a_scale_that_it_cannot_serve(spec: PlanSpec) -> None:
    for row, mpp, *_ in tiles_of(WORLD.plan(spec), range(60)).values():
        assert WORLD.rows["mpp"][row] <= mpp * SPEC.max_upsample


def test_scales_of_a_range_are_log_uniform_and_one_scale_a_visit() -> None:
    spec = replace(SPEC, mix=(((0.5, 2.0), 1.0),), tiles_per_step=64, replicas=1)
    tiles = tiles_of(WORLD.plan(spec), range(40)).values()
    by_visit = {visit: mpp for _, mpp, *_, visit in tiles}
    assert all(by_visit[tile[-1]] == tile[1] for tile in tiles)
    assert len(by_visit) == 20 * 64
    octaves = np.log2(np.array(list(by_visit.values())) / 0.5)
    assert (octaves.min() >= 0.0, octaves.max() <= 2.0) == (True, True)
    assert stats.kstest(octaves / 2, "uniform").pvalue > 1e-3
    assert np.ptp(np.histogram(octaves, bins=16, range=(0, 2))[0]) <= 2


def test_patients_of_a_stratum_are_visited_alike_and_so_are_the_slides_of_a_patient() -> None:
    world = World([(0.5, patient, 0, 0) for patient in (0, 0, 0, 1, 2, 2)])
    spec = replace(SPEC, mix=((0.5, 1.0),), tiles_per_step=12, replicas=2)
    visits = Counter(tile[0] for tile in tiles_of(world.plan(spec), range(0, 240)).values())
    assert visits == {0: 320, 1: 320, 2: 320, 3: 960, 4: 480, 5: 480}


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_no_place_comes_again_before_its_slide_is_used_up(turns: int) -> None:
    spec = replace(SPEC, mix=((1.0, 0.5), (2.0, 0.5)), tiles_per_visit=turns, balance=("site",))
    world = World([(0.5, 0, 0, 0), (0.6, 0, 0, 0), (0.9, 1, 0, 0), (0.5, 2, 1, 0)])
    free = {(row, mpp): world.places(row, mpp) for row in range(4) for mpp in (1.0, 2.0)}
    drawn: dict[tuple[int, float], list[tuple[float, float]]] = defaultdict(list)
    tiles = tiles_of(world.plan(spec), range(160))
    for sample_id in sorted(tiles, key=lambda k: (tiles[k][-1], k)):
        row, mpp, x_px0, y_px0, *_ = tiles[sample_id]
        drawn[row, mpp].append((x_px0, y_px0))
    for name, places in drawn.items():
        epoch = places[: len(free[name])]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= free[name]
    assert sum(len(places) > len(free[name]) for name, places in drawn.items()) >= 2


def test_past_the_first_epoch_tiles_hardly_ever_coincide() -> None:
    tiles = list(tiles_of(WORLD.plan(), range(100)).values())
    assert len({tile[:4] for tile in tiles}) > 0.999 * len(tiles)


def test_a_visit_is_a_strip_of_neighbours_in_different_steps_of_one_slot() -> None:
    plan = WORLD.plan(replace(SPEC, mix=((0.5, 1.0),), tiles_per_visit=4))
    side_px0 = {row: np.ceil(32 * 0.5 / mpp) for row, mpp in enumerate(WORLD.rows["mpp"].tolist())}
    beside = 0
    for replica in range(4):
        chapter = plan.chapter(replica, 0, 3)
        assert (chapter.rows == chapter.rows[0]).all()
        assert (chapter.visit == chapter.visit[0]).all()
        for i, row in enumerate(chapter.rows[0].tolist()):
            along = np.diff(chapter.x_px0[:, i]) == side_px0[row]
            beside += int((along & (np.diff(chapter.y_px0[:, i]) == 0)).sum())
    assert beside > 0.8 * 16 * 3


def test_the_slides_of_a_step_differ_while_a_round_is_long_enough() -> None:
    plan = World([(0.25, n, 0, 0) for n in range(64)]).plan(replace(SPEC, mix=((0.5, 1.0),)))
    for step in range(0, 8, 2):
        assert len({tile[0] for tile in tiles_of(plan, range(step, step + 1)).values()}) == 16


def test_later_epochs_move_each_place_by_at_most_half_a_region() -> None:
    spec = replace(SPEC, mix=((1.0, 1.0),), tiles_per_step=1, replicas=1, tiles_per_visit=1)
    world = World([(0.5, 0, 0, 0)])
    own = np.array(sorted(world.places(0, 1.0)))
    tiles = tiles_of(world.plan(spec), range(2 * len(own)))
    assert sorted(tiles[k][2:4] for k in range(len(own))) == list(map(tuple, own.tolist()))
    later = np.array([tiles[k][2:4] for k in range(len(own), 2 * len(own))])
    nearest = np.abs(later[:, None, :] - own[None, :, :]).max(axis=2).min(axis=1)
    assert nearest.max() <= 64 / 2 + 1
    assert nearest.max() > 64 / 4
    assert later.min() >= 0
    assert (later + 64 <= [900, 700]).all()


def test_an_exclusion_acts_from_its_step_on_and_changes_no_other_sample() -> None:
    spec = replace(BALANCED, tiles_per_visit=4)
    plain, excluded = WORLD.plan(spec), WORLD.plan(spec, {3: 6})
    before, after = tiles_of(plain, range(16)), tiles_of(excluded, range(16))
    replaced = [k for k in before if before[k] != after[k]]
    assert replaced == [k for k in before if before[k][0] == 3 and k // 16 >= 6]
    assert replaced
    for k in replaced:
        row, mpp, x_px0, y_px0, attempt, visit = after[k]
        assert row != 3
        assert mpp == before[k][1]
        assert WORLD.rows["strata"][row][0] == WORLD.rows["strata"][3][0]
        assert attempt >= 1
        assert visit == -1 - k
        assert (x_px0, y_px0) not in WORLD.places(row, mpp)


def test_an_excluded_slide_has_its_mask_read_no_more() -> None:
    read: list[int] = []

    def mask_of(row: int) -> NDArray[np.bool_]:
        read.append(row)
        return WORLD.masks[row]

    plan = Plan(SPEC, WORLD.rows, COLUMNS, VALUES, mask_of, {0: 0, 1: 0})
    tiles_of(plan, range(20))
    assert not {0, 1} & set(read)
    assert set(read) == {2, 3, 4, 5, 6}


def test_a_slide_without_a_place_is_replaced_by_another_of_its_stratum() -> None:
    world = World([(0.25, n, n % 2, 0) for n in range(6)])
    world.masks[2][:] = False
    tiles = tiles_of(world.plan(replace(SPEC, balance=("site",))), range(40))
    rows = Counter(tile[0] for tile in tiles.values())
    assert set(rows) == {0, 1, 3, 4, 5}
    spares = [tile for tile in tiles.values() if tile[4]]
    assert {tile[0] for tile in spares} == {0, 4}
    sites = Counter(int(world.rows["strata"][tile[0]][0]) for tile in tiles.values())
    assert abs(sites[0] - sites[1]) <= 20


def test_spares_differ_between_attempts_and_never_lie_on_the_grid() -> None:
    plan = WORLD.plan(BALANCED)
    first = plan.tile(37)
    spares = [plan.tile(37, attempt) for attempt in range(1, MAX_ATTEMPTS + 1)]
    assert [spare.attempt for spare in spares] == list(range(1, MAX_ATTEMPTS + 1))
    assert {spare.mpp for spare in spares} == {first.mpp}
    assert {spare.visit for spare in spares} == {-38}
    assert len({(spare.row, spare.x_px0, spare.y_px0) for spare in spares}) == MAX_ATTEMPTS
    site = WORLD.rows["strata"][first.row][0]
    for spare in spares:
        assert WORLD.rows["strata"][spare.row][0] == site
        assert (spare.x_px0, spare.y_px0) not in WORLD.places(spare.row, spare.mpp)
        side_px0 = 32 * spare.mpp / WORLD.rows["mpp"][spare.row]
        assert 0 <= spare.x_px0 <= 900 - side_px0
        assert 0 <= spare.y_px0 <= 700 - side_px0
        assert spare.x_px0 == int(spare.x_px0)


def test_a_slide_with_room_for_one_region_only_gives_no_spare() -> None:
    world = World([(0.5, 0, 0, 0)], size_px0=(32, 32))
    world.masks[0][:] = True
    plan = world.plan(replace(SPEC, mix=((0.5, 1.0),)))
    assert plan.tile(0).attempt == 0
    with pytest.raises(PlanError, match=r"no tile is left .* 0\.5 um/px.*32 attempts among all slides.*40% tissue"):
        plan.tile(0, 1)


def test_a_stratum_without_a_place_is_named() -> None:
    world = World([(0.5, n, n % 2, 0) for n in range(4)])
    for row in (1, 3):
        world.masks[row][:] = False
    spec = replace(SPEC, mix=((0.5, 1.0),), balance=("site",))
    with pytest.raises(PlanError, match=r"32 attempts among site=south.*data\.weights"):
        tiles_of(world.plan(spec), range(2))
    with pytest.raises(PlanError, match=r"32 attempts among site=north"):
        tiles_of(World([(0.5, 0, 0, 0)]).plan(spec, {0: 3}), range(4))


def test_attempts_beyond_the_last_are_refused() -> None:
    with pytest.raises(PlanError, match="no tile is left"):
        WORLD.plan().tile(0, MAX_ATTEMPTS + 1)


def test_the_cache_of_places_is_bounded_and_does_not_change_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiles_of(WORLD.plan(), range(12))
    monkeypatch.setattr(plan_module, "_CACHED_PLACES", 500)
    plan = WORLD.plan()
    assert tiles_of(plan, range(12)) == expected
    assert sum(len(found.cells) for found in plan._cache.values()) == plan._cached_places
    assert plan._cached_places <= 500 or len(plan._cache) == 1
    monkeypatch.setattr(plan_module, "_CACHED_SLIDES", 2)
    assert tiles_of(plan, range(12)) == expected
    assert len(plan._cache) <= 2


@pytest.mark.parametrize(("replica", "first", "last"), [(0, -1, 0), (-1, 0, 0), (4, 0, 0), (0, 2, 1)])
def test_unknown_chapters_are_refused(replica: int, first: int, last: int) -> None:
    with pytest.raises(PlanError, match="a replica below 4"):
        WORLD.plan().chapter(replica, first, last)


@pytest.mark.parametrize(("sample_id", "attempt"), [(-1, 0), (0, -1)])
def test_unknown_samples_are_refused(sample_id: int, attempt: int) -> None:
    with pytest.raises(PlanError, match="no such sample"):
        WORLD.plan().tile(sample_id, attempt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replicas": 3}, "replicas must divide"),
        ({"tiles_per_visit": 3}, "tiles_per_visit must divide"),
        ({"tiles_per_visit": 0}, "tiles_per_visit must divide"),
        ({"mix": ()}, "positive share"),
        ({"mix": ((0.5, 0.0),)}, "positive share"),
        ({"weights": {"site": {"north": 2.0}}}, r"got 'site'; expected columns of data\.balance \(none\)"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(SPEC, **change)  # type: ignore[arg-type]


def test_the_spec_takes_every_field_from_the_recipe() -> None:
    spec = PlanSpec.from_recipe(Recipe())
    assert (spec.tiles_per_step, spec.replicas, spec.tiles_per_micro_batch) == (4096, 512, 8)
    assert spec.tiles == 2_000_000_000 // 4096 * 4096
    assert spec.mix == ((0.25, 0.2), (0.5, 0.4), (1.0, 0.2), (2.0, 0.2))
    assert (spec.seed, spec.chapter_steps, spec.tiles_per_visit) == (0, 4, 4)
    assert (spec.region_px, spec.max_upsample, spec.min_tissue) == (392, 1.1, 0.65)
    assert (spec.balance, spec.temperature, spec.weights, spec.max_tiles_per_slide) == ((), 1.0, {}, None)
    data = {
        "mix": [{"mpp": [0.25, 2.0], "share": 1}],
        "balance": ["site"],
        "temperature": 2,
        "weights": {"site": {"A": 3}},
        "max_tiles_per_slide": 700,
    }
    spec = PlanSpec.from_recipe(Recipe(data=DataSection.model_validate(data)))
    assert (spec.mix, spec.balance, spec.temperature) == ((((0.25, 2.0), 1.0),), ("site",), 2.0)
    assert (spec.weights, spec.max_tiles_per_slide) == ({"site": {"A": 3.0}}, 700)


def test_a_range_is_cut_into_bins_of_at_most_an_eighth_octave() -> None:
    scales = replace(SPEC, mix=(((0.25, 2.0), 0.6), (0.5, 0.4))).magnifications
    assert len(scales) == 25
    assert [scale.finest_mpp for scale in scales[1:24]] == [scale.coarsest_mpp for scale in scales[:23]]
    assert (scales[0].finest_mpp, scales[23].coarsest_mpp) == (0.25, 2.0)
    assert {round(scale.coarsest_mpp / scale.finest_mpp, 6) for scale in scales[:24]} == {round(2**0.125, 6)}
    assert sum(scale.share for scale in scales[:24]) == pytest.approx(0.6)
    assert (scales[24].finest_mpp, scales[24].coarsest_mpp, scales[24].share) == (0.5, 0.5, 0.4)
    assert len(replace(SPEC, mix=(((0.5, 0.51), 1.0),)).magnifications) == 1


def test_the_fingerprint_names_spec_snapshot_and_exclusions() -> None:
    base = WORLD.plan().fingerprint("snapshot")
    assert base == WORLD.plan(SPEC, {}).fingerprint("snapshot")
    assert len(base) == 16
    others = [
        WORLD.plan().fingerprint("another"),
        WORLD.plan(replace(SPEC, tiles=1)).fingerprint("snapshot"),
        WORLD.plan(SPEC, {1: 2}).fingerprint("snapshot"),
        WORLD.plan(SPEC, {1: 3}).fingerprint("snapshot"),
    ]
    assert len({base, *others}) == 5
