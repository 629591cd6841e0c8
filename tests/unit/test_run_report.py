"""The report of a run: one page that needs nothing else, made of whatever the run folder has."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.unit.run_folders import ALARM, RECIPE, STEPS, commit_of, evaluation, write_evaluations, write_run

from histoscale.checkpoint.manifest import Commit
from histoscale.errors import RunError
from histoscale.observe.metrics import read_metrics
from histoscale.observe.report_curves import Axes, charts_of, line_chart, nice_ticks, thinned
from histoscale.observe.run_report import write_report
from histoscale.storage import Store, open_store
from histoscale.stream.faults import Quarantined


class Outline(HTMLParser):
    """Headings, and what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.loads: list[str] = []
        self._in = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        self.loads += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]
        if tag in ("script", "link", "iframe"):
            self.loads.append(tag)

    def handle_data(self, data: str) -> None:
        if self._in == "h2":
            self.headings.append(data)


def outline(page: str) -> Outline:
    found = Outline()
    found.feed(page)
    return found


def reported(store: Store, commit: Commit | None) -> str:
    write_report(store, RECIPE, commit)
    return store.get("report.html").decode()


def test_the_lines_say_where_the_time_went(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write_run(store)
    uri, text = write_report(store, RECIPE, commit_of(RECIPE, STEPS))
    assert uri == f"{tmp_path}/report.html"
    assert text[0] == "60 committed steps, goodput 60.0%"
    assert "  steps taken again           9.0 s    9.0%" in text
    assert text[-3:] == [
        "  2023-11-14 22:14:10  at step 20, 2 workers, 10.0 s, 9 steps taken again: <b>SIGKILL</b>",
        f"alarm at step 14, 2023-11-14 22:13:45: {ALARM}",
        "The best step so far is 60, with a kNN (k=20) balanced accuracy of 70.0 % on crc.",
    ]
    assert [values["step"] for values in read_metrics(store, 3)] == [0, 1, 2]


def test_the_page_has_everything_in_it_and_loads_nothing(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write_run(store)
    write_evaluations(store, evaluation(60, 0.7, dataset="<pcam>"))
    store.put("evaluations/old-step-00000001.json", b'{"format": 1}')
    store.put("evaluations/torn-step-00000001.json", b'{"format": 2, "figures"')
    page = reported(store, commit_of(RECIPE, STEPS, Quarantined("a" * 32, 5, "its <offsets> are damaged")))
    found = outline(page)
    assert found.loads == []
    assert found.headings == [
        "In short",
        "Evaluation on <pcam>, step 60",
        "Evaluation on crc, step 60",
        "Loss",
        "Learning rate",
        "Pace",
        "Waiting for tiles",
        "Spikes, and the tiles of a step",
        "Timeline",
        "Where the time went",
        "Alarms",
        "Restarts (1 of 1)",
        "What ran",
        "Slides that were left out",
        "How to go on",
    ]
    for text in (
        "60 of 100",
        "<b>60</b><span>best step so far",
        "70.0 %",
        "+20.0 (5.0 to 30.0)",
        "0.700 to 0.800",
        "intervals are too narrow",
        "its &lt;offsets&gt; are damaged",
        "starves: &lt;i&gt;give",
        "teacher: &lt;x&gt;",
        "commit cccccccccccc and changes",
        "torch 2.13",
        "--index &#x27;/data/my index&#x27;",
        "<b>2 min</b>",
    ):
        assert text in page, text
    assert "<b>SIGKILL" not in page


def test_the_answers_at_the_top_have_numbers_and_their_uncertainty(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write_run(store)
    page = reported(store, commit_of(RECIPE, STEPS))
    assert "</b> Yes: at step 60 kNN (k=20) tells 70.0 % of crc (95 %: 60.0 to 80.0), +20.0 points against" in page
    assert "But 1 alarms rang" not in page
    assert "An alarm rang at step 14: training starves" in page
    assert "</b> 245,760 tiles of 409,600 (60.0 %) in 60 steps, a count from the ledger" in page
    assert (
        "</b> On crc, step 60, than colour statistics, better: +20.0 points (95 %: 5.0 to 30.0). The best step so far"
        in page
    )


@pytest.mark.parametrize(
    ("interval", "learning", "better"),
    [
        ((-0.1, 0.3), "Not established, the interval holds 0:", "not told apart:"),
        ((-0.3, -0.1), "No, it is worse:", "worse:"),
    ],
)
def test_what_is_not_established_is_not_claimed(
    tmp_path: Path, interval: tuple[float, float], learning: str, better: str
) -> None:
    store, report = open_store(tmp_path), evaluation(60, 0.6)
    gains = tuple(replace(gain, interval=interval) for gain in report.gains)
    write_evaluations(store, replace(report, gains=gains))
    page = reported(store, commit_of(RECIPE, STEPS))
    assert f"Is it learning?</b> {learning}" in page
    assert better in page
    assert "No step is named the best one yet." in page
    write_evaluations(store, replace(report, gains=()))
    page = reported(store, commit_of(RECIPE, STEPS))
    assert page.count("Not known yet because crc was evaluated without") == 2
    beside = replace(report.gains[0], baseline="<uni>", difference=-0.1, interval=(-0.2, -0.05))
    write_evaluations(store, replace(report, gains=(*report.gains, beside)))
    page = reported(store, commit_of(RECIPE, STEPS))
    assert "<th>gain over &lt;uni&gt;</th>" in page
    assert "than &lt;uni&gt;, worse: -10.0 points (95 %: -20.0 to -5.0)" in page


def test_a_best_step_that_somebody_named_is_told_and_a_damaged_one_left_out(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("evaluations/best.json", b'{"step": 40}')
    assert write_report(store, RECIPE, commit_of(RECIPE, STEPS))[1][-1] == "Somebody has named step 40 the best one."
    store.put("evaluations/best.json", b"{")
    assert "not known yet</b><span>best step so far" in reported(store, commit_of(RECIPE, STEPS))


@pytest.mark.parametrize(
    ("key", "content"),
    [("index.json", b"[]"), ("index.json", b'{"index": 1}'), ("provenance/1.json", b'{"packages": {}}')],
)
def test_a_damaged_record_is_a_diagnosis(tmp_path: Path, key: str, content: bytes) -> None:
    store = open_store(tmp_path)
    store.put(key, content)
    with pytest.raises(RunError, match=f"{key} of run .* is damaged"):
        write_report(store, RECIPE, None)


def test_a_run_that_is_complete_is_not_told_to_go_on(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write_report(store, RECIPE, commit_of(RECIPE, 100))
    page = (tmp_path / "report.html").read_text()
    assert "jobs/pretrain.py" not in page
    assert "jobs/export.py" in page
    assert "Every slide could be read" in page


def test_a_run_that_has_nothing_yet_is_reported_as_such(tmp_path: Path) -> None:
    _, text = write_report(open_store(tmp_path), RECIPE, None)
    assert text == ["0 committed steps; the run has no timeline, so nothing is known of its time"]
    page = (tmp_path / "report.html").read_text()
    assert "no timeline yet" in page
    assert page.count("ot known yet because no checkpoint was evaluated") == 2
    assert "Nothing that counts yet" in page


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
    assert all(0 <= x <= 1000 and 0 <= y <= 100 for x, y in places)
    assert "&lt;a&gt;" in picture


def test_groups_of_tiles_are_drawn_those_furthest_apart_first() -> None:
    losses = {
        f"loss_by_stratum/site={name}": float(loss) for name, loss in zip("ABCDEFG", (5, 5, 5, 5, 5, 5, 9), strict=True)
    }
    charts = dict(charts_of([{"step": step, "loss_by_mpp/0.5": 5.0, **losses} for step in range(3)]))
    assert "step 0\nsite=G: 9\n" in charts["Loss by stratum"]
    assert charts["Loss by stratum"].count("<polyline") == 5
    assert not [title for title in charts if "magnification" in title], "one is none"


def test_a_curve_without_a_finite_value_says_so() -> None:
    assert "No finite value" in line_chart({"a": [(0.0, math.nan)]})


def test_where_one_points_every_curve_tells_its_step_and_value() -> None:
    picture = line_chart({"<a>": [(0.0, 0.25), (1.0, 0.5)], "b": [(1.0, 0.75)]}, Axes("tiles seen", "share", True))
    assert re.findall("<title>(.*?)</title>", picture, re.DOTALL) == [
        "tiles seen 0\n&lt;a&gt;: 25 %",
        "tiles seen 1\n&lt;a&gt;: 50 %\nb: 75 %",
    ]
    assert ">share<" in picture
    assert ">tiles seen<" in picture
    long = line_chart({"a": [(float(step), float(step % 7)) for step in range(10_000)]})
    titles = re.findall("<title>(.*?)</title>", long, re.DOTALL)
    assert len(titles) == 120
    assert titles[0].startswith("step 0 to ")
    assert all("\na: 0 to 6, highest at step " in title for title in titles)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3.0, 8.0, [-2.0, 0.0, 2.0, 4.0, 6.0, 8.0]), (4.1, 4.3, None)],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float] | None) -> None:
    found = nice_ticks(low, high)
    assert ticks is None or found == pytest.approx(ticks)
    assert 3 <= len(found) <= 7
    assert low <= found[0]
    assert found[-1] <= high + 1e-9
