"""How little of a large slide the index reads, and how many slides a core examines."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from histoscale.bench.archive import large_archive
from histoscale.bench.figure import Figure
from histoscale.slides.catalogue import Locations, open_catalogue
from histoscale.slides.examine import examine
from histoscale.slides.opening import open_located
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.table_cache import TableCache
from histoscale.storage.ranges import open_ranges

_REPEATS = 3
_COPY_BYTES = 2**30


def index() -> Iterator[Figure]:
    """`index.bytes_share` and `index.slides_per_s_core`, each against OpenSlide on a copy of the whole slide."""
    with large_archive() as archive, tempfile.TemporaryDirectory(prefix="histoscale-bench-") as copies:
        catalogue = open_catalogue(archive.index_uri, archive.snapshot_id)
        locations = Locations(catalogue)
        ranges = open_ranges(archive.slides_uri)
        sizes = [int(size) for size in catalogue.rows["size_bytes"]]
        shares, requests = [], []
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(_REPEATS):
            for row, size_bytes in enumerate(sizes):
                before = ranges.stats
                where, tables = locations.location(row), TableCache()
                with open_located(where, ranges, tables, Path(copies), _COPY_BYTES) as opened:
                    examine(catalogue.slide_id(row), opened.slide, size_bytes=size_bytes, layout=opened.layout)
                shares.append((ranges.stats.bytes - before.bytes) / size_bytes)
                requests.append(ranges.stats.requests - before.requests)
        cpu_s, wall_s = time.process_time() - start_cpu_s, time.perf_counter() - start_s
        details = {"sizes_bytes": sizes, "requests_per_slide": max(requests)}
        yield Figure("index.bytes_share", max(shares), "share", 1.0, details)
        examined = _REPEATS * len(sizes)
        start_cpu_s = time.process_time()
        for row, size_bytes in enumerate(sizes * _REPEATS):
            name = catalogue.slide_id(row % len(sizes))
            slide = open_slide(archive.paths[name])
            examine(name, slide, size_bytes=size_bytes)
            slide.close()
        baseline = examined / (time.process_time() - start_cpu_s)
        details = {"wall_s_per_slide": wall_s / examined, "baseline": "OpenSlide, the copy's time not counted"}
        yield Figure("index.slides_per_s_core", examined / cpu_s, "1/s", baseline, details)
