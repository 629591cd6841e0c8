"""The pages of the report in a real browser: whole, silent, self-contained, and as wide as the window."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
from tests.unit.run_folders import RECIPE, STEPS, commit_of, write_run

from histoscale.config.recipe import Recipe
from histoscale.observe.comparison import read_record
from histoscale.observe.comparison_page import comparison_page
from histoscale.observe.run_report import write_report
from histoscale.storage import open_store
from histoscale.stream.faults import Quarantined

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1200, 400)
PROBE = """
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement
    const seen = element => element.getBoundingClientRect()
    const outside = [...page.querySelectorAll("section > p, section > .chart, h2, nav a, .facts div, pre")]
      .filter(element => seen(element).right > root.clientWidth + 1 || seen(element).left < -1)
    return {
      width: root.clientWidth,
      scrolled: root.scrollWidth,
      outside: outside.map(element => element.textContent.slice(0, 60)),
      sections: [...page.querySelectorAll("section")].map(each => [each.id, seen(each).height]),
      links: [...page.querySelectorAll("nav a")].map(each => each.getAttribute("href").slice(1)),
      charts: page.querySelectorAll(".chart").length,
      legends: page.querySelectorAll(".chart .legend i").length,
      titles: [...page.querySelectorAll("rect.hit > title")].map(each => each.textContent),
      drawn: [...page.querySelectorAll("polyline")].map(each => each.getBBox().width),
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map(each => each.name),
    }
  })
  const out = document.createElement("pre")
  out.id = "found"
  out.textContent = JSON.stringify(found)
  document.body.append(out)
})
</script>
"""


def look_at(page: str, folder: Path) -> list[dict[str, Any]]:
    """What a browser makes of a page, at each width."""
    if BROWSER is None:
        pytest.skip("no Chromium here to draw the pages: `apt-get install chromium` brings one")
    frames = "".join(
        f'<iframe srcdoc="{escape(page)}" style="width:{width}px;height:900px;border:0"></iframe>' for width in WIDTHS
    )
    file = folder / "probe.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><body>{PROBE}{frames}</body>")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1300,1000",
        "--dump-dom",
    ]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--disable-background-networking"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", "--virtual-time-budget=10000", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-500:]
    looks: list[dict[str, Any]] = json.loads(unescape(found[1]))
    told = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return [{**look, "told": told} for look in looks]


def check(page: str, folder: Path) -> list[dict[str, Any]]:
    """What holds of every page."""
    assert not re.search(
        r"src\s*=\s*[\"'](?!data:)|href\s*=\s*[\"'](?:\w+:|//)|@import|url\(|<script|<link|<iframe", page
    )
    looks = look_at(page, folder)
    assert [look["width"] for look in looks] == list(WIDTHS)
    for look in looks:
        assert look["scrolled"] <= look["width"], "the page is wider than the window"
        assert look["outside"] == []
        assert look["loaded"] == []
        assert look["told"] == []
        assert [name for name, _ in look["sections"]] == look["links"]
        assert all(height > 40 for _, height in look["sections"])
        assert look["legends"] >= look["charts"] > 3
        assert all(width > 0 for width in look["drawn"])
    return looks


def test_the_report_of_a_run(tmp_path: Path) -> None:
    store = open_store(tmp_path / "run")
    write_run(store)
    uri, _ = write_report(store, RECIPE, commit_of(RECIPE, STEPS, Quarantined("a" * 32, 5, "its offsets are damaged")))
    for look in check(Path(uri).read_text(), tmp_path):
        assert {"in-short", "evaluation-on-crc-step-60", "loss", "timeline", "alarms"} <= set(look["links"])
        assert "step 20\nkNN (k=20): 60 % (95 %: 50 % to 70 %)" in look["titles"]
        assert "step 0\ntotal: 9" in look["titles"]


def test_a_run_without_anything_yet(tmp_path: Path) -> None:
    uri, _ = write_report(open_store(tmp_path / "run"), RECIPE, None)
    for look in look_at(Path(uri).read_text(), tmp_path):
        assert look["scrolled"] <= look["width"]
        assert look["charts"] == 0


def test_the_comparison_of_eight_runs(tmp_path: Path) -> None:
    records = []
    for number in range(8):
        recipe = Recipe.model_validate({**RECIPE.model_dump(), "seed": number, "optim": {"lr": 1e-4 * (1 + number)}})
        store = open_store(tmp_path / f"a-run-with-a-longer-name-{number}")
        write_run(store, recipe, accuracy=0.6 + 0.03 * number)
        records.append(read_record(store, recipe, commit_of(recipe, STEPS)))
    for look in check(comparison_page(records, ["/runs/gone: it is no run folder"]), tmp_path):
        assert {"what-differs-in-the-recipes", "evaluation-on-crc", "loss-total", "time-and-cost"} <= set(look["links"])
        assert any(title.count("a-run-with-a-longer-name-") == 8 for title in look["titles"])


def test_what_a_page_must_not_do_is_seen(tmp_path: Path) -> None:
    bad = '<main><section id="a"><h2>A</h2><p style="width:1500px">wide</p></section></main>'
    bad += '<script>console.error("told")</script><img src="http://histoscale.invalid/a.png">'
    for look in look_at(bad, tmp_path):
        assert look["scrolled"] > look["width"]
        assert look["outside"] == ["wide"]
        assert look["loaded"] == ["http://histoscale.invalid/a.png"]
        assert any("told" in line for line in look["told"])
