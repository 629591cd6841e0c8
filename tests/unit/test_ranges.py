"""Ranges of files, what is asked of every reader, and the rules of trying again."""

import multiprocessing
import os
import pickle
import random
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    CredentialRetrievalError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from obstore import exceptions

from histoscale.errors import StorageError
from histoscale.storage import open_store, ranges_local, ranges_retry, s3_errors
from histoscale.storage.ranges import ObjectChanged, RangeRequest, RangeStats, open_ranges
from histoscale.storage.ranges_s3 import S3Ranges

DATA = random.Random(0).randbytes(100_000)
ENDPOINT = "http://host:1"


def put(root: Path, key: str, data: bytes) -> str:
    """Write an object; returns its ETag."""
    store = open_store(root)
    store.put(key, data)
    return next(info.etag for info in store.list() if info.key == key)


def descriptors_of(root: Path) -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith(str(root)) for link in links if os.path.lexists(link))


def test_ranges_come_back_in_order_and_as_long_as_asked(tmp_path: Path) -> None:
    first, second = put(tmp_path, "a b/ö+%20.svs", DATA), put(tmp_path, "other", DATA[::-1])
    reader = open_ranges(tmp_path)
    requests = [
        RangeRequest("other", 10, 5, second),
        RangeRequest("a b/ö+%20.svs", 99_000, 1000, first),
        RangeRequest("other", 0, 100_000, second),
        RangeRequest("a b/ö+%20.svs", 7, 0, first),
        RangeRequest("a b/ö+%20.svs", 0, 1, first),
    ]
    expected = [DATA[::-1][10:15], DATA[99_000:], DATA[::-1], b"", DATA[:1]]
    assert reader.fetch(requests) == expected
    assert reader.submit(requests).result() == expected
    assert reader.fetch([]) == []
    assert reader.stats == RangeStats(requests=10, bytes=2 * (5 + 1000 + 100_000 + 1), retries=0)
    reader.close()


def test_a_file_that_was_replaced_overwritten_cut_or_removed_is_refused(tmp_path: Path) -> None:
    etag = put(tmp_path, "o", DATA)
    with_open_file, reader = open_ranges(tmp_path), open_ranges(tmp_path)
    with_open_file.fetch([RangeRequest("o", 0, 5, etag)])
    new = put(tmp_path, "o", DATA[::-1])
    for each in (with_open_file, reader):
        with pytest.raises(ObjectChanged, match="changed since it was listed"):
            each.fetch([RangeRequest("o", 0, 5, etag)])
        assert each.fetch([RangeRequest("o", 0, 5, new)]) == [DATA[::-1][:5]]
    (tmp_path / "o").write_bytes(DATA[:10])
    for each in (with_open_file, reader):
        with pytest.raises(ObjectChanged, match="changed since it was listed"):
            each.submit([RangeRequest("o", 0, 5, new)]).result()
    (tmp_path / "o").unlink()
    for each in (with_open_file, reader):
        with pytest.raises(ObjectChanged, match="is gone since it was listed"):
            each.fetch([RangeRequest("o", 0, 5, new)])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    etag = put(tmp_path, "o", DATA)
    pread = os.pread

    def overwrite_then_read(descriptor: int, length: int, offset: int) -> bytes:
        with (tmp_path / "o").open("ab") as file:
            file.write(b"more")
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", overwrite_then_read)
    with pytest.raises(ObjectChanged, match="changed since it was listed"):
        open_ranges(tmp_path).fetch([RangeRequest("o", 0, 5, etag)])


def test_pieces_that_arrive_in_parts_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    etag = put(tmp_path, "o", DATA)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: pread(descriptor, min(length, 7), offset))
    assert open_ranges(tmp_path).fetch([RangeRequest("o", 3, 100, etag)]) == [DATA[3:103]]


@pytest.mark.parametrize("start", [99_999, 100_000, 2**40, 2**63 - 2, 2**64])
def test_a_range_past_the_end_is_a_fault_of_the_content(tmp_path: Path, start: int) -> None:
    etag = put(tmp_path, "o", DATA)
    with pytest.raises(ObjectChanged, match="ends before the range"):
        open_ranges(tmp_path).fetch([RangeRequest("o", start, 2, etag)])


@pytest.mark.parametrize("etag", ["other", "", 'a"b', "a\nb", "ä"])
def test_another_etag_is_refused(tmp_path: Path, etag: str) -> None:
    put(tmp_path, "o", DATA)
    with pytest.raises(ObjectChanged, match="changed since it was listed"):
        open_ranges(tmp_path).fetch([RangeRequest("o", 0, 2, etag)])


@pytest.mark.parametrize("key", ["", "..", "../o", "a/../o", "./o", "nul\0", "a//o", "/etc/hostname", "o/"])
def test_keys_cannot_leave_the_root(tmp_path: Path, key: str) -> None:
    (tmp_path / "o").write_bytes(DATA)
    with pytest.raises(StorageError) as caught:
        open_ranges(tmp_path).fetch([RangeRequest(key, 0, 2, "etag")])
    assert not isinstance(caught.value, ObjectChanged)


@pytest.mark.parametrize(("start", "length"), [(-1, 5), (0, -1)])
def test_impossible_ranges_are_refused(tmp_path: Path, start: int, length: int) -> None:
    with pytest.raises(StorageError, match="impossible range"):
        open_ranges(tmp_path).fetch([RangeRequest("o", start, length, put(tmp_path, "o", DATA))])


def test_no_error_and_no_repr_shows_a_key(tmp_path: Path) -> None:
    etag = put(tmp_path, "S24-01234.svs", DATA)
    (tmp_path / "S24-folder").mkdir()
    reader = open_ranges(tmp_path)
    assert "S24" not in repr(RangeRequest("S24-01234.svs", 0, 5, etag))
    for key in ("S24-01234.svs", "S24-gone.svs", "../S24", "S24//", "S24-01234.svs/below", "S24-folder", "S24" * 200):
        with pytest.raises(StorageError) as caught:
            reader.fetch([RangeRequest(key, 0, 5, "other")])
        assert "S24" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert caught.value.__cause__ is None


def test_the_first_error_is_the_whole_result(tmp_path: Path) -> None:
    etag = put(tmp_path, "o", DATA)
    good, bad = RangeRequest("o", 0, 5, etag), RangeRequest("o", 0, 5, "other")
    with pytest.raises(ObjectChanged):
        open_ranges(tmp_path).submit([good, bad, good]).result()


def test_files_stay_open_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges_local, "_OPEN_FILES", 3)
    requests = [RangeRequest(f"o{i}", 0, 5, put(tmp_path, f"o{i}", DATA[i:])) for i in range(9)]
    reader = open_ranges(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            assert list(pool.map(lambda request: reader.fetch([request])[0], requests)) == [
                DATA[i : i + 5] for i in range(9)
            ]
            assert descriptors_of(tmp_path) <= 3
    assert reader.fetch(requests) == [DATA[i : i + 5] for i in range(9)]
    assert descriptors_of(tmp_path) == 3
    put(tmp_path, "o8", DATA)
    with pytest.raises(ObjectChanged):
        reader.fetch(requests[8:])
    assert descriptors_of(tmp_path) == 3
    reader.close()
    reader.close()
    assert descriptors_of(tmp_path) == 0


def test_a_closed_reader_cancels_what_waits_and_refuses_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = RangeRequest("o", 0, 5, put(tmp_path, "o", DATA))
    reader = open_ranges(tmp_path, in_flight=1)
    reading, go_on = threading.Event(), threading.Event()
    pread = os.pread

    def read_late(descriptor: int, length: int, offset: int) -> bytes:
        reading.set()
        go_on.wait()
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", read_late)
    under_way, waiting = reader.submit([request]), reader.submit([request])
    reading.wait()
    closing = threading.Thread(target=reader.close)
    closing.start()
    with pytest.raises(CancelledError):
        waiting.result()
    go_on.set()
    closing.join()
    assert under_way.result() == [DATA[:5]]
    assert descriptors_of(tmp_path) == 0
    for use in (reader.submit, reader.fetch):
        with pytest.raises(StorageError, match="is closed"):
            use([request])


def test_a_reader_travels_between_processes_but_not_through_a_fork(tmp_path: Path) -> None:
    request = RangeRequest("o", 0, 5, put(tmp_path, "o", DATA))
    reader = open_ranges(tmp_path)
    copy, request = pickle.loads(pickle.dumps((reader, request)))
    assert copy.fetch([request]) == reader.fetch([request]) == [DATA[:5]]
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def use() -> None:
        try:
            reader.fetch([request])
        except StorageError as error:
            sender.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=use)
    process.start()
    process.join()
    assert "forked" in receiver.recv()


def test_a_reader_needs_a_store_and_room(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no store has the URI"):
        open_ranges("gs://bucket")
    with pytest.raises(StorageError, match="room for a read"):
        open_ranges(tmp_path, in_flight=0)


def refused(code: str, status: int) -> ClientError:
    return ranges_retry.refusal(code, status)


TRANSIENT: list[Any] = [
    *(refused(str(status), status) for status in (408, 429, 500, 502, 503, 504)),
    refused("SlowDown", 503),
    refused("RequestTimeout", 400),
    refused("ExpiredToken", 400),
    EndpointConnectionError(endpoint_url=ENDPOINT),
    ConnectionClosedError(endpoint_url=ENDPOINT),
    ReadTimeoutError(endpoint_url=ENDPOINT),
    IncompleteReadError(actual_bytes=1, expected_bytes=2),
    CredentialRetrievalError(provider="p", error_msg="m"),
]
FINAL: list[Any] = [
    *(
        refused(code, status)
        for code, status in [("NoSuchKey", 404), ("PreconditionFailed", 412), ("InvalidRange", 416)]
    ),
    *(refused(str(status), status) for status in (301, 400, 403, 404, 412, 416, 501)),
    refused("SignatureDoesNotMatch", 403),
    NoCredentialsError(),
    SSLError(endpoint_url=ENDPOINT, error=ValueError()),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_may_pass_is_tried_again_within_bounds(error: ClientError | BotoCoreError) -> None:
    assert ranges_retry.may_try_again(error, 1, 0.0)
    assert ranges_retry.may_try_again(error, ranges_retry.TRIES - 1, ranges_retry.TOTAL_S - 1)
    assert not ranges_retry.may_try_again(error, ranges_retry.TRIES, 0.0)
    assert not ranges_retry.may_try_again(error, 1, ranges_retry.TOTAL_S)


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_stays_is_not_tried_again(error: ClientError | BotoCoreError) -> None:
    assert not ranges_retry.may_try_again(error, 1, 0.0)


def test_pauses_grow_outlast_twenty_seconds_and_end_within_a_minute() -> None:
    longest = [ranges_retry.pause_s(failures, 1.0) for failures in range(1, ranges_retry.TRIES)]
    assert longest == [0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20.0]
    assert sum(longest) < ranges_retry.TOTAL_S
    assert [ranges_retry.pause_s(3, uniform) for uniform in (0.0, 0.25, 0.5)] == pytest.approx([0.8, 1.0, 1.2])
    assert sum(ranges_retry.pause_s(failures, 0.0) for failures in range(1, ranges_retry.TRIES)) > 20.0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError("Object at location S24 not found: <Code>NoSuchKey</Code>"), "NoSuchKey"),
        (FileNotFoundError("Object at location S24 not found: <Code>NoSuchBucket</Code>"), "NoSuchBucket"),
        (FileNotFoundError("Object at location Server returned non-2xx status code: 503 not found"), "NoSuchKey"),
        (exceptions.PreconditionError("Server returned non-2xx status code: 412"), "PreconditionFailed"),
        (exceptions.GenericError("Server returned non-2xx status code: 503 Slow"), "503"),
        (exceptions.GenericError("Server returned non-2xx status code: 503 Slow <Code>SlowDown</Code>"), "SlowDown"),
        (exceptions.PermissionDeniedError("non-2xx status code"), ""),
    ],
)
def test_the_words_of_obstore_become_those_of_boto3(error: Exception, code: str) -> None:
    translated = ranges_retry.in_boto_terms(error, ENDPOINT)
    assert s3_errors.code(translated) == code
    assert "S24" not in str(translated)


@pytest.mark.parametrize(
    "error", [IncompleteReadError(actual_bytes=1, expected_bytes=2), ResponseStreamingError(error="")]
)
def test_answers_that_keep_breaking_off_may_pass_by_themselves(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    diagnosis = S3Ranges("bucket", "p", 1)._diagnosis(error, 8)
    assert "broke off 8 times" in str(diagnosis)
    assert diagnosis.transient
