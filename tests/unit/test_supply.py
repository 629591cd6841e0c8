"""Strata, their shares and caps, what the report says of them, and that the tiles keep to it."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from histoscale.errors import PlanError
from histoscale.sampling import supply as supply_module
from histoscale.sampling.plan import Plan
from histoscale.sampling.report import MagnificationReport
from histoscale.sampling.rows import ROW_DTYPE
from histoscale.sampling.spec import PlanSpec
from histoscale.sampling.synthetic import make_archive

SPEC = PlanSpec(
    seed=3,
    tiles=1_000_000,
    tiles_per_step=64,
    replicas=1,
    chapter_steps=1,
    tiles_per_visit=1,
    region_px=32,
    mix=((0.5, 1.0),),
    max_upsample=1.1,
    min_tissue=0.0,
    balance=("site",),
)
COLUMNS = ("site", "scanner")
SIZES = {"large": 800, "middle": 150, "small": 49, "single": 1}
VALUES = (tuple(SIZES), ("coarse", "fine"))


def skewed_rows() -> np.ndarray[Any, Any]:
    """1,000 slides of four sites, a patient each; the large site scans half of its slides at 40x, no other does."""
    rows = np.zeros(1000, ROW_DTYPE)
    rows["patient"] = np.arange(1000)
    rows["strata"][:, 0] = np.repeat(np.arange(4), list(SIZES.values()))
    rows["strata"][:400, 1] = 1
    rows["mpp"] = np.where(rows["strata"][:, 1] == 1, 0.25, 0.5)
    rows["width_px0"], rows["height_px0"], rows["mask_um"] = 400, 400, 8.0
    return rows


ROWS = skewed_rows()


def full_mask(_row: int) -> np.ndarray[Any, Any]:
    return np.ones((25, 25), bool)


def plan_of(spec: PlanSpec, rows: np.ndarray[Any, Any] = ROWS) -> Plan:
    return Plan(spec, rows, COLUMNS, VALUES, full_mask)


def only(plan: Plan) -> MagnificationReport:
    (line,) = plan.report().magnifications
    return line


def shares_of(plan: Plan) -> dict[str, float]:
    return {stratum.name.removeprefix("site="): stratum.share for stratum in only(plan).strata}


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1e9])
def test_a_stratum_weighs_its_slides_to_the_power_of_the_inverse_temperature(temperature: float) -> None:
    wanted = {name: size ** (1 / temperature) for name, size in SIZES.items()}
    for name, share in shares_of(plan_of(replace(SPEC, temperature=temperature))).items():
        assert share == pytest.approx(wanted[name] / sum(wanted.values()), abs=2**-16)


def test_a_temperature_near_zero_leaves_the_smallest_strata_a_little() -> None:
    shares = shares_of(plan_of(replace(SPEC, temperature=1e-3)))
    assert shares["large"] > 0.999
    assert 0 < shares["single"] == 2**-22


def test_weights_multiply_and_zero_leaves_a_value_out() -> None:
    weights = {"site": {"middle": 4.0, "large": 0.0}, "scanner": {"coarse": 2.0}}
    plan = plan_of(replace(SPEC, balance=("site", "scanner"), weights=weights))
    line = only(plan)
    assert line.slides == 200
    assert {stratum.name: round(stratum.share, 4) for stratum in line.strata} == {
        "site=middle, scanner=coarse": round(600 / 650, 4),
        "site=small, scanner=coarse": round(49 / 650, 4),
        "site=single, scanner=coarse": round(1 / 650, 4),
    }
    assert plan.chapter(0, 0, 20).rows.min() >= 800


def test_shares_are_those_among_the_slides_that_serve_the_magnification() -> None:
    lines = plan_of(replace(SPEC, mix=((0.25, 1.0), (0.5, 3.0)))).report().magnifications
    assert [(line.mpp, line.coarsest_mpp, line.share, line.slides) for line in lines] == [
        (0.25, 0.25, 0.25, 400),
        (0.5, 0.5, 0.75, 1000),
    ]
    assert [(s.name, s.share, s.slides) for s in lines[0].strata] == [("site=large", 1.0, 400)]
    assert lines[0].strata[0].tiles_per_slide == pytest.approx(250_000 / 400)


def rows_of(plan: Plan) -> set[int]:
    return {plan.tile(sample).row for sample in range(4_000)}


def test_fewer_slides_are_part_of_more_whatever_the_seed() -> None:
    few, more = (rows_of(plan_of(replace(SPEC, slides=count))) for count in (20, 200))
    assert few == set(range(20)) < more == set(range(200))  # all of them, in the order of their ids
    assert rows_of(plan_of(replace(SPEC, slides=20, seed=4))) == few


def test_slides_that_are_left_out_do_not_count() -> None:
    spec = replace(SPEC, slides=100, weights={"site": {"large": 0.0}})
    assert rows_of(plan_of(spec)) == set(range(800, 900))


def test_more_slides_than_there_are_is_refused() -> None:
    with pytest.raises(PlanError, match=r"more slides than there are \(got 201; expected at most the 200"):
        plan_of(replace(SPEC, slides=201, weights={"site": {"large": 0.0}}))


def test_the_cap_holds_for_every_slide_over_all_magnifications() -> None:
    rows = ROWS.copy()
    rows["patient"][900:950] = 900  # a patient with many slides: each of them is visited less
    spec = replace(SPEC, mix=((0.25, 1.0), (0.5, 3.0)), temperature=1e9)
    free = [plan_of(spec, rows), plan_of(replace(spec, max_tiles_per_slide=2_000), rows)]
    most = []
    for plan in free:
        per_site: Counter[str] = Counter()
        for line in plan.report().magnifications:
            for stratum in line.strata:
                per_site[stratum.name] += stratum.most_tiles_per_slide
        most.append(max(per_site.values()))
    assert most[0] > 100_000
    assert most[1] <= 2_000 * 1.01


def test_what_a_cap_cuts_goes_to_the_other_strata() -> None:
    plan = plan_of(replace(SPEC, temperature=1e9, max_tiles_per_slide=2_000))
    shares = shares_of(plan)
    assert shares["single"] == pytest.approx(2_000 / 1e6, rel=0.01)
    assert shares["small"] == pytest.approx(49 * 2_000 / 1e6, rel=0.01)
    assert shares["middle"] == pytest.approx(0.3, rel=0.01)  # 150 slides at the cap
    assert shares["large"] == pytest.approx(0.6, rel=0.01)
    tiles = {stratum.name: stratum.tiles_per_slide for stratum in only(plan).strata}
    assert max(tiles.values()) <= 2_000 * 1.01


def test_a_cap_that_all_slides_together_just_meet_makes_them_alike() -> None:
    plan = plan_of(replace(SPEC, temperature=1e9, max_tiles_per_slide=1_000))
    for stratum in only(plan).strata:
        assert stratum.tiles_per_slide == pytest.approx(1_000, rel=0.15 if stratum.slides == 1 else 0.01)


def test_a_cap_that_cannot_be_met_is_a_diagnosis() -> None:
    with pytest.raises(PlanError, match=r"max_tiles_per_slide is too low.*got 999; expected 1000 or more.*schedule"):
        plan_of(replace(SPEC, max_tiles_per_slide=999))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"balance": ("stie",)}, r"a column that the index does not have \(got 'stie'; expected site, scanner\)"),
        ({"weights": {"site": {"lrage": 1.0}}}, r"values that no slide has \(got 'lrage'; expected large, middle"),
        ({"mix": ((0.2, 1.0),)}, r"no slide serves 0\.2 um/px \(50x\) \(got '1000 slides at 0\.25 to 0\.5 um/px'"),
        ({"weights": {"site": dict.fromkeys(SIZES, 0.0)}}, r"no slide serves 0\.5 um/px .*no slides.*weights of 0"),
    ],
)
def test_a_balance_that_does_not_fit_the_index_is_a_diagnosis(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(replace(SPEC, **change))


def test_an_index_without_columns_or_slides_is_a_diagnosis() -> None:
    with pytest.raises(PlanError, match="no column at all"):
        Plan(SPEC, ROWS, (), (), full_mask)
    with pytest.raises(PlanError, match="no slides"):
        plan_of(replace(SPEC, balance=()), ROWS[:0])


def test_too_many_strata_are_a_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supply_module, "MOST_STRATA", 4)
    with pytest.raises(PlanError, match=r"too many strata \(got 5; expected at most 4\)\. Take scanner out"):
        plan_of(replace(SPEC, balance=("site", "scanner")))


def test_the_report_says_which_value_serves_which_magnification() -> None:
    report = plan_of(replace(SPEC, mix=((0.25, 1.0), (0.5, 3.0)))).report()
    assert report.serves == {
        "site": {"large": (400, 800), "middle": (0, 150), "small": (0, 49), "single": (0, 1)},
        "scanner": {"coarse": (0, 600), "fine": (400, 400)},
    }
    stratum = report.magnifications[1].strata[2]
    assert (stratum.name, stratum.patients, stratum.slides) == ("site=small", 49, 49)
    assert stratum.tiles == pytest.approx(750_000 * stratum.share)


def test_the_report_tells_of_patients_whose_slides_come_often() -> None:
    rows = ROWS.copy()
    rows["patient"][801:950] = 801
    middle = only(plan_of(SPEC, rows)).strata[1]
    assert (middle.patients, middle.slides) == (2, 150)
    assert middle.most_tiles_per_slide == pytest.approx(middle.tiles / 2)
    assert middle.tiles_per_slide == pytest.approx(middle.tiles / 150)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_realised_tiles_follow_magnifications_strata_and_slides(temperature: float) -> None:
    mix = ((0.25, 0.3), ((0.5, 1.0), 0.7))
    plan = plan_of(replace(SPEC, temperature=temperature, mix=mix))
    chapter = plan.chapter(0, 10_000, 10_999)
    rows, mpp = chapter.rows.reshape(-1), chapter.mpp.reshape(-1)
    report = plan.report()
    expected, found = [], []
    for line in report.magnifications:
        inside = (mpp == line.mpp) | ((mpp >= line.mpp) & (mpp < line.coarsest_mpp))
        sites = np.bincount(ROWS["strata"][rows[inside], 0], minlength=4)
        for stratum in line.strata:
            expected.append(len(rows) * line.share * stratum.share)
            found.append(sites[list(SIZES).index(stratum.name.removeprefix("site="))])
    assert sum(found) == len(rows)
    # Shares are kept, not drawn: far closer than chance would come.
    assert stats.chisquare(found, np.array(expected) * sum(found) / sum(expected)).pvalue > 0.99
    fine = np.bincount(rows[mpp == 0.25], minlength=1000)[:400]
    assert np.ptp(fine) <= 2  # a stretch cuts a round of patients at both of its ends


def test_bins_that_the_same_slides_serve_share_their_tables() -> None:
    supply = plan_of(replace(SPEC, mix=(((0.25, 2.0), 1.0),)))._supply
    assert len(supply.table_of) == 24
    assert len(supply.cycle_at) == 2


def test_synthetic_archives_are_functions_of_their_seed_and_look_like_archives() -> None:
    archive, again, other = make_archive(20_000), make_archive(20_000), make_archive(20_000, seed=1)
    np.testing.assert_array_equal(archive.rows, again.rows)
    assert (archive.rows != other.rows).any()
    rows = archive.rows
    assert len(set(rows["slide_id"].tolist())) == 20_000
    assert rows["slide_id"].tolist() == sorted(rows["slide_id"].tolist())
    for column, names in enumerate(archive.values):
        counts = np.bincount(rows["strata"][:, column], minlength=len(names))
        assert len(counts) == len(names)
        assert counts.min() > 0
        assert counts.max() > 1.5 * counts.min()
    site_of = [len(set(rows["strata"][rows["patient"] == patient, 0].tolist())) for patient in range(20)]
    assert set(site_of) == {1}
    mask = archive.mask(77)
    assert mask.shape == (rows["mask_rows"][77], rows["mask_columns"][77])
    np.testing.assert_array_equal(mask, again.mask(77))
    shares = [archive.mask(row).mean() for row in range(50)]
    assert 0.1 < np.mean(shares) < 0.6
