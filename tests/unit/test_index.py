import hashlib
import io
import json
import math
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom
import pytest
import tifffile
from openslide import OpenSlide
from PIL import Image

from histoscale.errors import SlideError, SlideIndexError, StorageError
from histoscale.slides import build
from histoscale.slides.catalogue import DUPLICATE, MPP_CONFLICT, Locations, open_catalogue
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
from histoscale.slides.layout import SlideLayout
from histoscale.slides.locate import locate
from histoscale.slides.opening import _check_one_series, entry_file, open_located
from histoscale.slides.progress import IndexProgress
from histoscale.slides.records import SLIDES_SCHEMA, Refusal, SlideIndex, SlideLocation, SlideRecord
from histoscale.slides.snapshot import read_history, read_snapshot
from histoscale.slides.table_cache import TableCache
from histoscale.slides.tables import table_bytes
from histoscale.storage import ObjectInfo, Store, open_store
from histoscale.storage.cache import ObjectCache
from histoscale.storage.local import LocalStore
from histoscale.storage.ranges import open_ranges

NAME = "MRN-12345"


def record(number: int, shape: tuple[int, int] = (5, 7), **changes: object) -> SlideRecord:
    mask = np.random.default_rng(number).random(shape) < 0.5
    plain = SlideRecord(f"{number:032x}", "aperio", 70, 50, 0.499, "vendor", 999, (1.0, 4.0001), mask, 16.03)
    return replace(plain, layout=bytes([number]) * number, look=number, **changes)  # type: ignore[arg-type]


def location(number: int) -> SlideLocation:
    objects = (ObjectInfo(f"{NAME}/{number}-a.dcm", 9, "x"), ObjectInfo(f"{NAME}/{number}-b.dcm", 2, f"y{number}"))
    return SlideLocation("s3://bucket/root", objects, 0.25 if number else None)


def locations(*numbers: int) -> dict[str, SlideLocation]:
    return {record(number).slide_id: location(number) for number in numbers}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "index")


@pytest.fixture
def index(store: Store) -> SlideIndex:
    index = make_index([record(2), record(0), record(1)], [Refusal("f" * 32, "no tissue found")])
    write_index(store, index, locations(0, 1, 2, 3))
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
    assert read_locations(store) == locations(0, 1, 2)


def test_masks_are_stored_as_packed_bits(store: Store) -> None:
    large = record(0, (333, 1001))
    write_index(store, make_index([large], []), {large.slide_id: location(0)})
    (part,) = read_snapshot(store).parts("slides")
    table = pq.read_table(io.BytesIO(store.get(part.key)))
    bits = zlib.decompress(table["mask"][0].as_py())
    assert len(bits) == math.ceil(333 * 1001 / 8)
    assert table["mask_sha256"][0].as_py() == hashlib.sha256(bits).hexdigest()
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
        replace(records[0], layout=b"elsewhere"),
        replace(records[0], strata=("site",)),
        replace(records[0], patient="a" * 32),
    ]
    snapshots = {make_index([first, *records[1:]], []).snapshot_id for first in changed}
    assert len(snapshots | {index.snapshot_id, make_index(records[1:], []).snapshot_id}) == 9
    beside = [replace(records[0], picture=b"jpeg"), replace(records[0], duplicate_of="b" * 32)]
    assert {make_index([first, *records[1:]], []).snapshot_id for first in beside} == {index.snapshot_id}


def test_a_snapshot_is_written_once_and_stays_readable(store: Store, index: SlideIndex) -> None:
    before = {info.key: store.get(info.key) for info in store.list()}
    write_index(store, index, locations(0, 1, 2))
    assert {info.key: store.get(info.key) for info in store.list()} == before

    grown = make_index([*index.records, record(3)], [])
    write_index(store, grown, locations(0, 1, 2, 3))
    moved = {record(number).slide_id: location(number + 10) for number in range(4)}
    write_index(store, grown, moved)
    changed = {info.key for info in store.list() if before.get(info.key) != store.get(info.key)} & before.keys()
    assert changed == {"index.json"}
    assert read_index(store).snapshot_id == grown.snapshot_id
    assert read_locations(store) == moved
    assert [r.slide_id for r in read_index(store, index.snapshot_id).records] == [r.slide_id for r in index.records]
    assert read_locations(store, index.snapshot_id) == locations(0, 1, 2)
    history = read_history(store)
    assert [entry["snapshot_id"] for entry in history] == [index.snapshot_id] + 2 * [grown.snapshot_id]
    assert len({entry["folder"] for entry in history}) == 3
    assert read_snapshot(store).parent == history[1]["folder"]
    with pytest.raises(SlideIndexError, match=r"no such snapshot \(got 'beef'.*Give the index"):
        read_index(store, "beef")


def test_names_are_in_the_protected_part_only(store: Store, index: SlideIndex, tmp_path: Path) -> None:
    write_refused(store, [RefusedSlide(index.refusals[0], f"s3://bucket/{NAME}.svs")])
    holders = {path.relative_to(tmp_path / "index") for path in tmp_path.rglob("*.*") if path.is_file()}
    public = {path for path in holders if path.parts[0] != "protected"}
    folder = f"snapshots/{index.snapshot_id}"
    files = [
        "snapshot.json",
        "catalogue.npy",
        "records.bin",
        "slides/part-00000.parquet",
        "refusals/part-00000.parquet",
    ]
    assert {str(path) for path in public} == {"index.json", *(f"{folder}/{name}" for name in files)}
    for path in public:
        data = (tmp_path / "index" / path).read_bytes()
        assert NAME.encode() not in data
        if path.suffix == ".parquet":
            assert NAME not in str(pq.read_table(io.BytesIO(data)).to_pylist())
    shown = [index, read_index(store), read_locations(store), read_snapshot(store), describe(read_snapshot(store))]
    shown += [Locations(open_catalogue(store.uri)).location(0)]
    assert NAME not in repr(shown)
    assert NAME in (tmp_path / "index" / "protected" / "refused.csv").read_text()
    for path in (tmp_path / "index" / "protected").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_index_json_is_written_last(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class PulledPlug(Exception):
        pass

    def fail(self: object, key: str, data: bytes) -> None:
        if key == "index.json":
            raise PulledPlug
        put(self, key, data)

    put = LocalStore.put
    monkeypatch.setattr(LocalStore, "put", fail)
    with pytest.raises(PulledPlug):
        write_index(store, make_index([record(0)], []), locations(0))
    monkeypatch.undo()
    assert any(info.key.endswith("snapshot.json") for info in store.list())
    with pytest.raises(SlideIndexError, match=r"no slide index: index\.json is missing.*Run jobs/index\.py again"):
        read_index(store)
    write_index(store, make_index([record(0)], []), locations(0))
    assert same(read_index(store).records[0], record(0))


def rewrite(store: Store, key: str, **changes: object) -> None:
    store.put(key, json.dumps(json.loads(store.get(key)) | changes).encode())


def key(store: Store, name: str) -> str:
    return f"snapshots/{read_snapshot(store).folder}/{name}"


def other_columns(store: Store) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"slide_id": ["a"]}), sink)
    store.put(key(store, "slides/part-00000.parquet"), sink.getvalue())


def fewer_slides(store: Store) -> None:
    table = pq.read_table(io.BytesIO(store.get(key(store, "slides/part-00000.parquet"))))
    store.put(key(store, "slides/part-00000.parquet"), table_bytes(table.slice(1)))


def other_mask(store: Store) -> None:
    rows = pq.read_table(io.BytesIO(store.get(key(store, "slides/part-00000.parquet")))).to_pylist()
    rows[0]["mask"] = zlib.compress(b"cut")
    store.put(key(store, "slides/part-00000.parquet"), table_bytes(pa.Table.from_pylist(rows, schema=SLIDES_SCHEMA)))


@pytest.mark.parametrize(
    ("damage", "diagnosis"),
    [
        (lambda s: s.put("index.json", b"{"), "index.json is not JSON"),
        (lambda s: s.put("index.json", b"[]"), "index.json is not that of a slide index"),
        (lambda s: rewrite(s, "index.json", format="other"), "index.json is not that of a slide index"),
        (lambda s: rewrite(s, "index.json", history=[]), "index.json has no history"),
        (lambda s: s.delete(key(s, "snapshot.json")), "there is no snapshots/.*/snapshot.json"),
        (lambda s: s.put(key(s, "snapshot.json"), b"{}"), "snapshot.json is not that of a snapshot"),
        (lambda s: rewrite(s, key(s, "snapshot.json"), version=9), "snapshot.json is of another format or version"),
        (lambda s: s.delete(key(s, "slides/part-00000.parquet")), "slides/part-00000.parquet is not Parquet"),
        (lambda s: s.put(key(s, "refusals/part-00000.parquet"), b"torn"), "part-00000.parquet is not Parquet"),
        (other_columns, "part-00000.parquet has other columns than this version writes"),
        (fewer_slides, "there are more or fewer slides than its snapshot says"),
        (other_mask, "a mask cannot be unpacked"),
    ],
)
def test_what_is_not_a_whole_index_of_this_version_is_refused_with_the_way_out(
    store: Store, index: SlideIndex, damage: Callable[[Store], None], diagnosis: str
) -> None:
    damage(store)
    with pytest.raises(SlideIndexError, match=diagnosis + r".*Run jobs/index\.py again"):
        read_index(store)


def test_an_index_of_another_version_is_left_alone(store: Store, index: SlideIndex) -> None:
    rewrite(store, "index.json", version=1)
    with pytest.raises(
        SlideIndexError, match=r"another version \(got 1; expected 2\)\. Run .* with a new place as --out"
    ):
        read_index(store)


def test_locations_that_are_not_those_of_the_snapshot_are_refused(store: Store, index: SlideIndex) -> None:
    name = f"protected/{index.snapshot_id}/locations/part-00000.parquet"
    table = pq.read_table(io.BytesIO(store.get(name)))
    store.put(name, table_bytes(table.slice(1)))
    with pytest.raises(SlideIndexError, match="more or fewer locations than its snapshot has slides"):
        read_locations(store)


def test_the_description_counts_what_is_there(store: Store, index: SlideIndex) -> None:
    doubtful = replace(record(7), mpp_conflict=0.25, strata=("north",), look=0x123456789ABCDEF, mpp=0.25)
    twin = replace(doubtful, slide_id=f"{8:032x}", look=doubtful.look ^ 1, mpp_conflict=None, strata=("",))
    records = [replace(r, strata=("",)) for r in index.records]
    refusals = [*index.refusals, Refusal("e" * 32, "no tissue found")]
    grown = make_index([*records, doubtful, twin], refusals, ("site",))
    snapshot = write_index(store, grown, locations(0, 1, 2, 7, 8))
    area = sum(int(r.mask.sum()) * (16.03 * r.mpp / 1000) ** 2 for r in grown.records)
    assert describe(replace(snapshot, unreachable=4)) == [
        f"accepted: 5 slides, {area:.1f} mm2 of tissue",
        "um/px: 0.25 x 2, 0.50 x 3",
        "um/px in doubt: 1 slides, of which two origins give different scales",
        "duplicates: 1 slides are probably copies or rescans of others; all are kept",
        "site: 2 values",
        "refused: 2 slides, by name in protected/refused.csv of the index",
        "  2 x no tissue found",
        "unreachable: 4 slides; the same command again tries them",
        f"snapshot: {snapshot.snapshot_id}",
    ]
    assert [r.duplicate_of for r in read_index(store).records] == [None] * 4 + [doubtful.slide_id]
    catalogue = open_catalogue(store.uri)
    assert catalogue.rows["flags"][-2:].tolist() == [MPP_CONFLICT, DUPLICATE]


def test_progress_says_what_is_done_and_when_it_ends() -> None:
    assert IndexProgress(4, 0, 0, 0, 0.0).line() == "0 of 4 slides: 0 accepted, 0 refused"
    half = IndexProgress(10, 2, 1, 1, 0.5)
    assert (half.done, half.eta_s) == (4, 12.0)
    assert half.line() == "4 of 10 slides: 2 accepted, 1 refused, 1 unchanged, 0.50 slides/s, 12.0 s left"
    lost = IndexProgress(10, 2, 1, 1, 0.5, unreachable=2)
    assert lost.line() == "6 of 10 slides: 2 accepted, 1 refused, 1 unchanged, 2 unreachable, 0.50 slides/s, 8.0 s left"
    assert IndexProgress(4, 0, 0, 4, 0.0).line() == "4 of 4 slides: 0 accepted, 0 refused, 4 unchanged"


def examine_at(location: SlideLocation) -> SlideRecord:
    ranges, tables = open_ranges(location.root_uri), TableCache()
    with tempfile.TemporaryDirectory() as copies, open_located(location, ranges, tables, Path(copies), 10**9) as opened:
        size_bytes = sum(info.size_bytes for info in location.objects)
        return examine("a" * 32, opened.slide, size_bytes=size_bytes, layout=opened.layout, picture=True)


def located(folder: Path, name: str = "") -> SlideLocation:
    objects = [info for info in open_store(folder).list() if info.key.startswith(name)]
    return SlideLocation(str(folder), locate(objects).slides[0].objects, None)


def test_a_real_slide_is_examined(shared_data: Path) -> None:
    path = shared_data / "slides" / "CMU-1-Small-Region.svs"
    found = examine_at(located(path.parent, path.name))
    assert (found.width_px0, found.height_px0, found.vendor, found.mpp_origin) == (2220, 2967, "aperio", "vendor")
    assert found.size_bytes == path.stat().st_size
    rows, columns = found.mask.shape
    assert abs(columns * found.mask_px0 - 2220) <= found.mask_px0
    assert abs(rows * found.mask_px0 - 2967) <= found.mask_px0
    # The slide is 1.11 x 1.48 mm, all of it skin.
    assert 0.5 < found.tissue_mm2 < 1.64
    levels = SlideLayout.from_bytes(found.layout).levels
    assert [(level.width, level.height) for level in levels] == [(2220, 2967)]
    picture = Image.open(io.BytesIO(found.picture or b""))
    assert (picture.format, picture.size) == ("JPEG", (139, 186))
    levels = SlideLayout.from_bytes(found.layout).levels
    assert [(level.width, level.height) for level in levels] == [(2220, 2967)]
    picture = Image.open(io.BytesIO(found.picture or b""))
    assert (picture.format, picture.size) == ("JPEG", (139, 186))


def test_what_is_not_read_in_place_is_read_from_a_copy(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "slides" / "CMU-1-Small-Region.svs"
    pixels = np.asarray(OpenSlide(source).read_region((0, 0), 0, (2220, 2967)).convert("RGB"))
    scale = {"resolution": (20_040, 20_040), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(256, 256), compression="packbits", **scale)
    found = examine_at(located(tmp_path))
    assert found.layout == b""
    tiled = examine_at(located(source.parent, source.name))
    assert (found.mask_px0, found.mask.shape) == (pytest.approx(tiled.mask_px0, rel=1e-4), tiled.mask.shape)
    assert np.mean(found.mask == tiled.mask) > 0.99


def test_a_dicom_folder_of_two_series_is_refused(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "slides" / "CMU-1-Small-Region-dicom"
    paths = [tmp_path / "0.dcm", tmp_path / "1.dcm"]
    paths[0].write_bytes((source / "level-10-frames-0-1.dcm").read_bytes())
    other = pydicom.dcmread(source / "level-11-frames-0-1.dcm")
    other.SeriesInstanceUID = pydicom.uid.generate_uid()
    other.save_as(paths[1])
    with pytest.raises(SlideError, match="its DICOM folder holds 2 series"):
        _check_one_series(paths)
    with pytest.raises(SlideError, match="series"):
        examine_at(located(tmp_path))
    paths[1].write_bytes(b"not DICOM")
    with pytest.raises(SlideError, match="is not DICOM or names no series") as caught:
        _check_one_series(paths)
    assert str(tmp_path) not in str(caught.value)


def test_the_files_of_a_set_find_each_other_by_their_names(tmp_path: Path) -> None:
    for name in ("x.mrxs", "x/Slidedat.ini", "x/Data0000.dat", "v/s.vms", "v/s.jpg"):
        (tmp_path / "slides" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "slides" / name).write_text(name)
    hamamatsu, mirax = locate(open_store(tmp_path / "slides").list()).slides
    for slide, names in (
        (
            mirax,
            {"slide.mrxs": "x.mrxs", "slide/Slidedat.ini": "x/Slidedat.ini", "slide/Data0000.dat": "x/Data0000.dat"},
        ),
        (hamamatsu, {"slide.vms": "v/s.vms", "s.jpg": "v/s.jpg"}),
    ):
        where = SlideLocation(str(tmp_path / "slides"), slide.objects, None)
        with ObjectCache(tmp_path / "copies", 1000).lease(open_store(where.root_uri), where.objects, "s") as folder:
            with entry_file(where, folder) as entry:
                assert {name: (entry.parent / name).read_text() for name in names} == {k: v for k, v in names.items()}
            assert not entry.exists()


def test_a_slide_of_bare_glass_is_refused(tmp_path: Path) -> None:
    write_glass(tmp_path / f"{NAME}.tif")
    with pytest.raises(SlideError, match="no tissue found"):
        examine_at(located(tmp_path))


def write_glass(path: Path) -> None:
    glass = np.full((1024, 1024, 3), 243, np.uint8)
    tifffile.imwrite(path, glass, tile=(256, 256), resolution=(20_000, 20_000), resolutionunit="CENTIMETER")


def placed(folder: Path) -> SlideLocation:
    (folder / f"{NAME}.svs").write_bytes(b"slide")
    return SlideLocation(str(folder), tuple(open_store(folder).list()), None)


def broken_by(error: Exception) -> Callable[..., SlideRecord]:
    def broken(*_: object, **__: object) -> SlideRecord:
        raise error

    return broken


@pytest.mark.parametrize("kind", [ValueError, KeyError, RuntimeError, MemoryError])
def test_whatever_a_reader_raises_is_a_reason_without_names(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_examine", broken_by(kind(f"cannot read {tmp_path}/{NAME}.svs")))
    assert build.outcome("a" * 32, placed(tmp_path), 1) == {
        "slide_id": "a" * 32,
        "reason": f"reading it failed with {kind.__name__}",
        "unreachable": False,
    }


@pytest.mark.parametrize("kind", [SlideError, StorageError])
@pytest.mark.parametrize(
    ("text", "reason"),
    [("damaged {root}/{name}.svs", "it cannot be read"), ("{root} is full", "SLIDES is full"), ("torn", "torn")],
)
def test_a_diagnosis_is_a_reason_only_as_far_as_it_holds_no_name(
    kind: type[SlideError | StorageError], text: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_examine", broken_by(kind(text.format(root=tmp_path, name=NAME))))
    row = build.outcome("a" * 32, placed(tmp_path), 1)
    assert (row["reason"], row["unreachable"]) == (reason, kind is StorageError)


def test_a_slide_that_changed_or_went_since_the_listing_says_nothing_of_the_slide(tmp_path: Path) -> None:
    where = placed(tmp_path)
    (tmp_path / f"{NAME}.svs").write_bytes(b"another")
    changed = build.outcome("a" * 32, where, 1)
    (tmp_path / f"{NAME}.svs").unlink()
    gone = build.outcome("a" * 32, where, 1)
    assert changed["unreachable"]
    assert gone["unreachable"]
    assert NAME not in changed["reason"] + gone["reason"]


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
    build.refuse_strangers(open_store(tmp_path))
