"""Reading through a server that fails: 10 % of the requests are refused, reset, cut short or late."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from histoscale.bench.archive import large_archive
from histoscale.bench.figure import Figure
from histoscale.bench.proxy import faulty_proxy
from histoscale.bench.s3_server import environment
from histoscale.stream.chapters import Chapter, ChapterTiles
from histoscale.stream.reader import Reader, ReaderSpec

_SHARE = 0.1
_CHAPTERS = 20


def faults() -> Iterator[Figure]:
    """`faults.wrong_tiles` and `faults.lost_tiles`: against the same tiles from the server itself."""
    with large_archive(slides=1, grid=2) as archive:
        spec = archive.reader()
        expected = _read(spec)
        with (
            faulty_proxy(archive.endpoint, _SHARE, seed=0) as (endpoint, counts),
            environment({"AWS_ENDPOINT_URL": endpoint}, keep=True),
        ):
            got = _read(spec)
        tiles = sum(chapter.sample_ids.size for chapter in expected)
        wrong = sum(_different(ours, other) for ours, other in zip(got, expected, strict=True))
        lost = tiles - sum(chapter.sample_ids.size for chapter in got) + sum(len(chapter.faults) for chapter in got)
        details = {"tiles": tiles, "requests": dict(Counter(counts))}
        yield Figure("faults.wrong_tiles", wrong, "tiles", details=details)
        yield Figure("faults.lost_tiles", lost, "tiles", details=details)


def _read(spec: ReaderSpec) -> list[ChapterTiles]:
    reader = Reader(spec)
    return [reader.read(Chapter(n // 8, n % 8, n // 8 * 4, n // 8 * 4 + 3), n % 8) for n in range(_CHAPTERS)]


def _different(ours: ChapterTiles, other: ChapterTiles) -> int:
    return int(np.any(ours.tiles != other.tiles, axis=(2, 3, 4)).sum())
