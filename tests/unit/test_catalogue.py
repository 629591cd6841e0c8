import io
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from histoscale.errors import SlideIndexError
from histoscale.sampling.rows import COPIED, ROW_DTYPE, sealed
from histoscale.slides import catalogue as module
from histoscale.slides.catalogue import Catalogue, Locations, open_catalogue, slide_info, split_record
from histoscale.slides.index import make_index, write_index
from histoscale.slides.layout import Level, SlideLayout, Table
from histoscale.slides.records import SlideLocation, SlideRecord
from histoscale.slides.snapshot import read_snapshot
from histoscale.storage import ObjectInfo, Store, open_store

SITES = ("north", "", "south")
IDS = [f"{number:02x}{'0' * 28}{number:02x}" for number in (0, 3, 16, 255)]
PATIENTS = ["f" * 32, None, "a" * 32, "f" * 32]
LAYOUT = SlideLayout(
    "aperio",
    tuple(
        Level(40, 30, 16, 16, 4.0**n, "jpeg", "rgb", False, False, 0, b"", *2 * (Table(6, 4, False, 8),))
        for n in range(2)
    ),
)


def record(number: int) -> SlideRecord:
    mask = np.random.default_rng(number).random((number + 1, 7)) < 0.5
    return SlideRecord(
        slide_id=IDS[number],
        vendor="aperio",
        width_px0=70 + number,
        height_px0=50,
        mpp=0.2527,
        mpp_origin=("vendor", "tiff", "sidecar", "vendor")[number],  # type: ignore[arg-type]
        size_bytes=2**33 + number,
        level_downsamples=(1.0, 4.0),
        mask=mask,
        mask_px0=8 / 0.2527,
        layout=LAYOUT.to_bytes() if number else b"",
        patient=PATIENTS[number],
        strata=(SITES[number % 3], "HE"),
    )


def location(number: int) -> SlideLocation:
    return SlideLocation("s3://bucket/root", (ObjectInfo(f"café/{number}.svs", 2**33, "e"),), 0.5 if number else None)


class Remote:
    """A store that, like a bucket, has no local files; counts what leaves it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.ranges: list[tuple[str, int]] = []
        self.downloads: list[str] = []

    def local_path(self, key: str) -> None:
        return None

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.ranges.append((key.rsplit("/", 1)[-1], length))
        return self._store.get_range(key, start, length)

    def download(self, key: str, path: Path, etag: str | None = None) -> None:
        self.downloads.append(key.rsplit("/", 1)[-1])
        self._store.download(key, path, etag)

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "index")
    index = make_index([record(number) for number in (2, 0, 3, 1)], [], ("site", "stain"))
    write_index(store, index, {IDS[number]: location(number) for number in range(4)})
    return store


def check(catalogue: Catalogue) -> None:
    assert catalogue.rows.dtype == ROW_DTYPE
    assert len(catalogue) == 4
    locations = Locations(catalogue)
    for row in range(4):
        expected, entry = record(row), catalogue.rows[row]
        assert catalogue.slide_id(row) == IDS[row]
        assert catalogue.row_of(IDS[row]) == row
        for name in ("mpp", "width_px0", "height_px0", "size_bytes"):
            assert entry[name] == getattr(expected, name)
        assert (entry["mask_rows"], entry["mask_columns"]) == expected.mask.shape
        assert entry["mask_um"] == pytest.approx(8.0)
        assert np.array_equal(catalogue.mask(row), expected.mask)
        assert catalogue.layout(row) == expected.layout
        assert bool(entry["flags"] & COPIED) == (not expected.layout)
        assert tuple(catalogue.values[c][entry["strata"][c]] for c in range(2)) == expected.strata
        assert locations.location(row) == location(row)


def test_a_row_says_what_the_record_says(store: Store) -> None:
    catalogue = open_catalogue(store.uri)
    check(catalogue)
    assert catalogue.columns == ("site", "stain")
    assert catalogue.values == (("", "north", "south"), ("HE",))
    assert catalogue.snapshot_id == read_snapshot(store).snapshot_id
    assert not catalogue.rows.flags.writeable
    info = slide_info(catalogue.rows[2], LAYOUT)
    expected = record(2)
    assert (info.width_px0, info.height_px0, info.mpp) == (expected.width_px0, expected.height_px0, expected.mpp)
    assert (info.mpp_origin, info.vendor, info.level_downsamples) == ("sidecar", "aperio", (1.0, 4.0))


def test_slides_of_a_patient_share_a_code_and_unknown_ones_have_their_own(store: Store) -> None:
    codes = open_catalogue(store.uri).rows["patient"].tolist()
    assert codes[0] == codes[3]
    assert sorted({*codes}) == [0, 1, 2]


def test_a_catalogue_travels_by_its_address(store: Store) -> None:
    data = pickle.dumps(open_catalogue(store.uri))
    assert len(data) < 4000
    check(pickle.loads(data))


def test_a_remote_catalogue_is_copied_once_and_locations_never(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remotes: list[Remote] = []

    def remote(uri: str, *, private: bool = False) -> Remote:
        remotes.append(Remote(open_store(uri, private=private)))
        return remotes[-1]

    monkeypatch.setattr(module, "open_store", remote)
    monkeypatch.setattr(module, "protected", lambda s: remote(f"{s.uri}/protected", private=True))
    for expected in (["catalogue.npy", "records.bin"], []):
        check(open_catalogue(store.uri, cache=tmp_path / "cache"))
        assert sorted(name for one in remotes for name in one.downloads) == expected
        remotes.clear()
    copies = list((tmp_path / "cache").iterdir())
    assert len(copies) == 2
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0
    assert not any(b"svs" in path.read_bytes() for path in copies)

    # A copy that is not whole is made again, and blobs too large to copy are read by ranges.
    copies[0].write_bytes(b"")
    copies[1].write_bytes(b"")
    monkeypatch.setattr(module, "_DOWNLOAD_BYTES", 0)
    check(open_catalogue(store.uri, cache=tmp_path / "cache"))
    assert [name for one in remotes for name in one.downloads] == ["catalogue.npy"]
    assert {name for one in remotes for name, _ in one.ranges} == {"records.bin", "locations.bin"}


def test_an_unknown_slide_is_a_diagnosis(store: Store) -> None:
    for name in ("ff" * 16, "00" * 15 + "01", "", "no hex"):
        with pytest.raises(SlideIndexError, match=r"not in the index.*Resume with the index"):
            open_catalogue(store.uri).row_of(name)


def read_all(index_uri: str) -> None:
    catalogue = open_catalogue(index_uri)
    locations = Locations(catalogue)
    for row in range(4):
        catalogue.layout(row)
        catalogue.mask(row)
        locations.location(row)


def rewrite(store: Store, name: str, change: Callable[[bytes], bytes]) -> None:
    folder = read_snapshot(store).folder
    key = f"protected/{folder}/{name}" if name == "locations.bin" else f"snapshots/{folder}/{name}"
    store.put(key, change(store.get(key)))


def with_field(data: bytes, field: str, value: int) -> bytes:
    rows = np.load(io.BytesIO(data))
    rows[field][1] = value
    rows["check"] = sealed(rows)
    out = io.BytesIO()
    np.save(out, rows)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "change", "diagnosis"),
    [
        ("catalogue.npy", lambda data: data[:-1], "catalogue.npy is missing or has not the size"),
        ("catalogue.npy", lambda data: b"x" * len(data), "catalogue.npy is not the catalogue"),
        ("catalogue.npy", lambda data: data.replace(b"mask_um", b"mask_UM"), "catalogue.npy is not the catalogue"),
        (
            "catalogue.npy",
            lambda data: with_field(data, "record_bytes", 2**31),
            "records.bin is not what the catalogue says",
        ),
        ("catalogue.npy", lambda data: with_field(data, "record_bytes", 3), "records.bin is not what"),
        ("catalogue.npy", lambda data: with_field(data, "mask_rows", 9), "holds no mask"),
        ("catalogue.npy", lambda data: with_field(data, "location_bytes", 5), "holds no location"),
        ("records.bin", lambda data: bytes(len(data)), "records.bin is not what the catalogue says"),
        ("records.bin", lambda data: data + b"x", "records.bin is missing or has not the size"),
        ("locations.bin", lambda data: zlib.compress(b"[1]") * 99, "holds no location"),
        ("snapshot.json", lambda data: data.replace(b"catalogue.npy", b"catalogue.np"), "names no catalogue.npy"),
    ],
)
def test_a_damaged_catalogue_is_a_diagnosis_and_never_a_wrong_slide(
    store: Store, name: str, change: Callable[[bytes], bytes], diagnosis: str
) -> None:
    rewrite(store, name, change)
    with pytest.raises(SlideIndexError, match=rf"the index is damaged: .*{diagnosis}.*Run jobs/index\.py again"):
        read_all(store.uri)


def test_a_changed_row_is_found_by_its_checksum(store: Store) -> None:
    def change(data: bytes) -> bytes:
        return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]

    rewrite(store, "catalogue.npy", change)
    with pytest.raises(SlideIndexError, match=r"a row of catalogue\.npy is damaged"):
        open_catalogue(store.uri).mask(len(IDS) - 1)


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff\x7f{}"])
def test_a_record_that_ends_within_its_layout_is_refused(data: bytes) -> None:
    with pytest.raises(SlideIndexError, match="holds no record"):
        split_record(data)
