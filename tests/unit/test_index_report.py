import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from histoscale.errors import SlideIndexError
from histoscale.slides.index import Refusal, SlideLocation, SlideRecord, make_index, write_index
from histoscale.slides.report import count, pictures, write_report
from histoscale.slides.snapshot import read_snapshot
from histoscale.storage import ObjectInfo, Store, open_store

NAME = "MRN-12345"
SIDE = 96


def jpeg() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (240, 240, 240)).save(data, "JPEG")
    return data.getvalue()


def record(number: int, mpp: float, site: str, conflict: float | None = None, picture: bool = False) -> SlideRecord:
    mask = np.zeros((48, 48), np.bool_)
    mask[12:36, 12:36] = True
    return SlideRecord(
        f"{number:032x}",
        "aperio" if number else "<b>",
        9000,
        9000,
        mpp,
        "vendor",
        2 * 10**9,
        (1.0,),
        mask,
        8 / mpp,
        mpp_conflict=conflict,
        look=number * 0x123456789ABCDEF,
        picture=jpeg() if picture else None,
        patient="a" * 32 if number < 2 else None,
        strata=(site,),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "index")
    records = [
        record(0, 0.25, "north", picture=True),
        record(1, 0.2752, "north"),
        record(2, 0.5, "south & east", conflict=0.25),
        record(3, 0.5, "", picture=True),
    ]
    refusals = [Refusal(f"{n:x}" * 32, f"slide is <torn> (got {n})") for n in (4, 5)]
    where = SlideLocation("/slides", (ObjectInfo(f"{NAME}.svs", 1, "e"),), None)
    write_index(store, make_index(records, refusals, ("site",)), {r.slide_id: where for r in records})
    return store


def test_counts_are_those_of_the_slides(store: Store) -> None:
    counts = count(store, read_snapshot(store))
    assert counts.by_value == [{"north": 2, "south & east": 1, "": 1}]
    # 0.25 um/px may be enlarged by a tenth, so that 0.275 serves it and 0.2752 does not.
    assert counts.served == {"north": [1, 2, 2, 2], "south & east": [0, 1, 1, 1], "": [0, 1, 1, 1]}
    assert counts.scales == {0.25: 1, 0.275: 1, 0.5: 2}
    assert counts.conflicts == {("0.500", "0.250"): 1}
    assert (counts.by_vendor, counts.size_bytes, len(counts.patients)) == ({"aperio": 3, "<b>": 1}, 8 * 10**9, 1)


def test_pictures_have_the_outline_of_the_tissue_and_nothing_inside_it(store: Store) -> None:
    found = pictures(store, read_snapshot(store))
    assert [picture.caption for picture in found] == ["0.25 µm/px · north", "0.5 µm/px"]
    pixels = np.asarray(Image.open(io.BytesIO(found[0].jpeg)).convert("RGB")).astype(int)
    green = pixels[..., 1] - pixels[..., 0] > 60
    assert green[24, 24:72].mean() > 0.9
    assert green[24:72, 71].mean() > 0.9
    assert not green[32:64, 32:64].any()
    assert not green[:16].any()


def test_the_page_stands_alone_and_names_nothing(store: Store) -> None:
    uri = write_report(store)
    html = store.get("report.html").decode()
    assert uri == f"{store.uri}/report.html"
    for shown in ("north", "south &amp; east", "slide is &lt;torn&gt;", "&lt;b&gt;", "8.0 GB", "Scales in doubt"):
        assert shown in html
    assert html.count("<figure>") == 2
    assert '<td>slide is &lt;torn&gt;</td><td class="n">2</td>' in html
    assert NAME not in html
    assert not re.search(r"(src|href)=\"(?!data:|#)|@import|url\(|<script", html)


def test_an_index_without_strata_and_pictures_has_a_page_too(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    plain = SlideRecord("0" * 32, "aperio", 70, 50, 0.25, "vendor", 9, (1.0,), np.ones((2, 2), np.bool_), 32.0)
    where = SlideLocation("/slides", (ObjectInfo(f"{NAME}.svs", 1, "e"),), None)
    write_index(store, make_index([plain], []), {plain.slide_id: where})
    write_report(store)
    html = store.get("report.html").decode()
    assert "all slides" in html
    assert "Refused slides" not in html
    assert "<figure>" not in html


def test_of_many_values_the_largest_are_shown_and_the_rest_is_summed_up(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    records = [record(n, 0.25, f"site {n // 2:02d}") for n in range(100)]
    where = SlideLocation("/slides", (ObjectInfo(f"{NAME}.svs", 1, "e"),), None)
    write_index(store, make_index(records, [], ("site",)), {r.slide_id: where for r in records})
    write_report(store)
    html = store.get("report.html").decode()
    assert html.count("<td>10 others</td>") == 2
    assert "site 39" in html
    assert "site 40" not in html


def test_a_place_without_an_index_is_a_diagnosis(tmp_path: Path) -> None:
    with pytest.raises(SlideIndexError, match="no slide index"):
        write_report(open_store(tmp_path))
