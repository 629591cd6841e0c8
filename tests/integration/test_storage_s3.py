"""One suite over a folder and over a real S3 server, and what only the server can show."""

import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from histoscale.errors import StorageError
from histoscale.storage import Store, open_store, s3
from histoscale.storage.cache import ObjectCache, local_name

KEYS = ["a.txt", "a/b/deep.txt", "a/x y.txt", "ab/c.txt", "a-b.txt", "ä/ö+%20&=#?.txt", "z"]
OpenStore = Callable[..., Store]


@pytest.fixture(params=["folder", "s3"])
def open_test_store(request: pytest.FixtureRequest, tmp_path: Path) -> OpenStore:
    """Opens a fresh root again and again, with the options that a test wants."""
    if request.param == "folder":
        root = str(tmp_path / "bucket" / "p")
    else:
        root = f"s3://{request.getfixturevalue('s3_env').make_bucket()}/p"
    return lambda below="", **options: open_store(root + below, **options)


@pytest.fixture
def store(open_test_store: OpenStore) -> Store:
    return open_test_store()


@pytest.fixture
def bucket(s3_env: Any) -> str:
    name: str = s3_env.make_bucket()
    return name


@pytest.fixture(scope="module")
def shared_bucket(s3_server: Any) -> str:
    """One bucket for the tests that write nothing."""
    name: str = s3_server.make_bucket()
    return name


def test_what_is_put_is_read_back(store: Store) -> None:
    for key in KEYS:
        store.put(key, key.encode())
    assert [store.get(key) for key in KEYS] == [key.encode() for key in KEYS]
    assert all(store.exists(key) for key in KEYS)
    assert not store.exists("a")
    store.put("z", b"new")
    assert store.get("z") == b"new"


def test_listings_are_sorted_by_whole_key_and_hold_sizes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PAGE_KEYS", 3)
    keys = [f"{random.Random(i).choice(['n', 'n/m', 'n.m', 'n-m'])}{i}" for i in range(11)] + KEYS
    for key in keys:
        store.put(key, b"x" * len(key))
    assert [(info.key, info.size_bytes) for info in store.list()] == [(key, len(key)) for key in sorted(keys)]
    assert len({info.etag for info in store.list()}) > 1


def test_a_prefix_is_a_folder(open_test_store: OpenStore) -> None:
    store = open_test_store()
    for key in KEYS:
        store.put(key, b"x")
    open_test_store("q").put("other-root", b"x")
    assert sorted(info.key for info in store.list()) == sorted(KEYS)
    assert [info.key for info in store.list("a")] == ["a/b/deep.txt", "a/x y.txt"]
    assert list(store.list("a/")) == list(store.list("a"))
    assert list(store.list("z")) == []
    assert list(store.list("nothing")) == []
    assert list(open_test_store("/new").list()) == []
    assert [info.key for info in open_test_store("/a/").list()] == ["b/deep.txt", "x y.txt"]


def test_ranges_end_with_the_object(store: Store) -> None:
    store.put("o", b"0123456789")
    assert store.get_range("o", 0, 4) == b"0123"
    assert store.get_range("o", 3, 1) == b"3"
    assert store.get_range("o", 8, 100) == b"89"
    assert store.get_range("o", 9, 0) == b""
    with pytest.raises(StorageError, match="ends before the range"):
        store.get_range("o", 10, 1)
    with pytest.raises(StorageError, match="impossible range"):
        store.get_range("o", -1, 1)
    with pytest.raises(StorageError, match=r"'no' of .* does not exist"):
        store.get_range("no", 0, 1)


def test_put_if_absent_writes_once(store: Store) -> None:
    assert store.put_if_absent("lease", b"first")
    assert not store.put_if_absent("lease", b"second")
    assert store.get("lease") == b"first"
    store.delete("lease")
    assert store.put_if_absent("lease", b"third")


def test_of_many_writers_at_once_one_wins(store: Store) -> None:
    gate = threading.Barrier(6)

    def write(index: int) -> bool:
        gate.wait()
        return store.put_if_absent("lease", str(index).encode())

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(write, range(6)))
    # Swift looks for the object before it takes the data, so writers that overlap can all be told that they won.
    assert sum(won) == 1 if store.local_path("lease") else any(won)
    assert won[int(store.get("lease"))]


def test_deleting_a_folder_leaves_its_neighbours(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PAGE_KEYS", 2)
    for key in [*KEYS, "a/1", "a/2", "a/3"]:
        store.put(key, b"x")
    store.delete_prefix("a")
    assert sorted(info.key for info in store.list()) == sorted(key for key in KEYS if not key.startswith("a/"))
    store.delete_prefix("a")
    store.delete("z")
    store.delete("z")
    assert not store.exists("z")
    with pytest.raises(StorageError, match="refused to delete everything"):
        store.delete_prefix("/")


def test_download_takes_only_the_version_that_was_listed(store: Store, tmp_path: Path) -> None:
    store.put("slide.svs", b"old")
    (info,) = store.list()
    copy = tmp_path / "copy.svs"
    store.download("slide.svs", copy, info.etag)
    assert copy.read_bytes() == b"old"
    assert copy.stat().st_mode & 0o777 == 0o600
    store.put("slide.svs", b"newer")
    with pytest.raises(StorageError, match="changed since it was listed"):
        store.download("slide.svs", copy, info.etag)
    with pytest.raises(StorageError, match="does not exist"):
        store.download("no", copy)
    assert copy.read_bytes() == b"old"
    store.download("slide.svs", copy)
    assert copy.read_bytes() == b"newer"
    with pytest.raises(StorageError, match=r"a copy in .*missing does not exist"):
        store.download("slide.svs", tmp_path / "missing" / "copy.svs")
    assert sorted(path.name for path in tmp_path.glob("*copy*")) == ["copy.svs"]
    assert not list(tmp_path.glob("*.part"))


def test_large_files_go_in_parts_and_come_back_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PART_BYTES", 3 * 1024**2)
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(random.Random(0).randbytes(s3._TRANSFER.multipart_threshold + 1_000_001))
    store.upload(source, "big/fragment")
    (info,) = store.list("big")
    assert info.size_bytes == source.stat().st_size
    store.download("big/fragment", copy, info.etag)
    assert copy.read_bytes() == source.read_bytes()
    with pytest.raises(StorageError, match="the file to upload"):
        store.upload(tmp_path / "none", "key")


def test_parts_of_memory_become_one_object(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_TRANSFER", s3.TransferConfig(multipart_threshold=6 << 20, multipart_chunksize=5 << 20))
    parts = [random.Random(seed).randbytes(size) for seed, size in enumerate((3, 7 << 20, 0, 5 << 20, 1))]
    store.put_parts("big", [memoryview(part) for part in parts])
    assert store.get("big") == b"".join(parts)
    store.put_parts("small", [memoryview(b"a"), memoryview(b"bc")])
    assert store.get("small") == b"abc"


def test_parts_for_a_bucket_that_is_not_there_are_a_diagnosis(s3_env: Any) -> None:
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        open_store("s3://no-such-bucket/p").put_parts("a", [memoryview(b"a")])


def test_empty_objects_are_objects(store: Store, tmp_path: Path) -> None:
    store.put("empty", b"")
    (info,) = store.list()
    store.download("empty", tmp_path / "empty", info.etag)
    assert (store.get("empty"), info.size_bytes, (tmp_path / "empty").read_bytes()) == (b"", 0, b"")


@pytest.mark.parametrize("key", ["", "..", "../other/x", "a/../../x", "a/./b", "nul\0"])
def test_keys_cannot_leave_the_root(store: Store, key: str) -> None:
    for use in (store.get, store.exists, store.delete, lambda key: store.put(key, b"")):
        with pytest.raises(StorageError, match="names no object below that root"):
            use(key)


def test_private_stores_show_no_key_in_any_error(open_test_store: OpenStore, tmp_path: Path) -> None:
    store = open_test_store(private=True)
    store.put("S24-01234.svs", b"x")
    failures: list[Callable[[], object]] = [
        lambda: store.get("S24-99.svs"),
        lambda: store.get("../S24-99.svs"),
        lambda: store.get_range("S24-01234.svs", 5, 1),
        lambda: store.download("S24-01234.svs", tmp_path / "0.svs", "other"),
        lambda: store.download("S24-99.svs", tmp_path / "0.svs"),
    ]
    for failure in failures:
        with pytest.raises(StorageError) as caught:
            failure()
        assert "S24" not in str(caught.value)
        assert store.uri in str(caught.value)
        assert caught.value.__cause__ is None


def test_stores_travel_between_processes(store: Store) -> None:
    store.put("o", b"x")
    assert pickle.loads(pickle.dumps(store)).get("o") == b"x"


def test_the_cache_holds_copies_of_s3_objects(bucket: str, tmp_path: Path) -> None:
    store = open_store(f"s3://{bucket}/slides", private=True)
    store.put("S24-1/S24-1.svs", b"pixels")
    infos = list(store.list())
    cache = ObjectCache(tmp_path / "cache", 100)
    with cache.lease(store, infos, "id") as folder:
        assert (folder / local_name(0, infos[0].key)).read_bytes() == b"pixels"
        assert [path.name for path in folder.iterdir()] == ["0.svs"]
    cache.close()


def test_the_root_of_a_bucket_is_a_store(s3_env: Any, bucket: str) -> None:
    store = open_store(f"s3://{bucket}")
    store.put("top", b"x")
    s3_env.client.put_object(Bucket=bucket, Key="folder/", Body=b"")
    assert [info.key for info in store.list()] == ["top"]
    assert store.uri == f"s3://{bucket}"
    store.delete_prefix("folder")
    assert s3_env.client.list_objects_v2(Bucket=bucket)["KeyCount"] == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda store, path: list(store.list()),
        lambda store, path: store.get("key"),
        lambda store, path: store.put("key", b"x"),
        lambda store, path: store.put_if_absent("key", b"x"),
        lambda store, path: store.exists("key"),
        lambda store, path: store.delete("key"),
        lambda store, path: store.upload(path, "key"),
        lambda store, path: store.download("key", path.with_name("copy")),
        lambda store, path: store._delete_batch([{"Key": "key"}]),
    ],
)
class TestDiagnoses:
    """Every way to use a store, against servers that cannot serve it."""

    def fails(self, use: Callable[[Store, Path], object], uri: str, tmp_path: Path) -> str:
        (tmp_path / "source").write_bytes(b"x")
        with pytest.raises(StorageError) as caught:
            use(open_store(uri), tmp_path / "source")
        return str(caught.value)

    def test_no_such_bucket(self, use: Any, s3_env: Any, tmp_path: Path) -> None:
        message = self.fails(use, "s3://no-such-bucket/p", tmp_path)
        assert message.startswith("bucket 'no-such-bucket' does not exist")
        assert "AWS_ENDPOINT_URL" in message

    def test_wrong_secret(
        self, use: Any, s3_env: Any, shared_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        message = self.fails(use, f"s3://{shared_bucket}/p", tmp_path)
        assert f"s3://{shared_bucket}/p" in message
        assert "credentials" in message

    def test_no_credentials(
        self, use: Any, s3_env: Any, shared_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        assert "there are no AWS credentials" in self.fails(use, f"s3://{shared_bucket}/p", tmp_path)

    def test_unreachable_endpoint(self, use: Any, tmp_path: Path, s3_env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        message = self.fails(use, "s3://b-b/p", tmp_path)
        assert message.startswith("http://127.0.0.1:9 cannot be reached for s3://b-b/p")
