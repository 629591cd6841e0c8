"""Stores without a server: URIs, the folder's own behaviour, and S3's refusals replayed."""

import contextlib
import errno
import io
import os
import random
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    DataNotFoundError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
    SSLError,
)
from botocore.response import StreamingBody
from botocore.stub import Stubber

from histoscale.errors import StorageError
from histoscale.storage import is_remote, join, open_store, s3, s3_errors
from histoscale.storage.joined import joined
from histoscale.storage.local import LocalStore, atomic_file


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def test_uris_name_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("s3://b/p/q/").uri == "s3://b/p/q"
    assert open_store("s3://b").uri == "s3://b"
    assert open_store("runs/one").uri == str(tmp_path / "runs" / "one")
    assert open_store(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a b"
    assert open_store(Path("/")).uri == "/"
    for uri in ("s3://b/p", "/a/b"):
        assert open_store(open_store(uri).uri).uri == uri


@pytest.mark.parametrize("uri", ["gs://b/p", "http://host/b", "file://host/share", "s3://", "s3:///p", "", "\0"])
def test_other_uris_are_refused_with_what_is_expected(uri: str) -> None:
    with pytest.raises(StorageError, match=r"expected s3://bucket/prefix"):
        open_store(uri)


def test_refused_private_uris_are_not_shown_in_full() -> None:
    with pytest.raises(StorageError) as caught:
        open_store("gs://bucket/S24-0123", private=True)
    assert "S24" not in str(caught.value)


def test_join_and_is_remote() -> None:
    assert join("s3://b/p/", "a/", "/c.json") == "s3://b/p/a/c.json"
    assert join(Path("/"), "a") == "/a"
    assert is_remote("s3://b")
    assert not is_remote(Path("s3/b"))


def test_listing_follows_links_but_no_loop(store: LocalStore, tmp_path: Path) -> None:
    store.put("a/b/file", b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "slide").write_bytes(b"xy")
    root = Path(store.uri)
    (root / "a" / "up").symlink_to(root)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "broken").symlink_to(root / "none")
    (root / "self").symlink_to(root / "self")
    os.mkfifo(root / "pipe")
    assert [info.key for info in store.list()] == ["a/b/file", "linked/slide"]
    store.delete_prefix("linked")
    assert (tmp_path / "elsewhere" / "slide").exists()


def test_a_failed_write_leaves_the_old_object_and_nothing_else(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("o", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk or quota is full"):
        store.put("o", b"new")
    with pytest.raises(StorageError, match="the disk or quota is full"):
        store.put_if_absent("p", b"new")
    assert os.listdir(store.uri) == ["o"]
    assert store.get("o") == b"old"


def test_parts_of_memory_read_like_one_file() -> None:
    parts = [b"", b"abc", bytes(range(256)) * 100, b"", b"z"]
    whole = b"".join(parts)
    file = joined([memoryview(part) for part in parts])
    assert file.read() == whole
    assert file.seek(0, io.SEEK_END) == len(whole)
    draws = random.Random(0)
    for _ in range(50):
        start, length = draws.randrange(len(whole) + 10), draws.randrange(30_000)
        assert file.seek(start) == file.tell() == start
        assert file.read(length) == whole[start : start + length]
    file.seek(10)
    assert file.seek(-4, io.SEEK_CUR) == 6
    assert joined([]).read() == b""


def test_unfinished_writes_are_not_listed(store: LocalStore) -> None:
    store.put("done", b"")
    with atomic_file(Path(store.uri) / "other", 0o600) as file:
        file.write(b"half")
        assert [info.key for info in store.list()] == ["done"]
        assert len(os.listdir(store.uri)) == 2
    assert store.get("other") == b"half"


def test_readers_never_see_half_an_object(store: LocalStore) -> None:
    whole = [bytes([value]) * 200_000 for value in range(8)]
    store.put("o", whole[0])
    done = threading.Event()
    seen = []

    def read() -> None:
        while not done.is_set():
            seen.append(store.get("o"))

    reader = threading.Thread(target=read)
    reader.start()
    for data in whole:
        store.put("o", data)
    done.set()
    reader.join()
    assert seen
    assert set(seen) <= set(whole)


@pytest.mark.parametrize(("private", "file_mode", "folder_mode"), [(True, 0o600, 0o700), (False, 0o640, 0o750)])
def test_private_files_are_for_their_owner(tmp_path: Path, private: bool, file_mode: int, folder_mode: int) -> None:
    before = os.umask(0o027)
    try:
        store = LocalStore(tmp_path / "root", private=private)
        store.put("folder/put", b"x")
        store.put_if_absent("folder/once", b"x")
        store.upload(tmp_path / "root" / "folder" / "put", "folder/upload")
    finally:
        os.umask(before)
    folder = tmp_path / "root" / "folder"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {file_mode}
    assert stat.S_IMODE(folder.stat().st_mode) == folder_mode


def test_without_hard_links_put_if_absent_still_writes_once(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert store.put_if_absent("o", b"first")
    assert not store.put_if_absent("o", b"second")
    assert store.get("o") == b"first"
    assert [info.key for info in store.list()] == ["o"]


def test_a_file_where_a_folder_should_be_is_diagnosed(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"")
    with pytest.raises(StorageError, match="not a directory") as caught:
        list(store.list())
    assert str(tmp_path / "root") in str(caught.value)
    with pytest.raises(StorageError, match="expected folders where the URI and the key have slashes"):
        store.put("o", b"")


def test_keys_with_empty_components_are_refused(store: LocalStore) -> None:
    for key in ("/etc/passwd", "a//b", "a/"):
        with pytest.raises(StorageError, match="empty component"):
            store.get(key)


def test_names_too_long_are_diagnosed(store: LocalStore) -> None:
    with pytest.raises(StorageError, match="too long"):
        store.put("x" * 300, b"")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "give the user that runs this job access"),
        (errno.EROFS, "give the user that runs this job access"),
        (errno.EDQUOT, "the disk or quota is full"),
        (errno.EIO, "check the disk and the mount"),
    ],
)
def test_errors_of_the_operating_system_name_the_root(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(Path, "is_dir", fail)
    Path(store.uri).mkdir()
    for use in (lambda: store.get("o"), lambda: list(store.list()), lambda: list(store.list("a"))):
        with pytest.raises(StorageError, match=f"(?i){words}") as caught:
            use()
        assert store.uri in str(caught.value)


def test_a_link_that_cannot_be_followed_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "slide"

        def stat(self) -> os.stat_result:
            raise PermissionError(errno.EACCES, "Permission denied")

    Path(store.uri).mkdir()
    monkeypatch.setattr(os, "scandir", lambda folder: [Entry()])
    with pytest.raises(StorageError, match="permission denied"):
        list(store.list())


def test_a_file_that_changes_during_its_download_is_refused(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("o", b"before")

    def copy(source: Any, target: Any, _: int) -> None:
        target.write(source.read())
        with (Path(store.uri) / "o").open("ab") as file:
            file.write(b" and after")

    monkeypatch.setattr("histoscale.storage.local.shutil.copyfileobj", copy)
    with pytest.raises(StorageError, match="changed since it was listed"):
        store.download("o", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


# S3's refusals that the test server never makes, replayed through boto3's own parser.


@contextlib.contextmanager
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubber]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    s3._client.cache_clear()
    monkeypatch.setattr(s3, "_CONFLICT_PAUSE_S", 0.0)
    with Stubber(cast(Any, s3.S3Store("bucket", "p")._s3())) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()
    s3._client.cache_clear()


def test_a_conflict_of_conditional_writes_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with replayed(monkeypatch) as stubber:
        stubber.add_client_error("put_object", "ConditionalRequestConflict", http_status_code=409)
        stubber.add_response("put_object", {})
        assert s3.S3Store("bucket", "p").put_if_absent("o", b"")
        stubber.add_client_error("put_object", "ConditionalRequestConflict", http_status_code=409)
        stubber.add_client_error("put_object", "PreconditionFailed", http_status_code=412)
        assert not s3.S3Store("bucket", "p").put_if_absent("o", b"")
        for _ in range(s3._CONFLICT_ATTEMPTS):
            stubber.add_client_error("put_object", "ConditionalRequestConflict", http_status_code=409)
        with pytest.raises(StorageError, match="written by others again and again"):
            s3.S3Store("bucket", "p").put_if_absent("o", b"")


def test_a_server_without_conditional_writes_is_asked_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with replayed(monkeypatch) as stubber:
        stubber.add_client_error("put_object", "NotImplemented", http_status_code=501)
        stubber.add_client_error("head_object", "404", http_status_code=404)
        stubber.add_response("head_bucket", {})
        stubber.add_response("put_object", {}, {"Bucket": "bucket", "Key": "p/o", "Body": b"x"})
        assert s3.S3Store("bucket", "p").put_if_absent("o", b"x")
        stubber.add_client_error("put_object", "NotImplemented", http_status_code=501)
        stubber.add_response("head_object", {"ContentLength": 1, "ETag": '"e"'})
        assert not s3.S3Store("bucket", "p").put_if_absent("o", b"x")
    assert "has no conditional writes" in caplog.text


def test_answers_that_break_off_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(data: bytes) -> dict[str, Any]:
        return {"Body": StreamingBody(cast(Any, io.BytesIO(data)), 5)}

    with replayed(monkeypatch) as stubber:
        stubber.add_response("get_object", body(b"hel"))
        stubber.add_response("get_object", body(b"hello"))
        assert s3.S3Store("bucket", "p").get("o") == b"hello"
        for _ in range(s3._BODY_ATTEMPTS):
            stubber.add_response("get_object", body(b"hel"))
        with pytest.raises(StorageError, match=r"'o' of s3://bucket/p broke off 4 times") as caught:
            s3.S3Store("bucket", "p").get("o")
    assert caught.value.transient


def test_a_download_shorter_than_its_listing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with replayed(monkeypatch) as stubber:
        stubber.add_response("head_object", {"ContentLength": 10, "ETag": '"e"'})
        stubber.add_response("get_object", {"Body": StreamingBody(cast(Any, io.BytesIO(b"short")), 5)})
        with pytest.raises(StorageError, match="changed since it was listed"):
            s3.S3Store("bucket", "p").download("o", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("code", "transient"), [("AccessDenied", False), ("InternalError", True), ("SlowDown", True)])
def test_objects_of_a_batch_that_cannot_be_deleted_are_counted(
    monkeypatch: pytest.MonkeyPatch, code: str, transient: bool
) -> None:
    with replayed(monkeypatch) as stubber:
        entry = {"Key": "p/a/b", "Size": 1, "ETag": '"e"'}
        stubber.add_response("list_objects_v2", {"Contents": [entry], "IsTruncated": False})
        stubber.add_response("delete_objects", {"Errors": [{"Key": "p/a/b", "Code": code}]})
        with pytest.raises(StorageError, match=rf"1 objects of s3://bucket/p cannot be deleted \(got '{code}'\)") as it:
            s3.S3Store("bucket", "p").delete_prefix("a")
    assert it.value.transient is transient


def test_aws_keeps_its_host_per_bucket_and_other_servers_get_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    aws = cast(Any, open_store("s3://bucket/p"))._s3()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://localhost:9000")
    other = cast(Any, open_store("s3://bucket/p"))._s3()
    assert (aws.meta.config.s3 or {}).get("addressing_style") != "path"
    assert other.meta.config.s3["addressing_style"] == "path"
    assert other is cast(Any, open_store("s3://other"))._s3()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("AWS_ENDPOINT_URL", "localhost", "AWS_ENDPOINT_URL, where set"), ("AWS_PROFILE", "nobody", "set AWS_PROFILE")],
)
def test_settings_that_boto3_cannot_use_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=f"(?i)s3://bucket/p cannot be reached.*{words}"):
        open_store("s3://bucket/p").get("o")


def refusal(code: str, status: int = 400) -> ClientError:
    answer = {"Error": {"Code": code, "Message": "S24-0123"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(cast(Any, answer), "GetObject")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refusal("NoSuchBucket"), "bucket 'bucket' does not exist"),
        (refusal("AccessDenied"), "access to s3://bucket/p is denied"),
        (refusal("403"), "allow s3:ListBucket"),
        (refusal("ExpiredToken"), "refuses the AWS credentials"),
        (refusal("SlowDown"), "use fewer readers"),
        (refusal("InsufficientStorage"), "no room left"),
        (refusal("RequestTimeTooSkewed"), "synchronise the clocks"),
        (refusal("InternalError"), "refuses a request to s3://bucket/p"),
        (NoCredentialsError(), "there are no AWS credentials"),
        (ParamValidationError(report="S24-0123"), "no valid bucket"),
        (SSLError(endpoint_url="https://h/S24-0123", error=OSError()), "AWS_CA_BUNDLE"),
        (EndpointConnectionError(endpoint_url="https://h/S24-0123"), "https://h cannot be reached"),
        (ReadTimeoutError(endpoint_url="https://h/S24-0123"), "https://h cannot be reached"),
        (DataNotFoundError(data_path="x"), "boto3 cannot use s3://bucket/p"),
    ],
)
def test_every_failure_of_boto3_has_a_diagnosis_without_the_key(error: Any, words: str) -> None:
    text = str(s3_errors.diagnosis(error, "bucket", "s3://bucket/p", "https://h"))
    assert words.lower() in text.lower()
    assert "S24" not in text


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (EndpointConnectionError(endpoint_url="https://h"), True),
        (ConnectionClosedError(endpoint_url="https://h"), True),
        (ReadTimeoutError(endpoint_url="https://h"), True),
        (ConnectTimeoutError(endpoint_url="https://h"), True),
        (refusal("SlowDown", 503), True),
        (refusal("429", 429), True),
        (refusal("ThrottlingException"), True),
        (refusal("InternalError", 500), True),
        (refusal("RequestTimeout", 400), True),
        (refusal("524", 524), True),
        (refusal("502", 502), True),
        (refusal("NotImplemented", 501), False),
        (refusal("QuotaExceeded", 507), False),
        (refusal("507", 507), False),
        (refusal("NoSuchBucket", 404), False),
        (refusal("AccessDenied", 403), False),
        (refusal("ExpiredToken", 400), False),
        (refusal("RequestTimeTooSkewed", 403), False),
        (refusal("EntityTooLarge", 400), False),
        (NoCredentialsError(), False),
        (SSLError(endpoint_url="https://h", error=OSError()), False),
        (ParamValidationError(report="x"), False),
        (DataNotFoundError(data_path="x"), False),
    ],
)
def test_what_passes_by_itself_is_told_from_what_somebody_must_mend(error: Any, transient: bool) -> None:
    assert s3_errors.diagnosis(error, "bucket", "s3://bucket/p", "https://h").transient is transient
