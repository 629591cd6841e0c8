"""Slides that are read from copies: one download for all readers of a node, and no reader keeps others from room."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile

from histoscale.errors import SlideError, StorageError
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.records import SlideLocation
from histoscale.slides.tiled import Region
from histoscale.storage import ObjectInfo
from histoscale.storage.cache import ObjectCache
from histoscale.storage.local import LocalStore
from histoscale.stream import slide_pool
from histoscale.stream.slide_pool import Refusal, SlidePool

NAME = "Mustermann-1957-07-01"
REGIONS = [Region(float(x), 40.0, 64, 0.5) for x in (0, 100, 300)]
SLIDES = 3


class Bucket(LocalStore):
    """A folder that must be copied from, as a bucket must; counts the copies."""

    downloads: list[str]

    def local_path(self, key: str) -> Path | None:
        return None

    def download(self, key: str, path: Path, etag: str | None = None) -> None:
        self.downloads.append(key)
        super().download(key, path, etag)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Three slides of the same size."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(SLIDES):
        pixels = np.random.default_rng(number).integers(0, 255, (256, 512, 3), np.uint8)
        scale = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(folder / f"{NAME}-{number}.tif", pixels, tile=(128, 128), photometric="rgb", **scale)
    store = Bucket(folder, private=True)
    store.downloads = []
    monkeypatch.setattr(slide_pool, "open_store", lambda uri, private: store)
    monkeypatch.setattr(slide_pool, "is_remote", lambda uri: True)
    return store


def objects(bucket: Bucket) -> list[ObjectInfo]:
    return list(bucket.list())


def size_bytes(bucket: Bucket) -> int:
    (size,) = {info.size_bytes for info in objects(bucket)}
    return size


def pool_of(tmp_path: Path, sets: Sequence[Sequence[ObjectInfo]], cache_bytes: int) -> SlidePool:
    """A reader of slides without layouts, row by row."""
    locations = [SlideLocation("s3://bucket", tuple(infos), None) for infos in sets]
    catalogue: Any = SimpleNamespace(layout=lambda row: b"", slide_id=lambda row: f"{row:032x}")
    where: Any = SimpleNamespace(location=locations.__getitem__)
    return SlidePool(catalogue, where, tmp_path / "cache", cache_bytes)


def pixels_of(bucket: Bucket, row: int) -> list[np.ndarray[Any, Any]]:
    slide = open_slide(Path(bucket.uri) / objects(bucket)[row].key)
    return [slide.read(region.x_px0, region.y_px0, region.side_px, region.mpp) for region in REGIONS]


def test_readers_of_a_node_share_one_download_of_a_slide(bucket: Bucket, tmp_path: Path) -> None:
    sets = [[info] for info in objects(bucket)]
    pools = [pool_of(tmp_path, sets, 10 * size_bytes(bucket)) for _ in range(2)]
    for _ in range(3):
        begun = [(row, pool.begin(row, REGIONS)) for row in range(SLIDES) for pool in pools]
        for row, pending in begun:
            np.testing.assert_array_equal(pending(), pixels_of(bucket, row))
    assert sorted(bucket.downloads) == [info.key for info in objects(bucket)]
    assert not [path for path in (tmp_path / "cache").rglob("*") if NAME in path.name]


def test_readers_get_on_in_a_cache_for_one_slide(bucket: Bucket, tmp_path: Path) -> None:
    sets = [[info] for info in objects(bucket)]
    pools = [pool_of(tmp_path, sets, size_bytes(bucket)) for _ in range(2)]

    def read(pool: SlidePool, first: int) -> None:
        for turn in range(4):
            rows = [(first + turn + n) % SLIDES for n in range(SLIDES)]
            for row, pending in [(row, pool.begin(row, REGIONS)) for row in rows]:
                np.testing.assert_array_equal(pending(), pixels_of(bucket, row))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(read, pools, (0, 1))) == [None, None]
    assert len(bucket.downloads) > SLIDES


def test_a_visit_waits_for_the_room_that_another_reader_holds(bucket: Bucket, tmp_path: Path) -> None:
    first, second, _ = ([info] for info in objects(bucket))
    pool = pool_of(tmp_path, [first, second], size_bytes(bucket))
    other = ObjectCache(tmp_path / "cache", size_bytes(bucket))
    leased = threading.Event()

    def hold() -> None:
        with other.lease(bucket, first, "held"):
            leased.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    leased.wait()
    np.testing.assert_array_equal(pool.begin(1, REGIONS)(), pixels_of(bucket, 1))
    thread.join()


def test_room_that_never_comes_is_a_fault_of_the_storage(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slide_pool, "ROOM_WAIT_S", 0.2)
    first, second, _ = ([info] for info in objects(bucket))
    pool = pool_of(tmp_path, [first, second], size_bytes(bucket))
    with (
        ObjectCache(tmp_path / "cache", size_bytes(bucket)).lease(bucket, first, "held"),
        pytest.raises(StorageError, match="the cache is full of files in use"),
    ):
        pool.begin(1, REGIONS)()
    with pytest.raises(StorageError, match="larger than the cache"):
        pool_of(tmp_path, [first], 100).begin(0, REGIONS)()
    np.testing.assert_array_equal(pool.begin(1, REGIONS)(), pixels_of(bucket, 1))


class Probe:
    """A slide that is the text of its files; only in use does it hold them."""

    opened: list[str]
    closed: list[str]

    def __init__(self, path: Path, mpp: float | None) -> None:
        self._path = path
        self.opened.append(self._text())

    def _text(self) -> str:
        if not self._path.exists():
            raise SlideError("slide file is missing")
        return " ".join(sorted(path.read_text() for path in self._path.parent.rglob("*.*") if path.is_file()))

    def read(self, *_: float) -> str:
        return self._text()

    def close(self) -> None:
        self.closed.append(self.opened[0])


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> type[Probe]:
    Probe.opened, Probe.closed = [], []
    monkeypatch.setattr(slide_pool, "open_slide", lambda path, mpp: Probe(path, mpp))
    return Probe


def test_slides_stay_open_as_long_as_their_copies(bucket: Bucket, tmp_path: Path, probe: type[Probe]) -> None:
    for name, text in (("s.vms", "index"), ("s.jpg", "image"), ("t.vms", "other"), ("t.jpg", "tile ")):
        bucket.put(f"sets/{name}", text.encode())
    infos = {info.key[5:]: info for info in bucket.list("sets")}
    sets = [[infos[f"{letter}.vms"], infos[f"{letter}.jpg"]] for letter in "st"]
    pool: Any = pool_of(tmp_path, sets, 10)
    texts = {0: "image index", 1: "other tile "}
    for row, opened, closed in ((0, 1, 0), (0, 1, 0), (1, 2, 1), (1, 2, 1), (0, 3, 2), (1, 4, 3)):
        assert pool.begin(row, REGIONS)() == [texts[row]] * 3
        assert (len(probe.opened), len(probe.closed)) == (opened, closed)
    assert len(bucket.downloads) == 2 * 4


def test_a_bounded_number_of_slides_is_open(
    bucket: Bucket, tmp_path: Path, probe: type[Probe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slide_pool, "_OPEN_SLIDES", 2)
    for number in range(4):
        bucket.put(f"texts/{number}.vms", b"text")
    pool: Any = pool_of(tmp_path, [[info] for info in bucket.list("texts")], 100)
    for row, opened in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        assert pool.begin(row, REGIONS[:1])() == ["text"]
        assert len(probe.opened) == opened
        assert len(probe.closed) == max(0, opened - 2)


def test_a_copy_that_is_no_slide_is_refused_whole_and_asked_for_no_more(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put(f"bad/{NAME}.tif", b"no slide")
    pool = pool_of(tmp_path, [list(bucket.list("bad"))], 100)
    refused = pool.begin(0, REGIONS)()
    assert [isinstance(each, Refusal) and each.whole_slide for each in refused] == [True] * 3
    assert NAME not in str(refused)
    assert pool.begin(0, REGIONS)() == refused
    assert len(bucket.downloads) == 1
