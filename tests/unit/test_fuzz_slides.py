"""Hostile slides: None, a typed error, or the px that OpenSlide reads; never a hang, a crash or much memory."""

import io
import json
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from numpy.typing import NDArray

from histoscale.errors import SlideError, StorageError
from histoscale.slides.layout import SlideLayout
from histoscale.slides.table_cache import TableCache
from histoscale.slides.tiled import TiledSlide, open_tiled
from histoscale.storage import ObjectInfo
from histoscale.storage.ranges import ObjectChanged, RangeReader, RangeRequest

CASES = 2000
MAX_EXTRA_BYTES = 256 * 2**20
MAX_CASE_S = 10
SIDE_PX = 300
WORDS = (0, 1, 2, 7, 0x7FFF, 0xFFFF, 2**20, 2**24, 2**28 + 3, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)


class MemoryRanges:
    """One object in memory, which ends where it ends."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def submit(self, requests: Sequence[RangeRequest]) -> Future[list[bytes]]:
        future: Future[list[bytes]] = Future()
        if any(r.start < 0 or r.start + r.length > len(self.data) for r in requests):
            future.set_exception(ObjectChanged("a range ends after the object"))
        else:
            future.set_result([self.data[r.start : r.start + r.length] for r in requests])
        return future

    def fetch(self, requests: Sequence[RangeRequest]) -> list[bytes]:
        return self.submit(requests).result()

    stats = RangeReader.stats
    close = RangeReader.close


def write_bases(folder: Path) -> list[Path]:
    """Small slides of each kind that is read in place."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (20, 25, 3), np.uint8).repeat(32, axis=0).repeat(32, axis=1)
    kinds: list[tuple[str, dict[str, object], str | None]] = [
        ("jpeg.svs", {"compression": "jpeg"}, "Aperio Image Library v12\r\nx|AppMag = 20|MPP = 0.5"),
        ("j2k.svs", {"compression": "aperio_jp2000_rgb"}, "Aperio Image Library v12\r\nx|AppMag = 20|MPP = 0.5"),
        ("deflate.tif", {"compression": "zlib", "predictor": True}, None),
        ("lzw.tif", {"compression": "lzw"}, None),
        ("big.tif", {"compression": "jpeg"}, None),
    ]
    paths = []
    for name, options, description in kinds:
        path = folder / name
        with tifffile.TiffWriter(path, bigtiff=name == "big.tif") as tiff:
            for i, factor in enumerate((1, 4)):
                tiff.write(
                    noise[::factor, ::factor],
                    tile=(64, 64),
                    photometric="rgb",
                    metadata=None,
                    software=False,
                    description=description,
                    subfiletype=min(i, 1),
                    resolution=(20_000, 20_000),
                    resolutionunit="CENTIMETER",
                    **options,
                )
        paths.append(path)
    return paths


def structure_of(data: bytes) -> list[tuple[int, int]]:
    """Spans of a TIFF that say something: the header, directories and tables."""
    spans = [(0, 16)]
    with tifffile.TiffFile(tifffile.FileHandle(io.BytesIO(data))) as tiff:
        for page in tiff.pages:
            spans.append((page.offset, len(page.tags) * (20 if tiff.is_bigtiff else 12) + 16))
            spans += [(tag.valueoffset, min(tag.valuebytecount, 4000)) for tag in page.tags]
    return spans


def mutated(data: bytes, spans: list[tuple[int, int]], rng: np.random.Generator) -> bytes:
    """A few faults of several kinds, most of them in what the structure says."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        start, length = spans[int(rng.integers(len(spans)))]
        at = start + int(rng.integers(max(length, 1)))
        kind = int(rng.integers(6))
        if kind == 0:
            changed[at % len(changed)] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            changed[at % len(changed)] = int(rng.integers(256))
        elif kind == 2:
            word = WORDS[int(rng.integers(len(WORDS)))]
            changed[at : at + 4] = struct.pack("<I", word)
        elif kind == 3:  # a pointer to another part of the structure: circles, and tables read as directories
            target, _ = spans[int(rng.integers(len(spans)))]
            changed[at : at + 4] = struct.pack("<I", target)
        elif kind == 4:
            changed[at : at + 2] = struct.pack("<H", WORDS[int(rng.integers(6))])
        else:
            at = int(rng.integers(len(changed)))
            changed[at : at + 8] = rng.bytes(8)
    if rng.random() < 0.15:
        del changed[int(rng.integers(len(changed))) :]
    return bytes(changed)


def outcome(data: bytes) -> tuple[str, NDArray[np.uint8] | None]:
    """What reading a slide comes to: "none", "refused" or "read", and the px at its corner."""
    try:
        slide = open_tiled([ObjectInfo("a", len(data), "1")], MemoryRanges(data), TableCache())
        if slide is None:
            return "none", None
        layout = SlideLayout.from_bytes(slide.layout.to_bytes())
        again = TiledSlide(slide.info, layout, [ObjectInfo("a", len(data), "1")], MemoryRanges(data), TableCache())
        again.read(1e5, -30.0, 64, 0.7)
        return "read", again.read(0.0, 0.0, SIDE_PX, slide.info.mpp)
    except (SlideError, StorageError):
        return "refused", None


def cases(folder: Path, seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    bases = [path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".svs", ".tif")]
    spans = [structure_of(data) for data in bases]
    return [mutated(bases[i % len(bases)], spans[i % len(bases)], rng) for i in range(CASES)]


def run_cases(folder: Path, seed: int) -> None:
    """In a process of its own: read every case within bounds of time and memory, and leave what was read."""
    all_cases = cases(folder, seed)
    outcome(all_cases[0])
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit_bytes = pages * resource.getpagesize() + MAX_EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    results = []
    for i, data in enumerate(all_cases):
        signal.alarm(MAX_CASE_S)  # its signal ends the process
        result, px = outcome(data)
        signal.alarm(0)
        results.append(result)
        if px is not None:
            np.save(folder / f"{i}.npy", px)
            (folder / f"{i}.case").write_bytes(data)
    (folder / "results.json").write_text(json.dumps(results))


def openslide_px(path: Path) -> NDArray[np.uint8] | None:
    """The same corner by OpenSlide; None where it does not read the file."""
    try:
        with openslide.OpenSlide(path) as handle:
            part = handle.read_region((0, 0), 0, (SIDE_PX, SIDE_PX))
    except openslide.OpenSlideError:
        return None
    canvas = np.full((SIDE_PX, SIDE_PX, 3), 255, np.uint8)
    rgba = np.asarray(part)
    canvas[rgba[..., 3] > 0] = rgba[rgba[..., 3] > 0][:, :3]
    return canvas


def test_mutated_slides_are_refused_or_read_as_openslide_reads_them(tmp_path: Path) -> None:
    for path in write_bases(tmp_path):
        assert outcome(path.read_bytes())[0] == "read"
    program = f"from pathlib import Path; import test_fuzz_slides as t; t.run_cases(Path({str(tmp_path)!r}), 7)"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{root / 'platform'}:{Path(__file__).parent}", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == CASES
    assert min(results.count(kind) for kind in ("none", "refused", "read")) > CASES // 20
    compared = 0
    for case in sorted(tmp_path.glob("*.case")):
        expected = openslide_px(case)
        if expected is not None:
            compared += 1
            assert np.array_equal(np.load(case.with_suffix(".npy")), expected), case.stem
    assert compared > results.count("read") // 2


def test_random_layouts_are_refused() -> None:
    rng = np.random.default_rng(3)
    for n in range(300):
        with pytest.raises(SlideError, match="layout of the slide is damaged"):
            SlideLayout.from_bytes(b"HSL1" + rng.bytes(n))
