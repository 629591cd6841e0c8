"""Reads in place: the same px as OpenSlide, each tile fetched once, no headers on a later visit, typed refusals."""

import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from histoscale.errors import SlideError, StorageError
from histoscale.slides import resample, tile_fetch
from histoscale.slides.layout import SlideLayout
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.table_cache import PAGE_BYTES, TableCache, page_requests
from histoscale.slides.tiled import Region, TiledSlide, open_tiled
from histoscale.storage import ObjectInfo, open_store
from histoscale.storage.ranges import ObjectChanged, RangeRequest, RangeStats, open_ranges

Pixels = NDArray[np.uint8]


class MemoryRanges:
    """Objects in memory; notes every request, and answers when told to where `held` is set."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.asked: list[RangeRequest] = []
        self.calls = 0
        self.held = False
        self._waiting: list[tuple[Future[list[bytes]], list[RangeRequest]]] = []

    def infos(self) -> list[ObjectInfo]:
        return [ObjectInfo(key, len(data), "1") for key, data in self.objects.items()]

    def submit(self, requests: Sequence[RangeRequest]) -> Future[list[bytes]]:
        self.asked += requests
        self.calls += 1
        future: Future[list[bytes]] = Future()
        self._waiting.append((future, list(requests)))
        if not self.held:
            self.answer()
        return future

    def answer(self, error: Exception | None = None) -> None:
        waiting, self._waiting = self._waiting, []
        for future, requests in waiting:
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result([self.objects[r.key][r.start : r.start + r.length] for r in requests])

    def cancel(self) -> None:
        for future, _ in self._waiting:
            future.cancel()

    def fetch(self, requests: Sequence[RangeRequest]) -> list[bytes]:
        return self.submit(requests).result()

    @property
    def stats(self) -> RangeStats:
        return RangeStats(len(self.asked), sum(request.length for request in self.asked), 0)

    def close(self) -> None:
        self.held = False


def memory(path: Path) -> MemoryRanges:
    return MemoryRanges({path.name: path.read_bytes()})


def opened(ranges: MemoryRanges, mpp: float | None = None) -> TiledSlide:
    slide = open_tiled(ranges.infos(), ranges, TableCache(), mpp=mpp)
    assert slide is not None
    return slide


def open_path(path: Path, mpp: float | None = None) -> TiledSlide:
    """A file, or all the files of a folder, as the library lists them."""
    folder = path if path.is_dir() else path.parent
    objects = [info for info in open_store(folder).list() if path.is_dir() or info.key == path.name]
    objects.sort(key=lambda info: (-info.size_bytes, info.key))
    slide = open_tiled(objects, open_ranges(folder), TableCache(), mpp=mpp)
    assert slide is not None
    return slide


def whole_level(path: Path, level: int, margin: int) -> Pixels:
    """All of a level as OpenSlide reads it from its corner, where its place is exact, with a white margin."""
    handle = openslide.OpenSlide(path)
    width, height = handle.level_dimensions[level]
    canvas = Image.new("RGB", (width + 2 * margin, height + 2 * margin), "white")
    step = 2048 if level == 0 else max(width, height)
    for y in range(0, height, step):
        for x in range(0, width, step):
            part = handle.read_region((x, y), level, (min(step, width - x), min(step, height - y)))
            canvas.paste(part, (x + margin, y + margin), mask=part.getchannel("A"))
    return np.asarray(canvas)


def assert_native_reads_are_exact(slide: TiledSlide, path: Path, seed: int) -> None:
    """1,000 random regions of each level, borders included, equal OpenSlide's bits."""
    rng = np.random.default_rng(seed)
    margin, side = 40, 96
    for index, level in enumerate(slide.layout.levels):
        oracle = whole_level(path, index, margin)
        scale = slide.info.mpp * level.downsample
        for _ in range(4):
            x = rng.integers(-margin, max(level.width + margin - side, 1 - margin), 250)
            y = rng.integers(-margin, max(level.height + margin - side, 1 - margin), 250)
            sides = rng.integers(1, side, 250)
            regions = [
                Region(float(left * level.downsample), float(top * level.downsample), int(n), scale)
                for left, top, n in zip(x, y, sides, strict=True)
            ]
            for left, top, n, px in zip(x, y, sides, slide.begin(regions).result(), strict=True):
                expected = oracle[top + margin : top + margin + n, left + margin : left + margin + n]
                assert np.array_equal(px[: expected.shape[0], : expected.shape[1]], expected)


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_native_reads_of_real_slides_equal_openslide_bit_for_bit(shared_data: Path, name: str) -> None:
    path = shared_data / "slides" / name
    assert_native_reads_are_exact(open_path(path, mpp=0.5), path, seed=1)


def test_native_reads_of_a_dicom_set_equal_openslide_bit_for_bit(shared_data: Path) -> None:
    folder = shared_data / "slides" / "CMU-1-Small-Region-dicom"
    assert_native_reads_are_exact(open_path(folder), folder / "level-0-frames-0-30.dcm", seed=2)


@pytest.fixture(scope="module")
def tissue(shared_data: Path) -> Pixels:
    """Part of a real section, [2400, 2800, 3]."""
    section = sorted((shared_data / "sections").glob("**/*.jpg"))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return np.asarray(Image.open(section).convert("RGB").crop((3000, 3000, 5800, 5400)))


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory, tissue: Pixels) -> Path:
    """Real tissue as an Aperio pyramid at 0.25 um/px: levels 1, 4 and 16, sizes that no tile divides."""
    image = tissue
    path = tmp_path_factory.mktemp("pyramid") / "pyramid.svs"
    with tifffile.TiffWriter(path) as tiff:
        for factor in (1, 4, 16):
            tiff.write(
                np.asarray(Image.fromarray(image).reduce(factor)) if factor > 1 else image,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 80, "subsampling": "422"},
                description="Aperio Image Library v12.0.0\r\nx|AppMag = 40|MPP = 0.25",
                metadata=None,
                subfiletype=0 if factor == 1 else 1,
            )
            if factor == 1:
                tiff.write(np.asarray(Image.fromarray(image).reduce(8)), photometric="rgb", metadata=None)
    return path


def test_native_reads_of_a_pyramid_equal_openslide_bit_for_bit(pyramid: Path) -> None:
    slide = open_path(pyramid)
    assert slide.info == open_slide(pyramid).info
    assert [level.downsample for level in slide.layout.levels] == [1, 4, 16]
    assert_native_reads_are_exact(slide, pyramid, seed=3)


@pytest.mark.parametrize("mpp", [0.2, 0.3, 0.5, 0.505, 0.75, 0.99, 1.0, 2.0, 2.02, 3.7, 8.0])
def test_both_readers_agree_at_every_scale(pyramid: Path, mpp: float) -> None:
    tiled, copied = open_path(pyramid), open_slide(pyramid)
    rng = np.random.default_rng(4)
    for _ in range(6):
        # Places on whole px of all levels, where OpenSlide does not blend.
        x, y = (float(16 * rng.integers(-4, 150)) for _ in range(2))
        assert np.array_equal(tiled.read(x, y, 150, mpp), copied.read(x, y, 150, mpp))
    if mpp >= 2:
        assert np.array_equal(tiled.thumbnail(mpp), copied.thumbnail(mpp))


def cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The cubic convolution kernel with a = -0.5."""
    d = np.abs(distance)
    return np.where(d < 1, 1.5 * d**3 - 2.5 * d**2 + 1, np.where(d < 2, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2, 0))


def resampled(image: NDArray[np.float64], start: float, ratio: float, n: int) -> NDArray[np.float64]:
    """Rows of an image at `n` places, `ratio` px apart, by a kernel as wide as the coarser side."""
    centres = start + (np.arange(n) + 0.5) * ratio
    weights = cubic((np.arange(len(image)) + 0.5 - centres[:, None]) / max(ratio, 1.0))
    return np.asarray(np.einsum("ij,jkc->ikc", weights / weights.sum(axis=1, keepdims=True), image))


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.75, 2.0, 0.24, 0.27, 0.505, 0.49, 0.7, 0.9, 1.3, 2.6])
@pytest.mark.parametrize("place", [(400.0, 512.0), (403.0, 509.7)])
def test_reads_equal_an_independent_resampling(pyramid: Path, mpp: float, place: tuple[float, float]) -> None:
    side = 64
    level, downsample = (1, 4) if mpp >= 1 else (0, 1)
    image = whole_level(pyramid, level, 0).astype(np.float64)
    ratio = mpp / (0.25 * downsample)
    factor = max(1, int(ratio * 1.05))
    x, y = place[0] / downsample, place[1] / downsample
    if abs(ratio / factor - 1) < 1e-3:
        x, y = round(x), round(y)
        part = image[y : y + side * factor, x : x + side * factor]
        expected = part.reshape(side, factor, side, factor, 3).mean(axis=(1, 3))
    else:
        h, w = image.shape[0] // factor, image.shape[1] // factor
        means = image[: h * factor, : w * factor].reshape(h, factor, w, factor, 3).mean(axis=(1, 3))
        rest = ratio / factor
        rows = resampled(means, y / factor, rest, side)
        expected = resampled(rows.swapaxes(0, 1), x / factor, rest, side).swapaxes(0, 1).clip(0, 255)
    got = open_path(pyramid).read(*place, side, mpp)
    # Rounded once for the mean, in fixed point, and once for each axis.
    assert np.abs(got - expected).max() <= (0.6 if factor == ratio else 2.6)


def test_blocks_leave_no_seam(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_path(pyramid)
    scales = (0.25, 0.5, 0.7, 1.9)
    whole = [slide.read(-30.0, 100.0, 300, mpp) for mpp in scales]
    monkeypatch.setattr(resample, "_BLOCK_PX", 150)
    for px, mpp in zip(whole, scales, strict=True):
        difference = slide.read(-30.0, 100.0, 300, mpp).astype(np.int16) - px
        assert np.abs(difference).max() <= 1
        assert np.abs(difference).mean() < 0.01


def test_a_later_visit_reads_pages_of_tables_and_tiles_and_nothing_else(pyramid: Path) -> None:
    ranges = memory(pyramid)
    first = opened(ranges)
    regions = [Region(100.0 + 784 * i, 300.0, 392, 0.5) for i in range(3)]
    expected = first.begin(regions).result()
    layout = SlideLayout.from_bytes(first.layout.to_bytes())
    assert layout == first.layout
    ranges.asked.clear()
    ranges.calls = 0
    later = TiledSlide(first.info, layout, ranges.infos(), ranges, TableCache())
    assert all(map(np.array_equal, later.begin(regions).result(), expected))
    with tifffile.TiffFile(pyramid) as tiff:
        page = tiff.pages.first
        spans = sorted(zip(page.dataoffsets, page.databytecounts, strict=True))
        table = page.tags[324].valueoffset
    assert ranges.calls == 2
    pages, tiles = ranges.asked[0], ranges.asked[1:]
    assert pages.start <= table < pages.start + pages.length <= pages.start + PAGE_BYTES
    for request in tiles:
        assert request.start >= spans[0][0]
        assert request.start + request.length <= sum(spans[-1])
    assert len(tiles) <= 5, "one request for each row of tiles"
    ranges.asked.clear()
    later.begin(regions).result()
    assert ranges.asked == tiles, "the pages are at hand"


def test_tiles_that_regions_share_are_fetched_and_decoded_once(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from histoscale.slides import tiled

    decoded = []
    original = tiled.decode_tile
    monkeypatch.setattr(
        tiled, "decode_tile", lambda data, level, out: (decoded.append(bytes(data)), original(data, level, out))
    )
    ranges = memory(pyramid)
    slide = opened(ranges)
    ranges.asked.clear()
    regions = [Region(10.0 * i, 5.0 * i, 300, 0.25) for i in range(20)]
    together = slide.begin(regions).result()
    assert len(decoded) == 4
    asked = [(r.start, r.start + r.length) for r in ranges.asked[-2:]]
    assert asked[0][1] <= asked[1][0]
    assert all(
        np.array_equal(px, slide.read(r.x_px0, r.y_px0, 300, 0.25)) for px, r in zip(together, regions, strict=True)
    )


def test_begin_returns_before_any_byte_is_there(pyramid: Path) -> None:
    ranges = memory(pyramid)
    slide = opened(ranges)
    expected = slide.read(500.0, 500.0, 200, 0.25)
    slide = TiledSlide(slide.info, slide.layout, ranges.infos(), ranges, TableCache())
    ranges.held = True
    before = len(ranges.asked)
    pending = slide.begin([Region(500.0, 500.0, 200, 0.25)])
    assert len(ranges.asked) > before
    ranges.answer()
    ranges.answer()
    assert np.array_equal(pending.result()[0], expected)


def test_an_error_of_the_store_reaches_who_waits(pyramid: Path) -> None:
    ranges = memory(pyramid)
    slide = opened(ranges)
    ranges.held = True
    pending = slide.begin([Region(0.0, 0.0, 100, 0.25)])
    ranges.answer(ObjectChanged("an object changed"))
    with pytest.raises(ObjectChanged, match="an object changed"):
        pending.result()
    pending = slide.begin([Region(0.0, 0.0, 100, 0.25)])
    ranges.cancel()
    with pytest.raises(StorageError, match="was closed"):
        pending.result()


def test_far_outside_is_white_and_asks_for_nothing(pyramid: Path) -> None:
    ranges = memory(pyramid)
    slide = opened(ranges)
    ranges.asked.clear()
    assert (slide.read(-90_000.0, 90_000.0, 64, 0.7) == 255).all()
    assert ranges.asked == []


def test_closed_slides_and_impossible_regions_are_refused(pyramid: Path) -> None:
    slide = open_path(pyramid)
    for region, match in [
        (Region(0, 0, 0, 0.5), "region has no size"),
        (Region(float("nan"), 0, 10, 0.5), "region has no place"),
        (Region(0, 0, 10, 0.0), "scale is not valid"),
    ]:
        with pytest.raises(SlideError, match=match):
            slide.begin([region])
    slide.close()
    slide.close()
    with pytest.raises(SlideError, match="slide is closed"):
        slide.read(0, 0, 10, 0.5)


def plain(path: Path, image: Pixels, **options: object) -> Path:
    """A TIFF of one level at 0.5 um/px, tiled unless options say otherwise."""
    settings: dict[str, object] = {"tile": (128, 160), "photometric": "rgb", "metadata": None}
    settings |= {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER", "software": False}
    container = {name: options.pop(name) for name in ("bigtiff", "byteorder") if name in options}
    with tifffile.TiffWriter(path, **container) as tiff:
        tiff.write(image, **(settings | options))
    return path


@pytest.mark.parametrize("container", [{}, {"bigtiff": True}, {"byteorder": ">"}, {"bigtiff": True, "byteorder": ">"}])
@pytest.mark.parametrize(
    "options",
    [
        {"compression": None},
        {"compression": "lzw"},
        {"compression": "lzw", "predictor": True},
        {"compression": "zlib"},
        {"compression": "deflate", "predictor": True},
        {"compression": "jpeg", "compressionargs": {"outcolorspace": "rgb"}},
        {"compression": "jpeg", "compressionargs": {"subsampling": "420"}},
        {"compression": "jpeg", "compressionargs": {"subsampling": "444"}},
    ],
)
def test_plain_tiff_equals_openslide(
    tmp_path: Path, tissue: Pixels, options: dict[str, object], container: dict[str, object]
) -> None:
    image = tissue[1000:1500, 1000:1700]
    # OpenSlide does not open big-endian classic TIFF; the same pyramid in the usual container is the measure.
    usual = open_slide(plain(tmp_path / "usual.tif", image, **options))
    slide = open_path(plain(tmp_path / "plain.tif", image, **options, **container))
    assert slide.info == usual.info
    assert np.array_equal(slide.read(-20.0, -20.0, 760, 0.5), usual.read(-20.0, -20.0, 760, 0.5))
    slide.verify()


def patched(path: Path, tag: int, index: int, value: int) -> MemoryRanges:
    """A slide of which one number of a table of its first page is another one."""
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        entry = tiff.pages.first.tags[tag]
        size = {3: 2, 4: 4, 16: 8}[int(entry.dtype)]
        at = entry.valueoffset + index * size
    data[at : at + size] = value.to_bytes(size, "little")
    return MemoryRanges({path.name: bytes(data)})


def test_missing_tiles_of_plain_tiff_are_white(tmp_path: Path) -> None:
    path = plain(tmp_path / "plain.tif", np.full((500, 500, 3), 90, np.uint8), compression="zlib")
    px = opened(patched(path, 325, 5, 0)).read(0.0, 0.0, 500, 0.5)
    assert (px[128:256, 160:320] == 255).all()
    px[128:256, 160:320] = 90
    assert (px == 90).all()
    opened(patched(path, 325, 0, 0)).verify()


def test_aperio_slides_with_missing_tiles_are_left_to_openslide(pyramid: Path) -> None:
    ranges = patched(pyramid, 325, 40, 0)
    assert open_tiled(ranges.infos(), ranges, TableCache()) is None
    # A layout of before says otherwise; what it leads to is refused.
    slide = opened(memory(pyramid))
    ranges = patched(pyramid, 325, 0, 0)
    with pytest.raises(SlideError, match="missing tile"):
        TiledSlide(slide.info, slide.layout, ranges.infos(), ranges, TableCache()).read(0.0, 0.0, 10, 0.25)


@pytest.mark.parametrize(("tag", "value"), [(324, 2**32 - 5), (325, 2**31), (325, 2_000_000)])
def test_tiles_where_none_can_be_are_refused(pyramid: Path, tag: int, value: int) -> None:
    ranges = patched(pyramid, tag, 0, value)
    slide = opened(ranges)
    ranges.asked.clear()
    with pytest.raises(SlideError, match="damaged table of tiles"):
        slide.read(0.0, 0.0, 10, 0.25)
    assert sum(request.length for request in ranges.asked) <= 4 * PAGE_BYTES
    assert (slide.read(600.0, 600.0, 10, 0.25) > 0).all(), "the rest can be read"


def overwritten(path: Path, change: Callable[[bytes], bytes]) -> MemoryRanges:
    """A slide whose first tile holds other bytes."""
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        start, length = page.dataoffsets[0], page.databytecounts[0]
    data[start : start + length] = change(bytes(data[start : start + length])).ljust(length, b"\0")[:length]
    return MemoryRanges({path.name: bytes(data)})


def swap(tile: bytes, old: bytes, new: bytes) -> bytes:
    assert old in tile
    return tile.replace(old, new, 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tile: b"\xaa" * len(tile), "holds no JPEG data"),
        (lambda tile: tile[: len(tile) // 2], "cannot be decoded"),
        (lambda tile: tile[:-300] + b"\x55" * 300, "cannot be decoded"),
        (lambda tile: tile[:2], "another size or kind"),
        (lambda tile: swap(tile, b"\x08\x01\x00\x01\x00\x03", b"\x08\x02\x00\x01\x00\x03"), "another size or kind"),
        (lambda tile: swap(tile, b"\xff\xc0", b"\xff\xc2"), "another size or kind"),
        (lambda tile: tile[:2] + b"\xff\xd0" * 400, "another size or kind"),
    ],
)
def test_damaged_jpeg_tiles_are_refused(pyramid: Path, change: Callable[[bytes], bytes], match: str) -> None:
    slide = opened(overwritten(pyramid, change))
    with pytest.raises(SlideError, match=match):
        slide.read(0.0, 0.0, 100, 0.25)
    with pytest.raises(SlideError, match=match):
        slide.verify()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tile: b"\xaa" * len(tile), "holds no JPEG 2000 data"),
        (lambda tile: tile[: len(tile) // 2], "cannot be decoded"),
        (lambda tile: tile[:8] + struct.pack(">I", 512) + tile[12:], "another size or kind"),
        (lambda tile: tile[:24] + struct.pack(">II", 0, 256) + tile[32:], "impossible parts"),
        (lambda tile: tile[:24] + struct.pack(">II", 2, 2) + tile[32:], "too many parts"),
    ],
)
def test_damaged_jpeg_2000_tiles_are_refused(shared_data: Path, change: Callable[[bytes], bytes], match: str) -> None:
    ranges = overwritten(shared_data / "slides" / "TCGA-CR-7395-01A-01-TS1.svs", change)
    with pytest.raises(SlideError, match=match):
        opened(ranges, mpp=0.5).read(0.0, 0.0, 100, 0.5)


@pytest.mark.parametrize("compression", ["zlib", "lzw"])
def test_damaged_plain_tiles_are_refused(tmp_path: Path, compression: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    path = plain(tmp_path / "plain.tif", noise, compression=compression)
    with pytest.raises(SlideError, match="cannot be decoded"):
        opened(overwritten(path, lambda tile: b"\xaa" * len(tile))).read(0.0, 0.0, 100, 0.5)


def test_raw_tiles_that_end_too_early_are_refused(tmp_path: Path) -> None:
    path = plain(tmp_path / "plain.tif", np.full((500, 500, 3), 90, np.uint8))
    with pytest.raises(SlideError, match="ends too early"):
        opened(patched(path, 325, 0, 1000)).read(0.0, 0.0, 100, 0.5)


def test_jpeg_tables_that_are_none_are_refused(pyramid: Path) -> None:
    ranges = memory(pyramid)
    slide = opened(ranges)
    level = replace(slide.layout.levels[0], jpeg_tables=b"tables")
    layout = SlideLayout("aperio", (level,))
    with pytest.raises(SlideError, match="JPEG tables"):
        TiledSlide(slide.info, layout, ranges.infos(), ranges, TableCache()).read(0.0, 0.0, 10, 0.25)


def test_requests_are_bounded(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = memory(pyramid)
    slide = opened(ranges)
    expected = slide.read(0.0, 0.0, 700, 0.25)
    monkeypatch.setattr(tile_fetch, "_MAX_REQUEST_BYTES", 4000)
    ranges.asked.clear()
    assert np.array_equal(slide.read(0.0, 0.0, 700, 0.25), expected)
    assert max(request.length for request in ranges.asked) <= 4000
    assert len(ranges.asked) >= 6


def test_table_pages_are_shared_and_the_least_used_go_first() -> None:
    cache = TableCache(max_bytes=2 * PAGE_BYTES)
    one, other = ObjectInfo("a", 10**6, "1"), ObjectInfo("a", 10**6, "2")
    cache.put(one, 0, b"first")
    cache.put(other, 0, b"second")
    assert (cache.get(one, 0), cache.get(other, 0), cache.get(one, 1)) == (b"first", b"second", None)
    cache.get(one, 0)
    cache.put(one, 1, b"third")
    assert (cache.get(one, 0), cache.get(other, 0), cache.get(one, 1)) == (b"first", None, b"third")


def test_neighbouring_pages_come_in_one_request() -> None:
    objects = [ObjectInfo("a", 10 * PAGE_BYTES - 5, "1"), ObjectInfo("b", 10**6, "2")]
    wanted = page_requests(objects, [(0, 9), (0, 8), (0, 2), (1, 3)])
    spans = [(r.key, r.start, r.length, r.etag) for r, _ in wanted]
    assert spans == [
        ("a", 2 * PAGE_BYTES, PAGE_BYTES, "1"),
        ("a", 8 * PAGE_BYTES, 2 * PAGE_BYTES - 5, "1"),
        ("b", 3 * PAGE_BYTES, PAGE_BYTES, "2"),
    ]
    assert [pages for _, pages in wanted] == [[(0, 2)], [(0, 8), (0, 9)], [(1, 3)]]


def test_levels_may_have_tiles_of_different_sizes(tmp_path: Path, tissue: Pixels) -> None:
    path = tmp_path / "a.svs"
    with tifffile.TiffWriter(path) as tiff:
        for factor, tile in ((1, (128, 128)), (4, (64, 96))):
            image = np.asarray(Image.fromarray(tissue).reduce(factor)) if factor > 1 else tissue
            description = "Aperio x|MPP = 0.25"
            tiff.write(image, tile=tile, photometric="rgb", compression="zlib", metadata=None, description=description)
    regions = [Region(400.0, 800.0, 200, mpp) for mpp in (0.5, 0.25, 1.0, 2.0)]
    oracle = open_slide(path)
    for region, px in zip(regions, open_path(path).begin(regions).result(), strict=True):
        assert np.array_equal(px, oracle.read(region.x_px0, region.y_px0, region.side_px, region.mpp))


def test_layouts_whose_lengths_lie_are_refused() -> None:
    for body in (struct.pack("<BHHI", 0, 1, 1, 99), struct.pack("<BHHI", 0, 0, 1, 0) + b"more"):
        with pytest.raises(SlideError, match=r"cut short|too long"):
            SlideLayout.from_bytes(b"HSL1" + zlib.compress(body))


def test_damaged_layouts_are_refused(pyramid: Path) -> None:
    slide = opened(memory(pyramid))
    data = slide.layout.to_bytes()
    for bad in (b"", b"XXXX" + data[4:], data[:-3], data + b"\0", data[:4] + b"\0" * 20):
        with pytest.raises(SlideError, match="layout of the slide is damaged"):
            SlideLayout.from_bytes(bad)
    level = slide.layout.levels[0]
    impossible = [
        {"width": 0},
        {"tile_width": 2**20},
        {"downsample": 0.5},
        {"downsample": float("nan")},
        {"offsets": replace(level.offsets, count=3)},
        {"offsets": replace(level.offsets, item_bytes=3)},
        {"offsets": replace(level.offsets, position=2**63)},
        {"offsets": replace(level.offsets, inline=b"123")},
    ]
    for changes in impossible:
        layout = replace(slide.layout, levels=(replace(level, **changes),))
        with pytest.raises(SlideError, match="layout of the slide is damaged"):
            SlideLayout.from_bytes(layout.to_bytes())
    with pytest.raises(SlideError, match="no levels"):
        SlideLayout.from_bytes(replace(slide.layout, levels=()).to_bytes())


def test_a_layout_must_fit_the_objects(pyramid: Path) -> None:
    ranges = memory(pyramid)
    slide = opened(ranges)
    short = [replace(info, size_bytes=1000) for info in ranges.infos()]
    with pytest.raises(SlideError, match="beyond the object"):
        TiledSlide(slide.info, slide.layout, short, ranges, TableCache())
    with pytest.raises(SlideError, match="that the slide has not"):
        TiledSlide(slide.info, slide.layout, [], ranges, TableCache())


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_cut_slides_are_refused(pyramid: Path, share: float) -> None:
    data = pyramid.read_bytes()
    ranges = MemoryRanges({"a": data[: int(len(data) * share)]})
    with pytest.raises(SlideError) as caught:
        opened(ranges).verify()
    assert pyramid.stem not in str(caught.value)
