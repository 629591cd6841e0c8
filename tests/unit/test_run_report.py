"""The report of a run: one page that needs nothing else, made of whatever the run folder has."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from histoscale.checkpoint.manifest import Commit
from histoscale.config.recipe import Recipe
from histoscale.evaluate.figures import COLOUR, PRETRAINED, UNTRAINED, Figure, Gain, Robustness
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.report import EvaluationReport, encode
from histoscale.observe.metrics import read_metrics
from histoscale.observe.report_curves import charts_of, line_chart, thinned
from histoscale.observe.run_report import write_report
from histoscale.observe.timeline import Event, Kind, write_event
from histoscale.storage import Store, open_store
from histoscale.stream.faults import Quarantined

RECIPE = Recipe.model_validate({"schedule": {"images": 100 * 4096}})


def commit(step: int, *slides: Quarantined) -> Commit:
    return Commit(step, step * RECIPE.batch.tiles, "f" * 16, "checkpoints/x/", {}, 0, None, {}, tuple(slides))


def run_with_a_crash(store: Store) -> None:
    for event in (
        Event(Kind.START, 1_700_000_000.0, 0, 2),
        Event(Kind.RESUME, 1_700_000_010.0, 0, 2),
        Event(Kind.COMMIT, 1_700_000_030.0, 20, 2, stall_s=1.0),
        Event(Kind.CRASH, 1_700_000_040.0, 29, 2, "<b>SIGKILL</b>"),
        Event(Kind.RESUME, 1_700_000_050.0, 20, 2, restart_s=10.0, steps_redone=9),
        Event(Kind.END, 1_700_000_100.0, 60, 2),
    ):
        write_event(store, event)
    lines = [
        {"step": step, "time/step_s": 1.0, "time/wait_s": 0.0, "loss/total": 9.0 - step / 60, "optim/lr": 1e-4}
        for step in range(60)
    ]
    store.put("metrics.jsonl", "\n".join(map(json.dumps, [*lines, {"step": 60}])).encode() + b"\n{")


def evaluation(step: int, accuracy: float) -> EvaluationReport:
    figures = [
        Figure(name, "both", "knn", BALANCED_ACCURACY, (value,), (value - 0.1, value + 0.1))
        for name, value in ((PRETRAINED, accuracy), (UNTRAINED, 0.5))
    ]
    gain = Gain(UNTRAINED, "both", "knn", BALANCED_ACCURACY, accuracy - 0.5, (0.05, 0.3), 0.01)
    robust = Robustness(PRETRAINED, "both", 40, 20, 0.75, (0.7, 0.8), 0.5, (0.6,), (0.5, 0.7), 0.25)
    return EvaluationReport(
        "<crc>",
        "h" * 16,
        "f" * 16,
        step,
        step * 4096,
        {"a": 10, "b": 10},
        "3 splits by patient",
        tuple(figures),
        (gain, replace(gain, baseline=COLOUR)),
        (robust,),
        ("intervals are too narrow",),
    )


class Outline(HTMLParser):
    """Headings, and what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.loads: list[str] = []
        self._in = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("script", "link", "iframe"):
            self.loads.append(tag)

    def handle_data(self, data: str) -> None:
        if self._in == "h2":
            self.headings.append(data)


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    return found


def test_the_lines_say_where_the_time_went(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    run_with_a_crash(store)
    uri, text = write_report(store, RECIPE, commit(60))
    assert uri == f"{tmp_path}/report.html"
    assert text[0] == "60 committed steps, goodput 60.0%"
    assert "  steps taken again           9.0 s    9.0%" in text
    assert text[-1] == "  2023-11-14 22:14:10  at step 20, 2 workers, 10.0 s, 9 steps taken again: <b>SIGKILL</b>"
    assert [values["step"] for values in read_metrics(store, 3)] == [0, 1, 2]


def test_the_page_has_everything_in_it_and_loads_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    run_with_a_crash(store)
    store.put("index.json", json.dumps({"index": "/data/my index", "snapshot_id": "abc"}).encode())
    store.put("origins.json", json.dumps(["teacher: <x>"]).encode())
    packages = {"torch": "2.13", "deepspeed": "0.19", "ray": "2.60"}
    record = {"source_sha256": "s" * 64, "python": "3.11.7", "packages": packages}
    record["git"] = {"commit": "c" * 40, "difference": "+x"}
    store.put("provenance/1.json", json.dumps(record).encode())
    for step, accuracy in ((20, 0.6), (60, 0.7)):
        report = evaluation(step, accuracy)
        store.put(report.key.replace("<crc>", "crc"), encode(report))
    store.put("evaluations/old-step-00000001.json", b'{"format": 1}')
    write_report(store, RECIPE, commit(60, Quarantined("a" * 32, 5, "its <offsets> are damaged")))
    page = (tmp_path / "report.html").read_text()
    found = outline(page)
    assert found.loads == []
    assert found.headings == [
        "Evaluation on <crc>, step 60",
        "Loss",
        "Learning rate",
        "Spikes, and the tiles of a step",
        "Timeline",
        "Where the time went",
        "Restarts (1 of 1)",
        "What ran",
        "Slides that were left out",
        "How to go on",
    ]
    for text in (
        "60 of 100",
        "70.0 %",
        "+20.0 (5.0 to 30.0)",
        "0.750",
        "intervals are too narrow",
        "its &lt;offsets&gt; are damaged",
        "teacher: &lt;x&gt;",
        "commit cccccccccccc and changes",
        "torch 2.13",
        "--index &#x27;/data/my index&#x27;",
    ):
        assert text in page, text
    assert "<b>SIGKILL" not in page


def test_a_run_that_is_complete_is_not_told_to_go_on(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write_report(store, RECIPE, commit(100))
    page = (tmp_path / "report.html").read_text()
    assert "jobs/pretrain.py" not in page
    assert "jobs/export.py" in page
    assert "Every slide could be read" in page


def test_a_run_that_has_nothing_yet_is_reported_as_such(tmp_path: Path) -> None:
    _, text = write_report(open_store(tmp_path), RECIPE, None)
    assert text == ["0 committed steps; the run has no timeline, so nothing is known of its time"]
    assert "no timeline yet" in (tmp_path / "report.html").read_text()


def test_no_spike_is_lost_however_long_a_curve_is() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[77_777] = (77_777.0, -99.0)
    kept = thinned(points)
    assert len(kept) <= 800
    assert (54_321.0, 99.0) in kept
    assert (77_777.0, -99.0) in kept
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert thinned(points[:100]) == points[:100]


@pytest.mark.parametrize("values", [[1.0, 1.0], [0.0], [math.nan, 2.0, math.inf, 3.0], [-1e9, 1e-9]])
def test_a_curve_stays_inside_its_picture(values: list[float]) -> None:
    picture = line_chart({"<a>": [(float(step), value) for step, value in enumerate(values)]})
    drawn = re.search(r'points="([^"]+)"', picture)
    assert drawn is not None
    places = [tuple(map(float, pair.split(","))) for pair in drawn[1].split()]
    assert len(places) == sum(map(math.isfinite, values))
    assert all(64 <= x <= 860 and 0 <= y <= 190 for x, y in places)
    assert "&lt;a&gt;" in picture


def test_groups_of_tiles_are_drawn_those_furthest_apart_first() -> None:
    losses = {
        f"loss_by_stratum/site={name}": float(loss) for name, loss in zip("ABCDEFG", (5, 5, 5, 5, 5, 5, 9), strict=True)
    }
    charts = dict(charts_of([{"step": step, "loss_by_mpp/0.5": 5.0, **losses} for step in range(3)]))
    assert "site=G: 9 at step 0" in charts["Loss by stratum"]
    assert charts["Loss by stratum"].count("<polyline") == 5
    assert not [title for title in charts if "magnification" in title], "one is none"


def test_a_curve_without_a_finite_value_says_so() -> None:
    assert "No finite value" in line_chart({"a": [(0.0, math.nan)]})
