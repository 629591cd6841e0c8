"""What is taken for a slide that can be read in place, what is left to OpenSlide, and what is refused."""

import struct
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import tifffile

from histoscale.errors import SlideError
from histoscale.slides import header, tiff_layout
from histoscale.slides.layout import SlideLayout
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.slide import SlideInfo
from histoscale.slides.table_cache import TableCache
from histoscale.slides.tiled import open_tiled
from histoscale.storage import ObjectInfo
from histoscale.storage.ranges import RangeReader, RangeRequest

MB = 2**20


class MemoryRanges:
    """One object in memory; notes what was asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[RangeRequest] = []

    def submit(self, requests: Sequence[RangeRequest]) -> Future[list[bytes]]:
        future: Future[list[bytes]] = Future()
        future.set_result(self.fetch(requests))
        return future

    def fetch(self, requests: Sequence[RangeRequest]) -> list[bytes]:
        self.asked += requests
        assert all(r.start >= 0 and r.start + r.length <= len(self.data) for r in requests)
        return [self.data[r.start : r.start + r.length] for r in requests]

    stats = RangeReader.stats
    close = RangeReader.close


def parsed(data: bytes, mpp: float | None = None) -> tuple[SlideInfo, SlideLayout] | None:
    slide = open_tiled([ObjectInfo("a", len(data), "1")], MemoryRanges(data), TableCache(), mpp=mpp)
    return None if slide is None else (slide.info, slide.layout)


APERIO = "Aperio Image Library v12.0.0\r\nx|AppMag = 20|MPP = 0.5"


def write(path: Path, sizes: Sequence[tuple[int, int]] = ((600, 500),), **options: object) -> bytes:
    """A TIFF of tiled pages of these heights and widths."""
    settings: dict[str, object] = {"tile": (128, 160), "photometric": "rgb", "metadata": None, "software": False}
    settings |= {"compression": "zlib", "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    settings |= options
    container = {name: settings.pop(name) for name in ("bigtiff", "byteorder") if name in settings}
    shape = settings.pop("shape", (3,))
    dtype = settings.pop("dtype", np.uint8)
    with tifffile.TiffWriter(path, **container) as tiff:
        for i, size in enumerate(sizes):
            tiff.write(np.full((*size, *shape), 200, dtype), subfiletype=0 if i == 0 else 1, **settings)
    return path.read_bytes()


def entry_at(data: bytes, tag: int, page: int = 0) -> tuple[int, int]:
    """Where a page's entry for a tag is in a little-endian classic TIFF, and where the next directory's word is."""
    (position,) = struct.unpack_from("<I", data, 4)
    for _ in range(page):
        (count,) = struct.unpack_from("<H", data, position)
        (position,) = struct.unpack_from("<I", data, position + 2 + 12 * count)
    (count,) = struct.unpack_from("<H", data, position)
    tags = [struct.unpack_from("<H", data, position + 2 + 12 * i)[0] for i in range(count)]
    return position + 2 + 12 * tags.index(tag) if tag else 0, position + 2 + 12 * count


def with_entry(data: bytes, tag: int, kind: int, count: int, value: int, page: int = 0) -> bytes:
    changed = bytearray(data)
    at, _ = entry_at(data, tag, page)
    struct.pack_into("<HHII", changed, at, tag, kind, count, value)
    return bytes(changed)


def test_levels_tiles_and_tables_of_a_pyramid(tmp_path: Path) -> None:
    data = write(tmp_path / "a.svs", [(6000, 5000), (1500, 1250), (375, 312)], description=APERIO)
    found = parsed(data)
    assert found is not None
    info, layout = found
    assert info == open_slide(tmp_path / "a.svs").info
    assert [(v.width, v.height) for v in layout.levels] == [(5000, 6000), (1250, 1500), (312, 375)]
    assert [v.downsample for v in layout.levels] == [1.0, 4.0, 16.0]
    assert layout.levels[0].tiles_across == 32
    assert layout.levels[0].tiles_down == 47
    assert layout.levels[0].offsets.count == 32 * 47
    assert layout.levels[0].offsets.inline == b""
    assert len(layout.levels[2].offsets.inline) == 6 * 4, "short tables are kept"


def test_a_plain_pyramid_takes_only_reduced_pages_and_sorts_them(tmp_path: Path) -> None:
    write(tmp_path / "a.tif", [(2000, 2000), (500, 500), (1000, 1000)])
    with tifffile.TiffWriter(tmp_path / "a.tif", append=True) as tiff:
        tiff.write(np.zeros((256, 256, 3), np.uint8), tile=(128, 128), photometric="rgb", metadata=None)
        tiff.write(np.zeros((256, 256, 3), np.uint8), photometric="rgb", metadata=None, subfiletype=1)
    found = parsed((tmp_path / "a.tif").read_bytes())
    assert found is not None
    assert found[0] == open_slide(tmp_path / "a.tif").info
    assert found[0].level_downsamples == (1.0, 2.0, 4.0)


@pytest.mark.parametrize(
    "options",
    [
        {"tile": None},
        {"photometric": "minisblack", "shape": ()},
        {"dtype": np.uint16},
        {"planarconfig": "separate", "shape": (), "photometric": "rgb", "sizes": [(3, 600)]},
        {"shape": (4,), "extrasamples": ["unassalpha"]},
        {"compression": "packbits"},
        {"compression": "zstd"},
        {"compression": "jpeg2000"},
        {"description": '<?xml?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'},
        {"software": "MedScan 1.2"},
        {"software": "Philips DP v1.0"},
        {"extratags": [(271, 2, 0, "Huron", True)]},
        {"extratags": [(700, 1, 7, b"<iScan/>", True)]},
        {"extratags": [(700, 1, 300_000, b" " * 300_000, True)]},
        {"extratags": [(65420, 4, 1, 1, True)]},
        {"extratags": [(65000, 2, 0, "<argos/>", True)]},
        {"extratags": [(274, 3, 1, 3, True)]},
        {"tile": (8192, 8192)},
        {"tile": (65_552, 16)},
    ],
)
def test_other_kinds_are_left_to_openslide(tmp_path: Path, options: dict[str, object]) -> None:
    if options.get("planarconfig"):
        image = np.zeros((3, 600, 500), np.uint8)
        tifffile.imwrite(tmp_path / "a.tif", image, tile=(128, 160), photometric="rgb", planarconfig="separate")
        assert parsed((tmp_path / "a.tif").read_bytes()) is None
        return
    assert parsed(write(tmp_path / "a.tif", **options)) is None


def test_stacks_of_images_are_left_to_openslide(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a.tif", software="y" * 50))
    assert parsed(bytes(data)) is not None
    at, _ = entry_at(bytes(data), 305)
    struct.pack_into("<HHII", data, at, 32997, 4, 1, 2)
    assert parsed(bytes(data)) is None


@pytest.mark.parametrize("data", [b"", b"II*", b"not a slide" * 100, b"\x89PNG" + bytes(500), b"SQLite format 3\0" * 9])
def test_what_is_no_tiff_is_left_to_openslide(data: bytes) -> None:
    assert parsed(data) is None


def test_a_dicom_file_that_is_a_tiff_too_is_left_to_openslide(tmp_path: Path) -> None:
    data = write(tmp_path / "a.tif")
    assert parsed(data[:128] + b"DICM" + data[132:]) is None


def test_levels_that_grow_are_left_to_openslide(tmp_path: Path) -> None:
    assert parsed(write(tmp_path / "a.svs", [(600, 500), (1200, 1000)], description=APERIO)) is None
    assert parsed(write(tmp_path / "a.svs", [(2400, 2000), (600, 500), (1200, 1000)], description=APERIO)) is None


@pytest.mark.parametrize(
    ("tag", "kind", "count", "value"),
    [
        (256, 4, 1, 0),
        (257, 4, 1, 2**31),
        (322, 4, 1, 0),
        (256, 2, 1, 5),
        (256, 4, 0, 5),
        (256, 4, 3, 8),
        (258, 3, 200, 8),
        (258, 5, 3, 8),
        (324, 4, 3, 8),
        (324, 5, 20, 8),
        (324, 4, 2**31, 8),
        (325, 4, 10**6, 8),
        (324, 4, 20, 2**32 - 16),
        (258, 3, 3, 2**32 - 8),
        (270, 2, 2**31, 8),
        (305, 2, 300_000, 8),
    ],
)
def test_directories_that_contradict_themselves_are_refused(
    tmp_path: Path, tag: int, kind: int, count: int, value: int
) -> None:
    data = write(tmp_path / "patient-1.tif", description="x" * 50, software="y" * 50)
    with pytest.raises(SlideError, match=r"damaged TIFF directory|cut short") as caught:
        parsed(with_entry(data, tag, kind, count, value))
    assert "patient" not in str(caught.value)


def test_jpeg_tables_of_absurd_size_are_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "a.tif", compression="jpeg", description="x" * 50)
    at, _ = entry_at(data, 270)
    changed = bytearray(data)
    struct.pack_into("<HHII", changed, at, 347, 7, 100_000, 8)
    with pytest.raises(SlideError, match="100000 bytes in tag 347"):
        parsed(bytes(changed))


@pytest.mark.parametrize("target", [8, "first", 2**32 - 20])
def test_chains_of_directories_that_lead_nowhere_are_refused(tmp_path: Path, target: int | str) -> None:
    data = bytearray(write(tmp_path / "a.svs", [(2400, 2000), (600, 500)], description=APERIO))
    (first,) = struct.unpack_from("<I", data, 4)
    _, link = entry_at(bytes(data), 0, page=1)
    data[8:16] = bytes(8)
    struct.pack_into("<I", data, link, first if target == "first" else target)
    with pytest.raises(SlideError, match=r"circle|cut short|entries"):
        parsed(bytes(data))


def test_too_many_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "a.svs", [(600, 500)] * 5, description=APERIO)
    assert parsed(data) is not None
    monkeypatch.setattr(tiff_layout, "_MAX_DIRECTORIES", 4)
    with pytest.raises(SlideError, match="too many"):
        parsed(data)


def test_directories_of_absurd_length_are_refused(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a.tif"))
    (first,) = struct.unpack_from("<I", data, 4)
    struct.pack_into("<H", data, first, 60_000)
    with pytest.raises(SlideError, match="60000 entries"):
        parsed(bytes(data))


def test_headers_that_are_too_large_in_all_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "a.svs", [(6000, 5000)], description=APERIO, compression=None)
    monkeypatch.setattr(header, "_MAX_TOTAL_BYTES", 10_000)
    with pytest.raises(SlideError, match="headers of the slide are too large"):
        parsed(data)
    monkeypatch.setattr(header, "_MAX_TOTAL_BYTES", 32 * MB)
    monkeypatch.setattr(header, "_MAX_READ_BYTES", 20)
    with pytest.raises(SlideError, match="headers of the slide are too large"):
        parsed(data)


def test_tables_too_long_to_look_through_are_left_to_openslide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "a.svs", [(6000, 5000)], description=APERIO)
    monkeypatch.setattr(tiff_layout, "_SCAN_BYTES", 64)
    assert parsed(data) is not None
    monkeypatch.setattr(tiff_layout, "_MAX_SCAN_BYTES", 1000)
    assert parsed(data) is None


def test_headers_cost_few_bytes(tmp_path: Path) -> None:
    data = write(tmp_path / "a.svs", [(6000, 5000), (1500, 1250)], description=APERIO, compression=None)
    ranges = MemoryRanges(data)
    assert open_tiled([ObjectInfo("a", len(data), "1")], ranges, TableCache()) is not None
    assert sum(request.length for request in ranges.asked) < 200_000 < len(data) / 100
    assert len(ranges.asked) <= 4


@pytest.mark.parametrize(
    ("description", "resolution", "unit", "override"),
    [
        ("Aperio x|MPP = 0.499", (0, 0), "NONE", None),
        ("Aperio x|MPP = 0,2525", (0, 0), "NONE", None),
        ("Aperio x|MPP=0.3|MPP = 0.5", (0, 0), "NONE", None),
        ("Aperio x|MPP = junk", (20_000, 20_000), "CENTIMETER", None),
        ("Aperio x|MPP = 353", (50_800, 50_800), "INCH", None),
        ("Aperio x|MPP = 0.5", (20_000, 20_000), "CENTIMETER", None),
        ("Aperio x|MPP = 0.5", (40_000, 40_000), "CENTIMETER", None),
        ("Aperio x|MPP = 0.5", (40_000, 40_000), "CENTIMETER", 0.51),
        ("Aperio x|MPP = 0.505", (0, 0), "NONE", 0.5),
        ("Aperio x", (20_000, 20_000), "CENTIMETER", None),
        (None, (20_000, 20_200), "CENTIMETER", None),
        (None, (20_000, 20_000), "CENTIMETER", 0.25),
    ],
)
def test_both_readers_find_the_same_scale(
    tmp_path: Path, description: str | None, resolution: tuple[int, int], unit: str, override: float | None
) -> None:
    data = write(tmp_path / "a.tif", description=description, resolution=resolution, resolutionunit=unit)
    found = parsed(data, override)
    assert found is not None
    expected = open_slide(tmp_path / "a.tif", mpp=override).info
    assert found[0].mpp == pytest.approx(expected.mpp)
    assert found[0].mpp_conflict == pytest.approx(expected.mpp_conflict)
    assert (found[0].mpp_origin, found[0].vendor) == (expected.mpp_origin, expected.vendor)


@pytest.mark.parametrize(("kind", "value"), [(11, 20_000.0), (5, 0.0)])
def test_resolutions_of_other_forms_are_read(tmp_path: Path, kind: int, value: float) -> None:
    data = write(tmp_path / "a.tif")
    (word,) = struct.unpack("<I", struct.pack("<f", value)) if kind == 11 else (len(data),)
    for tag in (282, 283):
        data = with_entry(data, tag, kind, 1, word)
    data += bytes(8)  # a fraction of zero over zero
    (tmp_path / "b.tif").write_bytes(data)
    if kind == 5:
        with pytest.raises(SlideError, match="no microns"):
            parsed(data)
        return
    found = parsed(data)
    assert found is not None
    assert found[0] == open_slide(tmp_path / "b.tif").info


@pytest.mark.parametrize(
    ("vendor_mpp", "tiff_mpp", "override", "conflict"),
    [
        (0.5, 0.25, None, 0.25),
        (0.5, 0.505, None, None),
        (0.5, 353.0, None, None),
        (0.5, 0.25, 0.5, 0.25),
        (0.5, 0.5, 0.25, 0.5),
        (0.5, 0.5, 0.504, None),
    ],
)
def test_origins_that_contradict_each_other_are_told(
    tmp_path: Path, vendor_mpp: float, tiff_mpp: float, override: float | None, conflict: float | None
) -> None:
    resolution = (10_000 / tiff_mpp,) * 2
    data = write(tmp_path / "a.tif", description=f"Aperio x|MPP = {vendor_mpp}", resolution=resolution)
    found = parsed(data, override)
    assert found is not None
    assert found[0].mpp == (vendor_mpp if override is None else override)
    assert found[0].mpp_conflict == (None if conflict is None else pytest.approx(conflict))


@pytest.mark.parametrize(("resolution", "match"), [((72, 72), "no microns"), ((20_000, 30_000), "not square")])
def test_scales_that_cannot_be_told_are_refused(tmp_path: Path, resolution: tuple[int, int], match: str) -> None:
    with pytest.raises(SlideError, match=match):
        parsed(write(tmp_path / "a.tif", resolution=resolution))
