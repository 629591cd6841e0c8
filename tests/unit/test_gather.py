import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from histoscale.errors import SlideIndexError
from histoscale.slides import pending
from histoscale.slides.archive import Archive
from histoscale.slides.commit import commit
from histoscale.slides.examine import EXAMINATION_VERSION
from histoscale.slides.exclusions import append_exclusion, exclude, read_exclusions
from histoscale.slides.external_sort import SlideSorter
from histoscale.slides.gather import Gathering, forget_pending
from histoscale.slides.identity import slide_id
from histoscale.slides.index import read_index
from histoscale.slides.locate import LocatedSlide
from histoscale.slides.pending import PENDING_SCHEMA, Spill, pending_parts
from histoscale.slides.records import EXAMINED_SCHEMA, SlideRecord, kind_of, record_to_row
from histoscale.slides.snapshot import read_snapshot
from histoscale.slides.strata import Strata
from histoscale.storage import ObjectInfo, Store, open_store

KEY = bytes(range(32))


def archive(etags: dict[str, str], patients: dict[str, str] | None = None, mpp: float | None = None) -> Archive:
    slides = {slide_id(KEY, path): LocatedSlide(path, (ObjectInfo(path, 9, etag),)) for path, etag in etags.items()}
    scales = {} if mpp is None else dict.fromkeys(etags, mpp)
    return Archive("/slides", slides, scales, Strata((), dict.fromkeys(etags, ()), patients or {}), KEY)


def row(found: Gathering, path: str, reason: str | None = None, version: int = EXAMINATION_VERSION) -> dict[str, Any]:
    name = slide_id(KEY, path)
    mask = np.ones((3, 4), np.bool_)
    plain = record_to_row(SlideRecord(name, "aperio", 7, 5, 0.5, "vendor", len(path), (1.0,), mask, 16.0))
    content = {"slide_id": name} if reason else {column: plain[column] for column in EXAMINED_SCHEMA.names}
    return content | {"fingerprint": found.fingerprint(name), "reason": reason, "version": version}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "index")


@pytest.fixture
def gather(store: Store, tmp_path: Path) -> Iterator[Any]:
    """Makes a gathering of an archive, with what earlier runs have found."""
    made = 0

    def begin(slides: Archive) -> Gathering:
        nonlocal made
        made += 1
        folder = tmp_path / f"sort-{made}"
        folder.mkdir()
        found = Gathering(slides, SlideSorter(folder, len(slides.slides)))
        found.take_earlier(store)
        return found

    return begin


def finish(store: Store, slides: Archive, found: Gathering) -> None:
    commit(store, found._sorter, list(found.refusals.values()), slides.about())
    forget_pending(store, found.pending)


def paths_left(slides: Archive, found: Gathering) -> set[str]:
    return {slides.slides[name].path for name in found.left}


def test_a_killed_run_goes_on_with_what_it_had_not_examined(store: Store, gather: Any) -> None:
    slides = archive({"a.svs": "1", "b.svs": "1", "c.svs": "1"})
    found = gather(slides)
    spill = Spill(store, found.take)
    spill.add(row(found, "a.svs"))
    spill.add(row(found, "b.svs", "no tissue found"))
    spill.flush()
    spill.add(row(found, "c.svs"))  # killed before it is written

    again = gather(slides)
    assert paths_left(slides, again) == {"c.svs"}
    assert (again.accepted, len(again.refusals)) == (1, 1)
    again.take(pa.RecordBatch.from_pylist([row(again, "c.svs")], schema=PENDING_SCHEMA))
    finish(store, slides, again)
    assert {record.size_bytes for record in read_index(store).records} == {5}
    assert [refusal.reason for refusal in read_index(store).refusals] == ["no tissue found"]
    assert pending_parts(store) == []
    third = gather(slides)
    assert paths_left(slides, third) == set()


def test_rows_are_written_after_a_number_or_a_time(store: Store, gather: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gather(archive({f"{n}.svs": "1" for n in range(5)}))
    monkeypatch.setattr(pending, "MAX_ROWS", 2)
    spill = Spill(store, found.take)
    for n in range(3):
        spill.add(row(found, f"{n}.svs"))
    assert (len(spill.keys), found.accepted) == (1, 2)
    monkeypatch.setattr(pending, "MAX_AGE_S", 0.0)
    spill.add(row(found, "3.svs"))
    assert (len(spill.keys), found.accepted) == (2, 4)
    spill.flush()
    assert [part.key for part in pending_parts(store)] == spill.keys


def test_what_changed_is_examined_again_and_what_left_is_gone(store: Store, gather: Any) -> None:
    before = archive({"a.svs": "1", "b.svs": "1", "c.svs": "1", "d.svs": "1"})
    found = gather(before)
    rows = [row(found, "a.svs"), row(found, "b.svs"), row(found, "c.svs", "torn"), row(found, "d.svs", "torn")]
    found.take(pa.RecordBatch.from_pylist(rows, schema=PENDING_SCHEMA))
    finish(store, before, found)
    after = archive({"b.svs": "2", "c.svs": "1", "d.svs": "2", "e.svs": "1"})
    assert paths_left(after, gather(after)) == {"b.svs", "d.svs", "e.svs"}
    scaled = archive({"a.svs": "1", "c.svs": "1"}, mpp=0.5)
    assert paths_left(scaled, gather(scaled)) == {"a.svs", "c.svs"}


def test_a_refused_slide_is_tried_again_by_a_later_examination(store: Store, gather: Any) -> None:
    slides = archive({"a.svs": "1", "b.svs": "1"})
    found = gather(slides)
    rows = [row(found, "a.svs", version=0), row(found, "b.svs", "torn", version=0)]
    found.take(pa.RecordBatch.from_pylist(rows, schema=PENDING_SCHEMA))
    assert paths_left(slides, found) == {"b.svs"}


def test_the_first_of_two_outcomes_counts(gather: Any) -> None:
    slides = archive({"a.svs": "1"})
    found = gather(slides)
    rows = [row(found, "a.svs"), row(found, "a.svs"), row(found, "a.svs", "torn")]
    found.take(pa.RecordBatch.from_pylist(rows[:2], schema=PENDING_SCHEMA))
    found.take(pa.RecordBatch.from_pylist(rows[2:], schema=PENDING_SCHEMA))
    assert (found.accepted, found.refusals) == (1, {})


@pytest.mark.parametrize("kind", ["slides", "refusals", "pending"])
def test_what_earlier_runs_left_damaged_is_examined_again(store: Store, gather: Any, kind: str) -> None:
    slides = archive({"a.svs": "1", "b.svs": "1", "c.svs": "1"})
    found = gather(slides)
    rows = [row(found, "a.svs"), row(found, "b.svs", "torn")]
    found.take(pa.RecordBatch.from_pylist(rows, schema=PENDING_SCHEMA))
    finish(store, slides, found)
    spill = Spill(store, lambda batch: None)
    spill.add(row(found, "c.svs"))
    spill.flush()
    (part,) = pending_parts(store) if kind == "pending" else read_snapshot(store).parts(kind)
    data = bytearray(store.get(part.key))
    data[len(data) // 3] ^= 0xFF
    store.put(part.key, bytes(data[:-1]))
    lost = {"slides": "a.svs", "refusals": "b.svs", "pending": "c.svs"}[kind]
    assert paths_left(slides, gather(slides)) == {lost}


def test_millions_of_rows_are_sorted_part_by_part(tmp_path: Path) -> None:
    names = [slide_id(KEY, str(n)) for n in range(3000)]
    empty = {column: None for column in EXAMINED_SCHEMA.names} | {"width_px0": 1, "height_px0": 1, "mpp": 1.0}
    rows = [empty | {"slide_id": name, "look": n, "tissue_px": n} for n, name in enumerate(names)]
    sorter = SlideSorter(tmp_path, len(rows), rows_per_part=100)
    for first in range(0, 3000, 700):
        sorter.add(pa.RecordBatch.from_pylist(rows[first : first + 700], schema=EXAMINED_SCHEMA))
    parts = [part["slide_id"].to_pylist() for part in sorter.parts()]
    assert [name for part in parts for name in part] == sorted(names)
    assert len(parts) == 30
    assert max(map(len, parts)) < 150
    assert list(tmp_path.iterdir()) == []
    assert sorter.likeness["slide_id"].tolist() == [name.encode() for name in sorted(names)]
    assert sorter.likeness["look"].tolist() == [names.index(name) for name in sorted(names)]


def test_reasons_are_counted_without_the_values_that_were_met() -> None:
    for reason, kind in {
        "torn (got 'a header (1) at 5'; expected 9 bytes). Copy it": "torn (expected 9 bytes). Copy it",
        "no scale (expected 1 to 9). See (slide,mpp)": "no scale (expected 1 to 9). See (slide,mpp)",
        "cut (got 5). Copy it": "cut. Copy it",
        'odd (got "it\'s; x")': "odd",
    }.items():
        assert kind_of(reason) == kind


def test_exclusions_are_numbered_and_never_written_over(store: Store) -> None:
    assert read_exclusions(store) == ()
    append_exclusion(store, ["b" * 32, "a" * 32, "b" * 32])
    first = store.get("exclusions/0001.json")
    # Another writer takes the next number at the same moment.
    taken = iter([False, True])

    class Raced:
        def put_if_absent(self, key: str, data: bytes) -> bool:
            if not next(taken):
                append_exclusion(store, ["c" * 32])
            return store.put_if_absent(key, data)

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

    assert append_exclusion(Raced(), ["d" * 32]).number == 3  # type: ignore[arg-type]
    assert store.get("exclusions/0001.json") == first
    assert [exclusion.slide_ids for exclusion in read_exclusions(store)] == [
        ("a" * 32, "b" * 32),
        ("c" * 32,),
        ("d" * 32,),
    ]


def test_appending_against_others_forever_is_a_diagnosis(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(store), "put_if_absent", lambda self, key, data: False)
    with pytest.raises(SlideIndexError, match="appended by others again and again"):
        append_exclusion(store, ["a" * 32])


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("0001.json", b"{"),
        ("0001.json", b"[]"),
        ("0001.json", b"{}"),
        ("x.json", json.dumps({"format": "histoscale-exclusion", "created": "", "count": 0, "slide_ids": []}).encode()),
        (
            "0001.json",
            json.dumps({"format": "histoscale-exclusion", "created": "", "count": 2, "slide_ids": []}).encode(),
        ),
    ],
)
def test_an_exclusion_that_is_damaged_stops_who_reads_it(store: Store, key: str, data: bytes) -> None:
    store.put(f"exclusions/{key}", data)
    with pytest.raises(SlideIndexError, match=rf"exclusions/{key} is no exclusion"):
        read_exclusions(store)


def test_slides_and_patients_are_excluded_by_id(store: Store, gather: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTOSCALE_ID_KEY", KEY.hex())
    slides = archive({"n/a.svs": "1", "n/b.svs": "1", "c.svs": "1", "d.svs": "1"}, {"n/b.svs": "MRN1", "d.svs": "MRN1"})
    found = gather(slides)
    rows = [row(found, path) for path in ("n/a.svs", "n/b.svs", "c.svs", "d.svs")]
    found.take(pa.RecordBatch.from_pylist(rows, schema=PENDING_SCHEMA))
    finish(store, slides, found)
    done = exclude(store, "/slides", b"slide,patient\na.svs,\n,MRN1\n")
    ids = {path: slide_id(KEY, path) for path in ("n/a.svs", "n/b.svs", "d.svs")}
    assert done.slide_ids == tuple(sorted(ids.values()))
    assert read_exclusions(store) == (done,)
    for text in (b"slide\nMRN2.svs\n", b"patient\nMRN2\nMRN1\n"):
        with pytest.raises(
            SlideIndexError, match=r"no such slide in SLIDES|1 of 2 patients to exclude have no slide"
        ) as caught:
            exclude(store, "/slides", text)
        assert "MRN" not in str(caught.value)
    with pytest.raises(SlideIndexError, match="of slides of another place"):
        exclude(store, "/other", b"slide\na.svs\n")
    assert len(read_exclusions(store)) == 1
