import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import tifffile

from histoscale.errors import SlideError, SlideIndexError
from histoscale.slides import build
from histoscale.slides.build import IndexProgress
from histoscale.slides.examine import examine
from histoscale.slides.index import (
    RefusedSlide,
    describe,
    make_index,
    read_index,
    read_locations,
    write_index,
    write_refused,
)
from histoscale.slides.records import Refusal, SlideIndex, SlideLocation, SlideRecord
from histoscale.storage import ObjectInfo, Store, open_store

NAME = "MRN-12345"


def record(number: int, shape: tuple[int, int] = (5, 7)) -> SlideRecord:
    mask = np.random.default_rng(number).random(shape) < 0.5
    return SlideRecord(f"{number:032x}", "aperio", 70, 50, 0.499, "vendor", 999, (1.0, 4.0001), mask, 16.03)


def location(number: int) -> SlideLocation:
    objects = (ObjectInfo(f"{NAME}/{number}-a.dcm", 9, "x"), ObjectInfo(f"{NAME}/{number}-b.dcm", 2, "y"))
    return SlideLocation("s3://bucket/root", objects, 0.25 if number else None)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "index")


@pytest.fixture
def index(store: Store) -> SlideIndex:
    index = make_index([record(2), record(0), record(1)], [Refusal("f" * 32, "no tissue found")])
    write_index(store, index, {record(number).slide_id: location(number) for number in range(4)})
    return index


def same(one: SlideRecord, other: SlideRecord) -> bool:
    names = [name for name in one.__dataclass_fields__ if name != "mask"]
    return np.array_equal(one.mask, other.mask) and all(getattr(one, n) == getattr(other, n) for n in names)


def test_an_index_comes_back_as_it_was_sorted_by_slide_id(store: Store, index: SlideIndex) -> None:
    back = read_index(store)
    assert [r.slide_id for r in back.records] == [record(number).slide_id for number in range(3)]
    assert all(same(r, record(number)) for number, r in enumerate(back.records))
    assert back.records[0].mask.dtype == np.bool_
    assert (back.snapshot_id, back.refusals) == (index.snapshot_id, index.refusals)
    assert read_locations(store) == {record(number).slide_id: location(number) for number in range(3)}


def test_masks_are_stored_as_bits(store: Store) -> None:
    large = record(0, (333, 1001))
    write_index(store, make_index([large], []), {large.slide_id: location(0)})
    table = pq.read_table(io.BytesIO(store.get("slides.parquet")))
    assert len(table["mask"][0].as_py()) == math.ceil(333 * 1001 / 8)
    assert same(read_index(store).records[0], large)


def test_the_snapshot_follows_the_records_and_nothing_else(index: SlideIndex) -> None:
    records = index.records
    assert make_index(reversed(records), []).snapshot_id == index.snapshot_id
    assert len(index.snapshot_id) == 16
    other_mask = records[0].mask.copy()
    other_mask[0, 0] ^= True
    changed = [
        replace(records[0], mpp=0.4990001),
        replace(records[0], mask=other_mask),
        replace(records[0], mask=records[0].mask.reshape(7, 5)),
        replace(records[0], level_downsamples=(1.0,)),
    ]
    snapshots = {make_index([first, *records[1:]], []).snapshot_id for first in changed}
    assert len(snapshots | {index.snapshot_id, make_index(records[1:], []).snapshot_id}) == 6


def test_names_are_in_the_protected_part_only(store: Store, index: SlideIndex, tmp_path: Path) -> None:
    write_refused(store, [RefusedSlide(index.refusals[0], f"s3://bucket/{NAME}.svs")])
    holders = {path.relative_to(tmp_path / "index") for path in tmp_path.rglob("*.*") if path.is_file()}
    public = {path for path in holders if path.parts[0] != "protected"}
    assert {str(path) for path in public} == {"index.json", "slides.parquet", "refusals.parquet"}
    for path in public:
        data = (tmp_path / "index" / path).read_bytes()
        assert NAME.encode() not in data
        if path.suffix == ".parquet":
            assert NAME not in str(pq.read_table(io.BytesIO(data)).to_pylist())
    assert NAME not in f"{index!r} {read_index(store)!r} {read_locations(store)!r} {describe(index)}"
    assert NAME in (tmp_path / "index" / "protected" / "refused.csv").read_text()
    for path in (tmp_path / "index" / "protected").iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_index_json_is_written_last(store: Store) -> None:
    written = []

    class Recorder:
        uri = store.uri

        def put(self, key: str, data: bytes) -> None:
            written.append(key)

    write_index(Recorder(), make_index([record(0)], []), {record(0).slide_id: location(0)})  # type: ignore[arg-type]
    assert written[-1] == "index.json"
    with pytest.raises(SlideIndexError, match=r"no slide index: index\.json is missing.*Run jobs/index\.py again"):
        read_index(store)


def rewrite_header(store: Store, **changes: object) -> None:
    store.put("index.json", json.dumps(json.loads(store.get("index.json")) | changes).encode())


def other_columns(store: Store) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"slide_id": ["a"]}), sink)
    store.put("slides.parquet", sink.getvalue())


@pytest.mark.parametrize(
    ("damage", "diagnosis"),
    [
        (lambda s: s.put("index.json", b"{"), "index.json is not JSON"),
        (lambda s: s.put("index.json", b"[]"), "index.json is not that of a slide index"),
        (lambda s: rewrite_header(s, format="other"), "index.json is not that of a slide index"),
        (lambda s: rewrite_header(s, version=2), r"slide index of another version \(got 2; expected 1\)"),
        (
            lambda s: rewrite_header(s, snapshot_id="0" * 16),
            "refusals.parquet of the index is not of the snapshot in index.json",
        ),
        (lambda s: s.delete("slides.parquet"), "the index has no slides.parquet"),
        (lambda s: s.put("refusals.parquet", b"torn"), "refusals.parquet of the index is not Parquet"),
        (other_columns, "slides.parquet of the index has other columns than version 1"),
    ],
)
def test_what_is_not_a_whole_index_of_this_version_is_refused_with_the_way_out(
    store: Store, index: SlideIndex, damage: Callable[[Store], None], diagnosis: str
) -> None:
    damage(store)
    with pytest.raises(SlideIndexError, match=diagnosis + r".*Run jobs/index\.py again"):
        read_index(store)


def test_locations_of_another_index_are_refused(store: Store, index: SlideIndex) -> None:
    rewrite_header(store, snapshot_id="0" * 16)
    with pytest.raises(SlideIndexError, match=r"locations\.parquet of the index is not of the snapshot"):
        read_locations(store)


def test_the_description_counts_what_is_there(index: SlideIndex) -> None:
    area = sum(int(r.mask.sum()) * (16.03 * 0.499 / 1000) ** 2 for r in index.records)
    lines = describe(make_index(index.records, [*index.refusals, Refusal("e" * 32, "no tissue found")]))
    assert lines == [
        f"accepted: 3 slides, {area:.1f} mm2 of tissue",
        "um/px: 0.50 x 3",
        "refused: 2 slides, by name in protected/refused.csv of the index",
        "  2 x no tissue found",
        f"snapshot: {index.snapshot_id}",
    ]


def test_progress_says_what_is_done_and_when_it_ends() -> None:
    assert IndexProgress(4, 0, 0, 0, 0.0).line() == "0 of 4 slides: 0 accepted, 0 refused"
    half = IndexProgress(10, 2, 1, 1, 0.5)
    assert (half.done, half.eta_s) == (4, 12.0)
    assert half.line() == "4 of 10 slides: 2 accepted, 1 refused, 1 unchanged, 0.50 slides/s, 12 s left"


def test_a_real_slide_is_examined(shared_data: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    found = examine("a" * 32, [path])
    assert (found.width_px0, found.height_px0, found.vendor, found.mpp_origin) == (2220, 2967, "aperio", "vendor")
    assert found.size_bytes == path.stat().st_size
    rows, columns = found.mask.shape
    assert abs(columns * found.mask_px0 - 2220) <= found.mask_px0
    assert abs(rows * found.mask_px0 - 2967) <= found.mask_px0
    # The slide is 1.11 x 1.48 mm, all of it skin.
    assert 0.5 < found.tissue_mm2 < 1.64


def test_a_dicom_folder_of_two_series_is_refused(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "slides" / "CMU-1-Small-Region-dicom"
    paths = [tmp_path / "0.dcm", tmp_path / "1.dcm"]
    paths[0].write_bytes((source / "level-10-frames-0-1.dcm").read_bytes())
    other = pydicom.dcmread(source / "level-11-frames-0-1.dcm")
    other.SeriesInstanceUID = pydicom.uid.generate_uid()
    other.save_as(paths[1])
    with pytest.raises(SlideError, match="its DICOM folder holds 2 series"):
        examine("a" * 32, paths)
    paths[1].write_bytes(b"not DICOM")
    with pytest.raises(SlideError, match="is not DICOM or names no series") as caught:
        examine("a" * 32, paths)
    assert str(tmp_path) not in str(caught.value)


def test_a_slide_of_bare_glass_is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.tif"
    write_glass(path)
    with pytest.raises(SlideError, match="no tissue found"):
        examine("a" * 32, [path])


def write_glass(path: Path) -> None:
    glass = np.full((1024, 1024, 3), 243, np.uint8)
    tifffile.imwrite(path, glass, tile=(256, 256), resolution=(20_000, 20_000), resolutionunit="CENTIMETER")


def placed(folder: Path) -> SlideLocation:
    (folder / f"{NAME}.svs").write_bytes(b"slide")
    return SlideLocation(str(folder), tuple(open_store(folder).list()), None)


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, MemoryError])
def test_whatever_a_reader_raises_is_a_reason_without_names(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> SlideRecord:
        raise kind(f"cannot read {tmp_path}/{NAME}.svs")

    monkeypatch.setattr(build, "examine", broken)
    assert build.outcome("a" * 32, placed(tmp_path), 1) == {
        "slide_id": "a" * 32,
        "reason": f"reading it failed with {kind.__name__}",
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [("damaged {root}/{name}.svs", "it cannot be read"), ("{root} is full", "SLIDES is full"), ("torn", "torn")],
)
def test_a_diagnosis_is_a_reason_only_as_far_as_it_holds_no_name(
    text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> SlideRecord:
        raise SlideError(text.format(root=tmp_path, name=NAME))

    monkeypatch.setattr(build, "examine", refused)
    assert build.outcome("a" * 32, placed(tmp_path), 1)["reason"] == reason


def test_a_slide_that_changed_or_went_since_the_listing_is_a_reason(tmp_path: Path) -> None:
    where = placed(tmp_path)
    (tmp_path / f"{NAME}.svs").write_bytes(b"another")
    assert "changed since it was listed" in build.outcome("a" * 32, where, 1)["reason"]
    (tmp_path / f"{NAME}.svs").unlink()
    assert "does not exist" in build.outcome("a" * 32, where, 1)["reason"]


def test_a_slide_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.svs").write_bytes(b"slide")
    where = SlideLocation(str(tmp_path), tuple(open_store(tmp_path).list()), None)
    assert build.outcome("a" * 32, where, 1)["reason"] == "its name is not UTF-8. Rename the file or its folder"
    write_refused(open_store(tmp_path / "index"), [RefusedSlide(Refusal("a" * 32, "x"), where.objects[0].key)])
    assert "caf\\udce9" in (tmp_path / "index" / "protected" / "refused.csv").read_text()


@pytest.mark.parametrize("stranger", ["recipe.yaml", "index.json"])
def test_an_index_is_never_written_over_something_else(tmp_path: Path, stranger: str) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "a.svs").write_bytes(b"x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / stranger).write_text('{"index": "of a run"}')
    with pytest.raises(SlideIndexError, match="holds something else than an index"):
        build.build_index(str(tmp_path / "slides"), str(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [stranger]


def test_a_header_that_a_crash_has_torn_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"form')
    build._refuse_strangers(open_store(tmp_path))
