"""The node-local cache: shared, bounded, encrypted, and never a reason to fail."""

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from histoscale.storage.disk_cache import DiskCache

SECRET = b"secret of an index"


def pieces(count: int, size_bytes: int = 1000) -> dict[str, bytes]:
    return {f"etag:slide-{n}.svs:{n}:{size_bytes}": bytes([n % 256]) * size_bytes for n in range(count)}


def test_pieces_come_back_and_others_do_not(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10**6, SECRET)
    cache.put(pieces(1200, 10))
    assert cache.get([*pieces(1200, 10), "other"]) == pieces(1200, 10)
    assert cache.get(["other"]) == {}
    assert cache.hits == 1200


def fill(folder: Path, first: int) -> None:
    DiskCache(folder, 10**8, SECRET).put({f"{n}": str(n).encode() for n in range(first, first + 200)})


def test_processes_share_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=fill, args=(tmp_path, 200 * n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wanted = {f"{n}": str(n).encode() for n in range(600)}
    assert DiskCache(tmp_path, 10**8, SECRET).get(list(wanted)) == wanted


def test_the_least_recently_used_make_room(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 100_000, SECRET)
    kept = pieces(1)
    cache.put(kept)
    for n in range(1, 400):
        cache.put({f"{n}": bytes(1000)})
        assert cache.get(list(kept)) == kept
    with sqlite3.connect(tmp_path / "pieces.sqlite") as database:
        (held,) = database.execute("SELECT sum(size) FROM pieces").fetchone()
    assert 50_000 < held <= 110_000
    assert cache.get(["1"]) == {}


def test_the_disk_tells_neither_names_nor_contents(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10**6, SECRET)
    cache.put({"Mustermann-1957.svs": b"plain tissue" * 100})
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"Mustermann" not in on_disk
    assert b"plain tissue" not in on_disk
    assert tmp_path.stat().st_mode & 0o777 == 0o700 or (tmp_path / "pieces.sqlite").exists()


def test_another_secret_finds_nothing(tmp_path: Path) -> None:
    DiskCache(tmp_path, 10**6, SECRET).put(pieces(3))
    assert DiskCache(tmp_path, 10**6, b"another").get(list(pieces(3))) == {}


def test_a_piece_that_the_disk_changed_is_fetched_again(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10**6, SECRET)
    cache.put(pieces(2))
    with sqlite3.connect(tmp_path / "pieces.sqlite") as database:
        name, data = database.execute("SELECT name, data FROM pieces").fetchone()
        database.execute("UPDATE pieces SET data = ? WHERE name = ?", (data[:-1] + bytes([data[-1] ^ 1]), name))
    assert len(cache.get(list(pieces(2)))) == 1


@pytest.mark.parametrize("spoil", ["no database", "no folder"])
def test_a_cache_that_cannot_be_used_is_no_cache(tmp_path: Path, spoil: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "cache"
    if spoil == "no folder":
        folder.write_text("a file")
    else:
        folder.mkdir()
        (folder / "pieces.sqlite").write_bytes(b"this is no database" * 100)
    cache = DiskCache(folder, 10**6, SECRET)
    cache.put(pieces(2))
    assert cache.get(list(pieces(2))) == {}
    assert "cannot be used" in caplog.text
