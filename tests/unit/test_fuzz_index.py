"""Damaged files of an index end in a refusal: never in another error, a huge allocation, or a slide that is not so."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from histoscale.errors import SlideError, SlideIndexError, StorageError
from histoscale.slides.catalogue import Locations, open_catalogue
from histoscale.slides.index import SlideLocation, SlideRecord, make_index, write_index
from histoscale.slides.layout import Level, SlideLayout, Table
from histoscale.storage import ObjectInfo, open_store

CASES = 2000
MOST_BYTES = 256 * 2**20
FILES = ("index.json", "snapshot.json", "catalogue.npy", "records.bin", "locations.bin")


def make(folder: Path) -> None:
    table = Table(6, 4, False, 8)
    level = Level(40, 30, 16, 16, 1.0, "jpeg", "rgb", False, False, 0, b"", table, table)
    layout = SlideLayout("aperio", (level,)).to_bytes()
    rng = np.random.default_rng(0)
    records, locations = [], {}
    for n in range(6):
        name = f"{n + 1:032x}"
        mask = rng.random((20, 30)) < 0.5
        records.append(SlideRecord(name, "aperio", 40, 30, 0.25, "vendor", 1000, (1.0,), mask, 2.0, layout=layout))
        locations[name] = SlideLocation("s3://bucket/root", (ObjectInfo(f"{n}.svs", 1000, "etag"),), None)
    write_index(open_store(folder), make_index(records, ()), locations)


def read_all(folder: Path) -> list[tuple[object, ...]]:
    """Everything that a reader takes from an index."""
    catalogue = open_catalogue(str(folder))
    locations = Locations(catalogue)
    found: list[tuple[object, ...]] = []
    for row in range(len(catalogue)):
        mask, layout = catalogue.mask(row), SlideLayout.from_bytes(catalogue.layout(row))
        entry = catalogue.rows[row]
        facts = (catalogue.slide_id(row), float(entry["mpp"]), int(entry["width_px0"]), int(entry["flags"]))
        found.append((*facts, mask.tobytes(), layout, locations.location(row)))
    return found


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    kind, at = rng.integers(5), int(rng.integers(len(data)))
    if kind == 0:
        return data[:at]
    changed = bytearray(data)
    if kind == 1:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        changed[at : at + 4] = b"\xff" * len(changed[at : at + 4])
    elif kind == 3:
        changed[at : at + 8] = bytes(len(changed[at : at + 8]))
    else:
        changed[at:at] = bytes(rng.integers(0, 256, 5, np.uint8))
    return bytes(changed)


@pytest.mark.timeout(120)
def test_damaged_indexes_are_refused_or_say_what_they_said(tmp_path: Path) -> None:
    make(tmp_path)
    expected = read_all(tmp_path)
    paths = [next(tmp_path.rglob(name)) for name in FILES]
    originals = [path.read_bytes() for path in paths]
    rng = np.random.default_rng(7)
    refused = 0
    tracemalloc.start()
    for case in range(CASES):
        path, original = paths[case % len(paths)], originals[case % len(paths)]
        path.write_bytes(mutated(original, rng))
        try:
            found = read_all(tmp_path)
        except (SlideIndexError, SlideError, StorageError):
            refused += 1
        else:
            # What a location says is checked by the object's ETag, what a header counts is for people.
            if path.name != "index.json":
                assert [facts[:-1] for facts in found] == [facts[:-1] for facts in expected], (case, path.name)
        path.write_bytes(original)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES
    assert refused > CASES / 2
    assert read_all(tmp_path) == expected
