"""The bounded folder of local copies: eviction, pins, processes that share it, privacy, and what is left of it."""

import contextlib
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from histoscale.errors import StorageError
from histoscale.storage import ObjectInfo
from histoscale.storage.cache import CacheFull, ObjectCache, local_name
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
    return sum(path.stat().st_size for path in folder.rglob("*/*/*/*") if path.is_file())


def bytes_reserved(folder: Path) -> int:
    """Of the sets that are there or on their way; unlike `bytes_on_disk`, while others come and go."""
    return sum(int(name.split("-")[1]) for name in os.listdir(folder / "copies") if "-" in name)


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
            pytest.raises(CacheFull, match=r"full of files in use \(got '20 bytes in use, 10 more wanted'"),
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


def test_a_file_of_this_machine_that_changed_after_it_was_linked_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "slides", private=True)
    store.put("S24-a.svs", b"x" * SIZE)
    old = list(store.list())
    first, second = ObjectCache(tmp_path / "cache", 1), ObjectCache(tmp_path / "cache", 1)
    first.fetch(store, old, "a")
    store.put("S24-a.svs", b"y" * (SIZE + 1))
    with pytest.raises(StorageError, match="changed since it was listed"):
        second.fetch(store, old, "a")
    assert (second.fetch(store, list(store.list()), "a") / "0.svs").read_bytes() == b"y" * (SIZE + 1)
    store.delete("S24-a.svs")
    with pytest.raises(StorageError, match="does not exist"):
        first.fetch(store, old, "a")


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
                over.append(bytes_reserved(tmp_path / "cache") > 3 * SIZE)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, range(3)))
    assert len(over) == 90
    assert not any(over)


def test_a_folder_that_cannot_be_made_is_diagnosed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"the cache folder .*file/cache cannot be used: not a directory"):
        ObjectCache(tmp_path / "file" / "cache", 1)


def test_copies_go_with_the_last_cache_that_uses_their_folder(
    store: RemoteFolder, infos: dict[str, list[ObjectInfo]], tmp_path: Path
) -> None:
    closed, dropped = ObjectCache(tmp_path / "cache", SIZE), ObjectCache(tmp_path / "cache", SIZE)
    folder = closed.fetch(store, infos["a"], "a")
    closed.close()
    closed.close()
    assert dropped.fetch(store, infos["a"], "a") == folder
    assert store.downloads == ["S24-a.svs"]
    del dropped
    gc.collect()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock", "users"}
    with pytest.raises(StorageError, match=r"the cache folder .* does not exist"):
        closed.fetch(store, infos["a"], "a")
    again = ObjectCache(tmp_path / "cache", SIZE)
    assert again.fetch(store, infos["a"], "a").parent.name != folder.parent.name  # under another key


def test_who_may_wait_for_room_gets_it_when_a_lease_ends(
    store: RemoteFolder, infos: dict[str, list[ObjectInfo]], tmp_path: Path
) -> None:
    cache, other = ObjectCache(tmp_path / "cache", SIZE), ObjectCache(tmp_path / "cache", SIZE)
    leased = threading.Event()

    def hold() -> None:
        with other.lease(store, infos["a"], "a"):
            leased.set()
            time.sleep(0.3)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        leased.wait()
        with pytest.raises(CacheFull):
            cache.fetch(store, infos["b"], "b")
        with cache.lease(store, infos["b"], "b", wait_s=60.0) as folder:
            assert bytes_on_disk(tmp_path / "cache") == SIZE
            assert (folder / "0.svs").read_bytes() == b"b" * SIZE
        held.result()
    with cache.lease(store, infos["a"], "a"), pytest.raises(CacheFull), other.lease(store, infos["b"], "b", wait_s=0.2):
        pass


PROGRAM = """
import sys, time
from pathlib import Path
from histoscale.storage.cache import ObjectCache
from histoscale.storage.local import LocalStore

class Marked(LocalStore):
    def local_path(self, key):
        return None

    def download(self, key, path, etag=None):
        with (root / "downloads").open("a") as file:
            file.write(key[4] + "\\n")
        if sys.argv[3] == "half":
            path.with_name("half").write_bytes(b"half")
            print("ready", flush=True)
            time.sleep(600)
        time.sleep(0.3)
        super().download(key, path, etag)

root = Path(sys.argv[1])
store = Marked(root / "slides", private=True)
infos = {info.key[4]: [info] for info in store.list()}
cache = ObjectCache(root / "cache", 20)
print("open", flush=True)
sys.stdin.readline()
with cache.lease(store, infos[sys.argv[2]], sys.argv[2]) as folder:
    print((folder / "0.svs").read_text(), flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def started(root: Path, slot: str, how: str = "") -> Iterator["subprocess.Popen[str]"]:
    """A process that opens the cache, waits for a line, leases a set, and ends with the next line."""
    command = [sys.executable, "-c", PROGRAM, str(root), slot, how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert said(process) == "open"
            yield process
        finally:
            process.kill()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def downloads(root: Path) -> str:
    return (root / "downloads").read_text().replace("\n", "")


@pytest.mark.usefixtures("store")
def test_processes_share_one_download_and_the_last_one_removes_it(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started(tmp_path, "a")) for _ in range(3)]
        for process in processes:
            tell(process)
        assert [said(process) for process in processes] == ["a" * SIZE] * 3
        assert downloads(tmp_path) == "a"
        for process in processes:
            assert bytes_on_disk(tmp_path / "cache") == SIZE
            tell(process)
            assert process.wait() == 0
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock", "users"}


def test_a_set_that_another_process_holds_stays_until_that_is_killed(
    store: RemoteFolder, infos: dict[str, list[ObjectInfo]], tmp_path: Path
) -> None:
    cache = ObjectCache(tmp_path / "cache", 2 * SIZE)
    with started(tmp_path, "a") as process:
        tell(process)
        assert said(process) == "a" * SIZE
        for slot in "bcb":
            cache.fetch(store, infos[slot], slot)
        with cache.lease(store, infos["b"], "b"), pytest.raises(CacheFull, match="20 bytes in use, 10 more"):
            cache.fetch(store, infos["c"], "c")
        assert bytes_on_disk(tmp_path / "cache") == 2 * SIZE
        process.send_signal(signal.SIGKILL)
        process.wait()
        with cache.lease(store, infos["b"], "b"):
            cache.fetch(store, infos["c"], "c")
    cache.fetch(store, infos["a"], "a")
    assert (store.downloads, downloads(tmp_path)) == ([f"S24-{name}.svs" for name in "bcbca"], "a")


def test_a_process_that_is_killed_while_it_fills_leaves_nothing_half(
    store: RemoteFolder, infos: dict[str, list[ObjectInfo]], tmp_path: Path
) -> None:
    cache = ObjectCache(tmp_path / "cache", 2 * SIZE)
    with started(tmp_path, "a", "half") as process, ThreadPoolExecutor(2) as pool:
        tell(process)
        assert said(process) == "ready"
        waiting = [pool.submit(cache.fetch, store, infos["a"], "a") for _ in range(2)]
        time.sleep(0.2)
        assert not any(each.done() for each in waiting)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [(each.result() / "0.svs").read_bytes() for each in waiting] == [b"a" * SIZE] * 2
    assert store.downloads == ["S24-a.svs"]
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()].count("half") == 0


def test_what_a_killed_fill_left_counts_and_makes_room(
    store: RemoteFolder, infos: dict[str, list[ObjectInfo]], tmp_path: Path
) -> None:
    cache = ObjectCache(tmp_path / "cache", 2 * SIZE)
    with started(tmp_path, "a", "half") as process:
        tell(process)
        assert said(process) == "ready"
        process.send_signal(signal.SIGKILL)
        process.wait()
    for slot in "bc":
        cache.fetch(store, infos[slot], slot)
    assert bytes_reserved(tmp_path / "cache") == bytes_on_disk(tmp_path / "cache") == 2 * SIZE


@pytest.mark.usefixtures("store")
def test_what_killed_processes_left_goes_when_the_next_one_comes_alone(tmp_path: Path) -> None:
    (tmp_path / "cache" / "not-ours").mkdir(parents=True)
    with started(tmp_path, "a") as holder, started(tmp_path, "b") as user:
        tell(holder)
        assert said(holder) == "a" * SIZE
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        ObjectCache(tmp_path / "cache", SIZE).close()
        assert bytes_on_disk(tmp_path / "cache") == SIZE  # for the other one, who may want it
        user.send_signal(signal.SIGKILL)
        user.wait()
    assert bytes_on_disk(tmp_path / "cache") == SIZE
    mine = ObjectCache(tmp_path / "cache", SIZE)
    assert bytes_on_disk(tmp_path / "cache") == 0
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {".lock", "users", "copies", "not-ours"}
    mine.close()


def test_processes_at_work_keep_the_bound_together(
    store: RemoteFolder, infos: dict[str, list[ObjectInfo]], tmp_path: Path
) -> None:
    cache = ObjectCache(tmp_path / "cache", 2 * SIZE)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(started(tmp_path, slot)) for slot in "ab"]
        for process in processes:
            tell(process)
        assert {said(process) for process in processes} == {"a" * SIZE, "b" * SIZE}
        with pytest.raises(CacheFull):
            cache.fetch(store, infos["c"], "c")
        assert cache.fetch(store, infos["a"], "a").exists()
        tell(processes[0])
        assert processes[0].wait() == 0
        with cache.lease(store, infos["c"], "c", wait_s=60.0):
            assert bytes_reserved(tmp_path / "cache") == 2 * SIZE


def test_a_forked_process_does_not_remove_the_copies(
    cache: ObjectCache, store: RemoteFolder, infos: dict[str, list[ObjectInfo]]
) -> None:
    folder = cache.fetch(store, infos["a"], "a")
    child = os.fork()
    if child == 0:
        cache.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert (folder / "0.svs").exists()
