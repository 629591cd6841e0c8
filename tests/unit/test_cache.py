"""The bounded folder of local copies: eviction, pins, privacy, and what is left of it."""

import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from histoscale.errors import StorageError
from histoscale.storage import ObjectInfo
from histoscale.storage.cache import ObjectCache, local_name
from histoscale.storage.local import LocalStore

SIZE = 10


class RemoteFolder(LocalStore):
    """A folder that must be copied from, as a bucket must; counts the copies."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, private=True)
        self.downloads: list[str] = []
        self.pause_s = 0.0

    def local_path(self, key: str) -> Path | None:
        return None

    def download(self, key: str, path: Path, etag: str | None = None) -> None:
        self.downloads.append(key)
        time.sleep(self.pause_s)
        super().download(key, path, etag)


@pytest.fixture
def store(tmp_path: Path) -> RemoteFolder:
    store = RemoteFolder(tmp_path / "slides")
    for name in "abcd":
        store.put(f"S24-{name}.svs", name.encode() * SIZE)
    return store


@pytest.fixture
def infos(store: RemoteFolder) -> dict[str, list[ObjectInfo]]:
    return {info.key[4]: [info] for info in store.list()}


@pytest.fixture
def cache(tmp_path: Path) -> ObjectCache:
    return ObjectCache(tmp_path / "cache", 2 * SIZE)


def bytes_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def own_folders(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("cache-*"))


def test_the_set_last_leased_stays(
    cache: ObjectCache, store: RemoteFolder, infos: dict[str, list[ObjectInfo]], tmp_path: Path
) -> None:
    for slot in "abacab":
        with cache.lease(store, infos[slot], slot) as folder:
            assert (folder / "0.svs").read_bytes() == slot.encode() * SIZE
        assert bytes_on_disk(tmp_path / "cache") <= 2 * SIZE
    # c pushed b out, for a was leased after b; then b pushed out c.
    assert store.downloads == [f"S24-{name}.svs" for name in "abcb"]


def test_a_leased_set_is_never_evicted(
    cache: ObjectCache, store: RemoteFolder, infos: dict[str, list[ObjectInfo]]
) -> None:
    with cache.lease(store, infos["a"], "a") as folder:
        for slot in "bcd":
            cache.fetch(store, infos[slot], slot)
        assert (folder / "0.svs").read_bytes() == b"a" * SIZE
        with (
            cache.lease(store, infos["d"], "d"),
            pytest.raises(StorageError, match=r"full of files in use \(got '20 bytes in use, 10 more wanted'"),
            cache.lease(store, infos["b"], "b"),
        ):
            pass
    assert cache.fetch(store, infos["b"], "b").exists()


def test_a_set_larger_than_the_bound_is_refused_with_the_remedy(store: RemoteFolder, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"larger than the cache .*Raise cluster\.slide_cache_gb"):
        ObjectCache(tmp_path / "cache", 3 * SIZE).fetch(store, list(store.list()), "all")


def test_files_are_named_by_place_and_suffix_only(
    cache: ObjectCache, store: RemoteFolder, infos: dict[str, list[ObjectInfo]]
) -> None:
    folder = cache.fetch(store, infos["a"] + infos["b"], "pair")
    assert sorted(path.name for path in folder.iterdir()) == ["0.svs", "1.svs"]
    assert (folder / local_name(1, infos["b"][0].key)).read_bytes() == b"b" * SIZE
    assert "S24" not in str(folder)
    assert [local_name(0, key) for key in ("x/y.TIFF", "S24.01234", "no-suffix", "a.b/c.x1")] == ["0.TIFF", *["0"] * 3]


def test_copies_are_for_their_owner_only(
    cache: ObjectCache, store: RemoteFolder, infos: dict[str, list[ObjectInfo]]
) -> None:
    folder = cache.fetch(store, infos["a"], "a")
    assert stat.S_IMODE((folder / "0.svs").stat().st_mode) == 0o600
    assert {stat.S_IMODE(each.stat().st_mode) for each in (folder, folder.parent, folder.parents[1])} == {0o700}


def test_files_of_this_machine_are_linked_and_count_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "slides", private=True)
    store.put("S24-a.svs", b"x" * 1000)
    (info,) = store.list()
    cache = ObjectCache(tmp_path / "cache", 1)
    with cache.lease(store, [info], "a") as folder:
        assert (folder / "0.svs").is_symlink()
        assert (folder / "0.svs").read_bytes() == b"x" * 1000
    cache.close()
    assert store.get("S24-a.svs") == b"x" * 1000


@pytest.mark.parametrize("copied", [True, False])
def test_an_object_that_changed_or_went_is_refused_and_leaves_nothing(tmp_path: Path, copied: bool) -> None:
    folder = tmp_path / "slides"
    store = RemoteFolder(folder) if copied else LocalStore(folder, private=True)
    store.put("S24-a.svs", b"x" * SIZE)
    old = list(store.list())
    store.put("S24-a.svs", b"y" * (SIZE + 1))
    cache = ObjectCache(tmp_path / "cache", 2 * SIZE)
    with pytest.raises(StorageError, match="changed since it was listed") as changed:
        cache.fetch(store, old, "a")
    assert bytes_on_disk(tmp_path / "cache") == 0
    assert cache.fetch(store, list(store.list()), "a").exists()
    new = list(store.list())
    store.delete("S24-a.svs")
    with pytest.raises(StorageError, match="does not exist") as gone:
        cache.fetch(store, new, "b")
    assert "S24" not in f"{changed.value}{gone.value}"


def test_threads_share_one_download(
    cache: ObjectCache, store: RemoteFolder, infos: dict[str, list[ObjectInfo]]
) -> None:
    store.pause_s = 0.05
    gate = threading.Barrier(8)

    def read(slot: str) -> bytes:
        gate.wait()
        with cache.lease(store, infos[slot], slot) as folder:
            return (folder / "0.svs").read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, "abababab")) == [name.encode() * SIZE for name in "abababab"]
    assert sorted(store.downloads) == ["S24-a.svs", "S24-b.svs"]


def test_a_failed_download_does_not_fail_the_threads_that_wait(
    cache: ObjectCache, store: RemoteFolder, infos: dict[str, list[ObjectInfo]], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [StorageError("the network is down")]
    inner = RemoteFolder.download

    def download(self: RemoteFolder, key: str, path: Path, etag: str | None = None) -> None:
        time.sleep(0.1)
        if failures:
            raise failures.pop()
        inner(self, key, path, etag)

    monkeypatch.setattr(RemoteFolder, "download", download)
    gate = threading.Barrier(3)

    def read(_: int) -> str:
        gate.wait()
        try:
            with cache.lease(store, infos["a"], "a") as folder:
                return (folder / "0.svs").read_text()
        except StorageError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(read, range(3))) == ["a" * SIZE, "a" * SIZE, "the network is down."]


def test_many_threads_keep_within_the_bound(store: RemoteFolder, tmp_path: Path) -> None:
    infos = {info.key[4]: [info] for info in store.list()}
    cache = ObjectCache(tmp_path / "cache", 3 * SIZE)
    over = []

    def read(seed: int) -> None:
        for turn in range(30):
            slot = "abcd"[(seed * 7 + turn * 3 + turn // 4) % 4]
            with cache.lease(store, infos[slot], slot) as folder:
                assert (folder / "0.svs").read_bytes() == slot.encode() * SIZE
                over.append(cache._used_bytes > 3 * SIZE)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, range(3)))
    assert len(over) == 90
    assert not any(over)


def test_a_folder_that_cannot_be_made_is_diagnosed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"the cache folder .*file/cache cannot be used: not a directory"):
        ObjectCache(tmp_path / "file" / "cache", 1)


def test_the_folder_goes_with_the_cache(
    store: RemoteFolder, infos: dict[str, list[ObjectInfo]], tmp_path: Path
) -> None:
    closed, dropped = ObjectCache(tmp_path / "cache", SIZE), ObjectCache(tmp_path / "cache", SIZE)
    closed.fetch(store, infos["a"], "a")
    dropped.fetch(store, infos["a"], "a")
    assert len(own_folders(tmp_path / "cache")) == 2
    closed.close()
    closed.close()
    del dropped
    gc.collect()
    assert own_folders(tmp_path / "cache") == []


def start_process(directory: Path, last_line: str) -> "subprocess.Popen[str]":
    program = (
        "import sys, pathlib\nfrom histoscale.storage.cache import ObjectCache\n"
        "cache = ObjectCache(pathlib.Path(sys.argv[1]), 100)\n(cache._folder / 'copy').write_bytes(b'pixels')\n"
        f"print('ready', flush=True)\n{last_line}\n"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE, text=True)


def test_the_folder_goes_at_the_end_of_the_process(tmp_path: Path) -> None:
    with start_process(tmp_path, "sys.exit(3)") as process:
        assert process.wait() == 3
    assert own_folders(tmp_path) == []


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    with start_process(tmp_path, "import time; time.sleep(600)") as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            living = own_folders(tmp_path)
            mine = ObjectCache(tmp_path, 1)
            assert living[0] in own_folders(tmp_path)
        finally:
            process.send_signal(signal.SIGKILL)
    assert (living[0] / "copy").exists()
    (tmp_path / "not-ours").mkdir()
    again = ObjectCache(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "not-ours", mine._folder.name, again._folder.name}


def test_a_forked_process_does_not_remove_the_folder(
    cache: ObjectCache, store: RemoteFolder, infos: dict[str, list[ObjectInfo]]
) -> None:
    folder = cache.fetch(store, infos["a"], "a")
    child = os.fork()
    if child == 0:
        cache.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert (folder / "0.svs").exists()
