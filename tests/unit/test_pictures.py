"""Pictures of a run: what they show, that they stay comparable, and that no withdrawn slide is in them."""

import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.unit import drawn_run
from tests.unit.drawn_run import IDS, STEPS, TILES, recipe_of

from histoscale.checkpoint.ledger import replacements_of
from histoscale.checkpoint.reader import latest_commit, require_commit
from histoscale.cluster.pictures import draw_run
from histoscale.cluster.run_tiles import RunTiles
from histoscale.cluster.step_report import write_step_page
from histoscale.errors import CheckpointError, RunError
from histoscale.observe.chart_pictures import asked_for, mixture_picture, seen_until
from histoscale.observe.picture_store import drawn_step, read_sets
from histoscale.observe.run_report import write_report
from histoscale.observe.tile_pictures import darkness, spread_over
from histoscale.sampling.gallery import asking_tiles, first_tiles, place_of
from histoscale.slides.exclusions import append_exclusion
from histoscale.storage import Store, open_store
from histoscale.stream.faults import Fault
from histoscale.units import describe_mpp

pytestmark = pytest.mark.usefixtures("process_group")

CPU = torch.device("cpu")
TISSUE = ["tiles", "crops", "neighbours", "patches", "attention"]
ALL = [*TISSUE, "embeddings", "mixture"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def index(tmp_path: Path) -> Store:
    return open_store(drawn_run.write_slides(tmp_path))


@pytest.fixture
def run(index: Store, tmp_path: Path) -> Store:
    store = drawn_run.begin(tmp_path / "run", index.uri)
    drawn_run.commit(store, 0, 6)
    return store


def tiles_of(store: Store) -> RunTiles:
    return RunTiles(store, recipe_of(), require_commit(store))


def refuse_first_tile(store: Store, first: int, stop: int) -> Fault:
    """Commit steps of which the first one refused its first tile."""
    slide_id = tiles_of(store).catalogue.slide_id(tiles_of(store).plan.tile(first * TILES).row)
    fault = Fault(first * TILES, 0, slide_id, "blur", whole_slide=False)
    drawn_run.commit(store, first, stop, {fault.sample_id: fault})
    return fault


# What is drawn.


def test_a_checkpoint_has_its_pictures_in_the_folder_on_tensorboard_and_in_the_report(run: Store) -> None:
    found = draw_run(run, recipe_of(), CPU)
    assert ([shown.name for shown in found.pictures], found.left_out, found.step) == (ALL, (), 6)
    assert read_sets(run) == [found]
    about = json.loads(run.get("pictures/step-0000000006/pictures.json"))
    assert [entry["title"] for entry in about["pictures"]] == [shown.title for shown in found.pictures]
    curves = EventAccumulator(f"{run.uri}/events/pictures")
    curves.Reload()
    for shown in found.pictures:
        image = Image.open(io.BytesIO(run.get(shown.file)))
        assert image.format == "WEBP"
        assert len(shown.caption) > 60
        assert set(shown.slides) <= set(IDS)
        [event] = curves.Images(f"pictures/{shown.name}")
        assert event.step == 6
        assert Image.open(io.BytesIO(event.encoded_image_string)).height > image.height
    assert {shown.name for shown in found.pictures if shown.slides} == set(TISSUE)
    write_report(run, recipe_of(), latest_commit(run))
    page = run.get("report.html").decode()
    assert page.count("data:image/webp;base64,") == len(ALL)
    assert "Mustermann" not in page + json.dumps(about)


def test_two_checkpoints_are_compared_by_the_same_tiles(run: Store) -> None:
    first = draw_run(run, recipe_of(), CPU)
    drawn_run.commit(run, 6, 9)
    second = draw_run(run, recipe_of(), CPU)
    assert drawn_step(run) == 9
    pictures = [np.asarray(Image.open(io.BytesIO(run.get(one.find("patches").file)))) for one in (first, second)]
    assert pictures[0].shape == pictures[1].shape
    tiles = [each[10:130, 10:130].astype(float) for each in pictures]  # the first query
    np.testing.assert_allclose(tiles[0], tiles[1], atol=24.0)
    assert np.abs(pictures[0].astype(float) - pictures[1]).max() > 100.0  # the networks differ
    write_report(run, recipe_of(), latest_commit(run))
    page = run.get("report.html").decode()
    both = re.findall(r'href="(pictures/step-\d+/neighbours.webp)"', page)
    assert both == ["pictures/step-0000000006/neighbours.webp", "pictures/step-0000000009/neighbours.webp"]


def test_labelled_tiles_are_drawn_by_class(run: Store, tmp_path: Path) -> None:
    for name, level in (("pale", 200), ("dark", 80)):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).normal(level, 20, (56, 56, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "mine" / name / f"{number}.png")
    found = draw_run(run, recipe_of(datasets=[f"{tmp_path}/mine", f"{tmp_path}/gone"]), CPU)
    assert [shown.name for shown in found.pictures] == [*ALL, "dataset-mine"]
    [line] = found.left_out
    assert line.startswith("a dataset: ")


# Which tiles.


def test_a_step_has_the_tiles_that_entered_it(run: Store) -> None:
    fault = refuse_first_tile(run, 6, 8)
    tiles = tiles_of(run)
    assert replacements_of(run, 6) == [(fault.sample_id, 0, fault.slide_id, "blur")]
    found = tiles.of_step(6)
    assert found == [tiles.plan.tile(k, 1 if k == fault.sample_id else 0) for k in range(6 * TILES, 7 * TILES)]
    seen, lines = tiles.read(found)
    assert ([tile.plan for tile in seen], lines) == (found, [])
    assert {tile.pixels.shape for tile in seen} == {(70, 70, 3)}
    with pytest.raises(CheckpointError, match="does not cover"):
        replacements_of(run, 8)


def test_the_gallery_is_the_start_of_the_plan_by_magnification_and_its_queries_are_of_different_slides(
    run: Store,
) -> None:
    tiles = tiles_of(run)
    gallery = first_tiles(tiles.plan, tiles.mix, 16)
    scales = [tiles.plan.tile(k) for k in range(STEPS * TILES)]
    expected = [tile for mpp in (0.5, 1.0) for tile in [tile for tile in scales if tile.mpp == mpp][:8]]
    assert gallery == expected
    queries = asking_tiles(gallery, tiles.mix, 4)
    assert [gallery[at].mpp for at in queries] == [0.5, 0.5, 1.0, 1.0]
    assert len({gallery[at].row for at in queries[:2]}) == len({gallery[at].row for at in queries[2:]}) == 2
    left = [tile for tile in gallery if tile.row != gallery[queries[0]].row]
    assert gallery[queries[2]] in [left[at] for at in asking_tiles(left, tiles.mix, 4)] or left[0].row < 0
    assert len(asking_tiles([replace(tile, row=1) for tile in gallery], tiles.mix, 8)) == 8


@pytest.mark.parametrize(("mpp", "place"), [(0.25, 0), (0.5, 1), (0.8, 1), (1.0, 1), (2.0, 2), (2.1, 2), (0.2, 0)])
def test_a_scale_belongs_to_the_magnification_whose_range_holds_it(mpp: float, place: int) -> None:
    assert place_of(mpp, (0.25, (0.5, 1.0), 2.0)) == place


def test_the_mixture_is_counted_as_a_loop_counts_it(run: Store) -> None:
    tiles = tiles_of(run)
    seen, counted = seen_until(tiles.plan, 6, tiles.mix)
    names = tiles.plan.strata_of(np.arange(len(IDS)))
    assert names == ["site=north", "site=south", "site=north", "site=south"]
    drawn = [tiles.plan.tile(k) for k in range(6 * TILES)]
    expected = Counter((describe_mpp(tile.mpp), names[tile.row]) for tile in drawn)
    assert counted == 6
    assert seen == {kind: count / (6 * TILES) for kind, count in expected.items()}
    asked = asked_for(tiles.plan.report(), tiles.mix)
    assert sum(asked.values()) == pytest.approx(1.0)
    assert asked[("0.5 um/px (20x)", "site=north")] == pytest.approx(0.375)
    picture = mixture_picture(asked, seen, 6, 6)
    assert "the first 6 steps" in picture.caption
    assert "3 of the first 6 steps" in mixture_picture(asked, seen, 3, 6).caption


def test_places_are_spread_evenly_and_darkness_is_that_of_the_pixels() -> None:
    assert spread_over(3, 8) == [0, 1, 2]
    assert spread_over(100, 4) == [0, 25, 50, 75]
    assert darkness(np.full((2, 2, 3), 55, np.uint8)) == 200.0


# What must not be shown, and what cannot.


def test_a_withdrawn_slide_is_in_no_picture_new_or_old(run: Store, index: Store) -> None:
    old = draw_run(run, recipe_of(), CPU)
    out = old.find("tiles").slides[0]
    write_step_page(run, recipe_of(), require_commit(run), 2)
    assert out in run.get("steps/step-2.html").decode()
    append_exclusion(index, [out])
    drawn_run.commit(run, 6, 9)
    new = draw_run(run, recipe_of(), CPU)
    assert [shown.name for shown in new.pictures] == ALL
    assert all(out not in shown.slides for shown in new.pictures)
    assert all(out not in shown.slides for shown in read_sets(run)[0].pictures)
    assert not any(run.exists(shown.file) for shown in old.pictures if out in shown.slides)
    assert not run.exists("steps/step-2.html")
    assert not any(run.exists(key) for key in old.events)
    assert "older pictures were deleted" in new.left_out[0]
    assert len([info for info in run.list("events/pictures")]) == 1
    assert all(tiles_of(run).catalogue.slide_id(tile.row) != out for tile in tiles_of(run).of_step(2))


def test_a_report_after_the_last_commit_removes_what_shows_a_slide_that_was_withdrawn(run: Store, index: Store) -> None:
    old = draw_run(run, recipe_of(), CPU)
    out = old.find("tiles").slides[0]
    write_step_page(run, recipe_of(), require_commit(run), 2)
    append_exclusion(index, [out])
    write_report(run, recipe_of(), latest_commit(run))
    hidden = [shown for shown in old.pictures if out in shown.slides]
    assert len(hidden) > 0
    assert not any(run.exists(key) for key in ("steps/step-2.html", *old.events, *(shown.file for shown in hidden)))
    page = run.get("report.html").decode()
    assert "steps/step-2.html" not in page
    assert page.count("data:image/webp") == len(ALL) - len(hidden)
    assert f"{len(hidden)} pictures that showed a slide which was withdrawn later" in page


def test_a_step_page_goes_with_its_slide_where_no_pictures_were_drawn(run: Store, index: Store) -> None:
    write_step_page(run, recipe_of(), require_commit(run), 2)
    for out in IDS:
        append_exclusion(index, [out])
    write_report(run, recipe_of(), latest_commit(run))
    assert not run.exists("steps/step-2.html")


def test_without_the_index_what_is_left_is_drawn_and_nothing_is_shown(run: Store, index: Store) -> None:
    draw_run(run, recipe_of(), CPU)
    shutil.rmtree(index.uri)
    drawn_run.commit(run, 6, 9)
    found = draw_run(run, recipe_of(), CPU)
    assert found.pictures == ()
    assert any(line.startswith("tiles of a step: ") for line in found.left_out)
    write_report(run, recipe_of(), latest_commit(run))
    page = run.get("report.html").decode()
    assert "data:image/webp" not in page
    assert "Not shown: " in page


def test_a_slide_that_is_gone_is_left_out_by_its_id(run: Store, tmp_path: Path) -> None:
    for path in (tmp_path / "slides").glob("*-1.tif"):
        path.unlink()
    found = draw_run(run, recipe_of(), CPU)
    assert [shown.name for shown in found.pictures] == ALL
    assert all(IDS[1] not in shown.slides for shown in found.pictures)
    assert any(line.startswith(f"tiles of slide {IDS[1]} are left out: ") for line in found.left_out)
    assert "Mustermann" not in " ".join(found.left_out)


def test_what_says_what_pictures_are_must_be_whole(run: Store) -> None:
    run.put("pictures/step-0000000003/pictures.json", b'{"format": 9}')
    with pytest.raises(RunError, match="damaged"):
        read_sets(run)
    write_report(run, recipe_of(), latest_commit(run))
    assert "is damaged" in run.get("report.html").decode()
    found = draw_run(run, recipe_of(), CPU)
    assert [shown.name for shown in found.pictures] == ALL


# From a spike to its tiles.


def write_metrics(store: Store, steps: int, spike: int) -> None:
    times = {"time/step_s": 1.0, "time/wait_s": 0.0, "optim/lr": 0.0}
    lines = [{"step": step, "loss/total": 5.0 + 40.0 * (step == spike), **times} for step in range(steps)]
    store.put("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def test_the_page_of_a_step_has_its_tiles_and_its_values(run: Store) -> None:
    write_metrics(run, 6, spike=3)
    uri, lines = write_step_page(run, recipe_of(), require_commit(run), 3)
    assert (uri, lines) == (f"{run.uri}/steps/step-3.html", [])
    page = run.get("steps/step-3.html").decode()
    tiles = tiles_of(run)
    for tile in tiles.of_step(3):
        assert f"sample {tile.sample_id}<br>slide {tiles.catalogue.slide_id(tile.row)}" in page
        assert f"({tile.x_px0:,.0f}, {tile.y_px0:,.0f}) px" in page
    assert page.count("data:image/webp") == TILES
    assert "<td>loss/total</td><td>45</td><td>5</td><td>5 to 5</td><td>9.00</td>" in page
    assert "Mustermann" not in page
    write_step_page(run, recipe_of(), require_commit(run), 0)
    run.delete("metrics.jsonl")
    write_step_page(run, recipe_of(), require_commit(run), 0)
    assert "no values of this step" in run.get("steps/step-0.html").decode()


@pytest.mark.parametrize("step", [-1, 6])
def test_a_step_that_is_not_committed_has_no_page(run: Store, step: int) -> None:
    with pytest.raises(RunError, match=f"no committed step {step}"):
        write_step_page(run, recipe_of(), require_commit(run), step)


def test_spikes_get_their_pages_and_the_report_links_them(run: Store, index: Store, tmp_path: Path) -> None:
    store = drawn_run.begin(tmp_path / "long", index.uri)
    drawn_run.commit(store, 0, 40)
    write_metrics(store, 40, spike=25)
    draw_run(store, recipe_of(), CPU)
    assert [info.key for info in store.list("steps")] == ["steps/step-25.html"]
    write_report(store, recipe_of(), latest_commit(store))
    page = store.get("report.html").decode()
    assert '<a href="steps/step-25.html">page</a>' in page
    assert "step 25\ntotal: 45" in page
    assert f"python jobs/report.py {store.uri} --step N" in page
    store.delete("steps/step-25.html")
    write_report(store, recipe_of(), latest_commit(store))
    assert "<code>--step 25</code>" in store.get("report.html").decode()
