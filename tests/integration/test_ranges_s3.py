"""Ranges of objects on a real S3 server, through a proxy that misbehaves, and from servers that know less."""

import hashlib
import json
import multiprocessing
import pickle
import random
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from histoscale.bench.proxy import FAULTS, faulty_proxy
from histoscale.errors import StorageError
from histoscale.storage import open_store, ranges_retry, ranges_s3
from histoscale.storage.ranges import ObjectChanged, RangeReader, RangeRequest, RangeStats, open_ranges

DATA = random.Random(0).randbytes(3_000_000)
ETAG = hashlib.md5(DATA, usedforsecurity=False).hexdigest()
DEADLINE_S = 20
KEYS = [
    *(
        "a/x y.svs",
        "ä/ö.svs",
        "日本.svs",
        "e\u0301",
        "😀",
        "a%2Fb",
        "100%",
        "%41",
        "a+b",
        "q?x=1",
        "h#y",
        "back\\slash",
    ),
    *("a//b", "//", "/lead", "trail/", " lead", "trail ", "a/ /b", "...", "a..b", "[x]{y}|^`<>*~'\"", ":@,;=&$!"),
    *("new\nline", "tab\tx", "\r", "\x01", "\x7f", "\x85", "\u2028", "k" * 1000),
]


@pytest.fixture(scope="module")
def bucket(s3_server: Any) -> str:
    """A bucket with the object `p/S24.svs`, which no test changes."""
    name: str = s3_server.make_bucket("ranges-of-slides")  # the proxy draws by the name, so by the same one each time
    s3_server.client.put_object(Bucket=name, Key="p/S24.svs", Body=DATA)
    return name


@pytest.fixture
def root(s3_env: Any, bucket: str) -> str:
    return f"s3://{bucket}/p"


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges_retry, "FIRST_PAUSE_S", 0.001)


def some_ranges(count: int) -> list[RangeRequest]:
    draw = random.Random(1)
    return [RangeRequest("S24.svs", draw.randrange(2_900_000), draw.randrange(1, 60_000), ETAG) for _ in range(count)]


def are_right(requests: list[RangeRequest], pieces: list[bytes]) -> bool:
    return pieces == [DATA[request.start : request.start + request.length] for request in requests]


def diagnosis(use: Callable[[], object]) -> str:
    """The text of the StorageError that a use ends in, which says that nothing of the content is wrong."""
    with pytest.raises(StorageError) as caught:
        use()
    assert not isinstance(caught.value, ObjectChanged)
    assert "S24" not in str(caught.value)
    return str(caught.value)


def read_five(reader: RangeReader, key: str = "S24.svs") -> list[bytes]:
    return reader.fetch([RangeRequest(key, 0, 5, ETAG)])


def test_ranges_come_back_in_order_and_as_long_as_asked(root: str) -> None:
    reader = open_ranges(root)
    requests = [*some_ranges(100), RangeRequest("S24.svs", 5, 0, ETAG), RangeRequest("S24.svs", 0, 3_000_000, ETAG)]
    with ThreadPoolExecutor(4) as pool:
        assert all(are_right(requests, pieces) for pieces in pool.map(reader.fetch, [requests] * 4))
    wanted_bytes = sum(request.length for request in requests)
    assert reader.stats == RangeStats(requests=4 * 101, bytes=4 * wanted_bytes, retries=0)
    assert are_right(requests, pickle.loads(pickle.dumps(reader)).fetch(requests))


@pytest.mark.parametrize("prefix", ["", "/p q/ü"])
def test_every_key_of_a_bucket_is_read_as_boto3_reads_it(s3_env: Any, prefix: str) -> None:
    uri = f"s3://{s3_env.make_bucket()}{prefix}"
    store, reader = open_store(uri), open_ranges(uri)
    for key in KEYS:
        store.put(key, key.encode() * 3)
    for key in KEYS:
        body = store.get(key)
        etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
        assert reader.fetch([RangeRequest(key, 1, len(body) - 1, etag)]) == [body[1:]]
        with pytest.raises(ObjectChanged, match="changed since it was listed"):
            reader.fetch([RangeRequest(key, 1, len(body) - 1, ETAG)])
        with pytest.raises(ObjectChanged, match="ends before the range"):
            reader.fetch([RangeRequest(key, 1, len(body), etag)])


@pytest.mark.parametrize("key", ["", "..", "../up", "a/../b", "a/./b"])
def test_keys_that_clients_resolve_are_refused(root: str, key: str) -> None:
    assert "names no object below that root" in diagnosis(lambda: read_five(open_ranges(root), key))


@pytest.mark.parametrize("key", ["o", "o//o"])
def test_an_object_that_is_another_one_or_gone_is_refused_at_once(s3_env: Any, key: str) -> None:
    uri = f"s3://{s3_env.make_bucket()}"
    store, reader = open_store(uri), open_ranges(uri)
    store.put(key, b"old content")
    (info,) = store.list()
    old = RangeRequest(key, 4, 7, info.etag)
    assert reader.fetch([old]) == [b"content"]
    store.put(key, b"new content")
    with pytest.raises(ObjectChanged, match="changed since it was listed") as caught:
        reader.fetch([old])
    assert caught.value.__cause__ is None
    store.delete(key)
    with pytest.raises(ObjectChanged, match="is gone since it was listed"):
        reader.fetch([old, RangeRequest(key, 0, 1, info.etag)])
    assert reader.stats.retries == 0


@pytest.mark.parametrize("start", [2_999_999, 3_000_000, 2**62, 2**64])
def test_a_range_past_the_end_is_a_fault_of_the_content(root: str, start: int) -> None:
    reader = open_ranges(root)
    with pytest.raises(ObjectChanged, match="ends before the range"):
        reader.fetch([RangeRequest("S24.svs", start, 2, ETAG)])
    assert reader.stats.retries == 0


def test_the_first_error_ends_the_other_reads_of_its_batch(root: str) -> None:
    reader = open_ranges(root, in_flight=1)
    with pytest.raises(ObjectChanged):
        reader.fetch([RangeRequest("S24.svs", 0, 5, "another"), *some_ranges(50)])
    assert read_five(reader) == [DATA[:5]]
    assert reader.stats.requests <= 3  # the one that failed, one that had begun, and the last


def test_with_a_third_of_the_answers_wrong_every_byte_is_right(
    s3_env: Any, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = some_ranges(300)
    with faulty_proxy(s3_env.endpoint, 0.3, 1, delay_s=0.2) as (endpoint, counts):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        reader = open_ranges(root)
        assert are_right(requests, reader.fetch(requests))
        wrong = sum(counts[fault] for fault in FAULTS if fault != "delay")
        assert all(counts[fault] for fault in FAULTS)
        assert reader.stats == RangeStats(300 + wrong, sum(request.length for request in requests), wrong)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("unavailable", "is overloaded, after every retry (got 'SlowDown')"),
        ("reset", "cannot be reached"),
        ("truncated", "broke off 8 times while it was read"),
        ("shortened", "broke off 8 times while it was read"),
    ],
)
@pytest.mark.parametrize("key", ["S24.svs", "S24//S24"])
def test_a_server_that_stays_bad_is_diagnosed(
    s3_env: Any, root: str, fault: str, text: str, key: str, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    open_store(root).put("S24//S24", DATA)
    with faulty_proxy(s3_env.endpoint, 1.0, 1, kinds=[fault]) as (endpoint, counts):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        reader = open_ranges(root)
        message = diagnosis(lambda: read_five(reader, key))
    assert text in message
    assert counts == {fault: ranges_retry.TRIES}
    assert reader.stats == RangeStats(ranges_retry.TRIES, 0, ranges_retry.TRIES - 1)


def test_a_server_that_hangs_is_given_up(
    s3_env: Any, root: str, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    monkeypatch.setattr(ranges_s3, "_REQUEST_TIMEOUT_S", 0.2)
    monkeypatch.setattr(ranges_retry, "TRIES", 3)
    with faulty_proxy(s3_env.endpoint, 1.0, 1, kinds=["delay"], delay_s=60) as (endpoint, counts):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert "ReadTimeoutError" in diagnosis(lambda: read_five(open_ranges(root)))
        assert counts == {"delay": 3}


def test_what_is_cancelled_or_closed_ends_at_once(s3_env: Any, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_proxy(s3_env.endpoint, 1.0, 1, kinds=["delay"], delay_s=600) as (endpoint, counts):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        reader = open_ranges(root, in_flight=1)
        first, second, third = (reader.submit(some_ranges(5)) for _ in range(3))
        wait_until(lambda: counts["delay"] == 1)
        assert first.cancel()
        wait_until(lambda: counts["delay"] == 2)
        reader.close()
        reader.close()
        for future in (first, second, third):
            with pytest.raises(CancelledError):
                future.result()
        assert "is closed" in diagnosis(lambda: reader.submit(some_ranges(5)))
        assert counts["delay"] == 2


def test_a_process_can_end_while_it_reads(s3_env: Any, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys\nfrom histoscale.storage.ranges import RangeRequest, open_ranges\n"
        "reader = open_ranges(sys.argv[1])\n"
        "reader.submit([RangeRequest('S24.svs', 0, 5, sys.argv[2])])\n"
        "reader.submit([RangeRequest('S24//S24', 0, 5, sys.argv[2])])"
    )
    with faulty_proxy(s3_env.endpoint, 1.0, 1, kinds=["delay"], delay_s=1) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        command = [sys.executable, "-c", program, root, ETAG]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_forked_process_is_refused(root: str) -> None:
    reader = open_ranges(root)
    assert read_five(reader) == [DATA[:5]]
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def use() -> None:
        for each in (reader, open_ranges(root)):
            try:
                read_five(each)
            except StorageError as error:
                sender.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=use)
    process.start()
    process.join(DEADLINE_S)
    assert ["forked" in receiver.recv() for _ in range(2)] == [True, True]
    assert read_five(reader) == [DATA[:5]]


def test_credentials_are_renewed_while_a_reader_is_open(
    s3_env: Any, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from a program and last for seconds; what it gives later takes the place of what it gave before."""
    current = tmp_path / "current.json"
    program = (
        "import datetime, pathlib\n"
        "end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=5)\n"
        f"print(pathlib.Path({str(current)!r}).read_text().replace('END', end.isoformat()))"
    )
    (tmp_path / "credentials.py").write_text(program)

    def give(secret: str) -> None:
        keys = {"AccessKeyId": s3_env.access_key, "SecretAccessKey": secret}
        current.with_suffix(".new").write_text(json.dumps({"Version": 1, "Expiration": "END", **keys}))
        current.with_suffix(".new").replace(current)

    use_profile(tmp_path, f"credential_process = {sys.executable} {tmp_path / 'credentials.py'}", monkeypatch)
    give(s3_env.secret_key)
    reader = open_ranges(root)
    assert read_five(reader) == [DATA[:5]]
    give("revoked")
    wait_until(lambda: "refuses the AWS credentials" in outcome(reader))
    give(s3_env.secret_key)
    wait_until(lambda: outcome(reader) == "read")


def test_a_program_that_gives_no_credentials_is_diagnosed(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    once = tmp_path / "given"
    keys = '{"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "Expiration": "2020-01-01T00:00:00Z"}'
    (tmp_path / "credentials.sh").write_text(f"test -e {once} && exit 1\ntouch {once}\necho '{keys}'\n")
    use_profile(tmp_path, f"credential_process = sh {tmp_path / 'credentials.sh'}", monkeypatch)
    reader = open_ranges(root)
    assert "there are no AWS credentials" in diagnosis(lambda: read_five(reader))


def test_the_profile_names_server_and_region(
    s3_env: Any, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    keys = f"aws_access_key_id = {s3_env.access_key}\naws_secret_access_key = {s3_env.secret_key}"
    use_profile(tmp_path, f"{keys}\nendpoint_url = {s3_env.endpoint}/\nregion = us-east-1", monkeypatch)
    assert read_five(open_ranges(root)) == [DATA[:5]]


def test_servers_that_cannot_serve_are_diagnosed(
    s3_env: Any, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    assert "'no-such-bucket' does not exist" in diagnosis(lambda: read_five(open_ranges("s3://no-such-bucket")))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert "refuses the AWS credentials" in diagnosis(lambda: read_five(open_ranges(root)))
    with monkeypatch.context() as patch:
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        patch.delenv("AWS_ACCESS_KEY_ID")
        assert "there are no AWS credentials" in diagnosis(lambda: open_ranges(root))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        assert diagnosis(lambda: read_five(open_ranges(root))).startswith("http://127.0.0.1:9 cannot be reached")
        patch.setenv("AWS_ENDPOINT_URL", "nonsense")
        assert "boto3 cannot use the AWS settings" in diagnosis(lambda: open_ranges(root))
    with monkeypatch.context() as patch:
        patch.setenv("AWS_CA_BUNDLE", str(tmp_path / "missing.pem"))
        assert "the certificate authority in AWS_CA_BUNDLE does not exist" in diagnosis(lambda: open_ranges(root))


class _Simple(BaseHTTPRequestHandler):
    """Serves ranges of DATA under any name; its server says how."""

    protocol_version = "HTTP/1.1"
    server: "SimpleServer"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.now += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.now)
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        time.sleep(self.server.pause_s)
        with self.server.lock:
            self.server.now -= 1
        body = DATA[first : last + 1] if self.server.knows_ranges else DATA
        self.server.token = self.headers.get("x-amz-security-token")
        if self.server.refusal:
            return self.refuse(*self.server.refusal)
        self.send_response(206 if self.server.knows_ranges else 200)
        self.send_header("ETag", f'"{self.server.etag}"')
        self.send_header("Last-Modified", "Tue, 24 Nov 2026 17:00:00 GMT")
        if self.server.knows_ranges:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(DATA)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code><Key>S24</Key></Error>".encode() if code else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


class SimpleServer(ThreadingHTTPServer):
    """What it does, and how many requests it had at once."""

    daemon_threads = True
    request_queue_size = 100
    lock = threading.Lock()
    now = most_at_once = 0
    pause_s = 0.0
    knows_ranges = True
    etag = ETAG
    refusal: tuple[int, str] | None = None
    token: str | None = None


@pytest.fixture
def simple_server(s3_env: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleServer]:
    with SimpleServer(("127.0.0.1", 0), _Simple) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_no_more_reads_are_in_flight_than_allowed(simple_server: SimpleServer) -> None:
    simple_server.pause_s = 0.02
    reader = open_ranges("s3://bucket", in_flight=5)
    futures = [reader.submit(some_ranges(20)) for _ in range(5)]
    assert all(are_right(some_ranges(20), future.result()) for future in futures)
    assert simple_server.most_at_once == 5


@pytest.mark.parametrize("key", ["S24.svs", "S24//S24"])
def test_servers_that_ignore_ranges_or_conditions_are_found_out(simple_server: SimpleServer, key: str) -> None:
    reader = open_ranges("s3://bucket")
    assert read_five(reader, key) == [DATA[:5]]
    simple_server.etag = "another"
    with pytest.raises(ObjectChanged, match="changed since it was listed"):
        read_five(reader, key)
    simple_server.knows_ranges = False
    assert "answers a request for a range with the whole object" in diagnosis(lambda: read_five(reader, key))
    assert reader.stats.retries == 0


@pytest.mark.parametrize(
    ("status", "code", "text", "tries"),
    [
        (301, "PermanentRedirect", "lies in another region", 1),
        (301, "", "lies in another region", 1),
        (400, "AuthorizationHeaderMalformed", "refuses the AWS credentials", 1),
        (400, "ExpiredToken", "refuses the AWS credentials", 8),
        (403, "AccessDenied", "is denied", 1),
        (403, "", "is denied", 1),
        (403, "RequestTimeTooSkewed", "the clock of this machine", 1),
        (404, "NoSuchBucket", "does not exist", 1),
        (429, "", "is overloaded, after every retry", 8),
        (500, "InternalError", "refuses a request", 8),
        (501, "NotImplemented", "refuses a request", 1),
        (502, "", "refuses a request", 8),
    ],
)
def test_what_a_server_says_decides_on_another_try(
    simple_server: SimpleServer, status: int, code: str, text: str, tries: int, quick_retries: None
) -> None:
    simple_server.refusal = (status, code)
    reader = open_ranges("s3://bucket")
    assert text in diagnosis(lambda: read_five(reader))
    assert reader.stats == RangeStats(tries, 0, tries - 1)


@pytest.mark.parametrize(("status", "code"), [(404, "NoSuchKey"), (404, ""), (412, ""), (416, "")])
def test_what_a_server_says_of_the_object_is_a_fault_of_the_content(
    simple_server: SimpleServer, status: int, code: str
) -> None:
    simple_server.refusal = (status, code)
    with pytest.raises(ObjectChanged) as caught:
        read_five(open_ranges("s3://bucket"))
    assert "S24" not in str(caught.value)


def test_the_token_of_a_session_is_sent(simple_server: SimpleServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    assert read_five(open_ranges("s3://bucket")) == [DATA[:5]]
    assert simple_server.token == "token"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
@pytest.mark.parametrize("name", ["S24.svs", "S24//S24"])
def test_a_certificate_is_trusted_through_aws_ca_bundle(
    simple_server: SimpleServer, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    extensions = "-addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE"
    command = ["openssl", "req", *options.split(), *extensions.split(), "-keyout", key, "-out", chain]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    simple_server.socket = context.wrap_socket(simple_server.socket, server_side=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://localhost:{simple_server.server_port}")
    assert "is not trusted" in diagnosis(lambda: read_five(open_ranges("s3://bucket"), name))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(chain))
    assert read_five(open_ranges("s3://bucket"), name) == [DATA[:5]]


def test_the_proxy_passes_writes_and_listings_and_keeps_its_seed(
    s3_env: Any, monkeypatch: pytest.MonkeyPatch, quick_retries: None
) -> None:
    uri = f"s3://{s3_env.make_bucket('ranges-through-proxy')}"
    seen = []
    for _ in range(2):
        with faulty_proxy(s3_env.endpoint, 0.3, 7, kinds=["unavailable", "reset"]) as (endpoint, counts):
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            store = open_store(uri)
            store.put("a b/ü+%", DATA)
            assert [(info.key, info.size_bytes) for info in store.list()] == [("a b/ü+%", len(DATA))]
            assert store.exists("a b/ü+%")
            assert store.get("a b/ü+%") == DATA
            assert counts == {"passed": 4}
            requests = [RangeRequest("a b/ü+%", 1000 * i, 1000, ETAG) for i in range(100)]
            open_ranges(uri).fetch(requests)
            seen.append(dict(counts))
    assert seen[0] == seen[1]
    assert seen[0]["passed"] == 104


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outcome(reader: RangeReader) -> str:
    try:
        read_five(reader)
    except StorageError as error:
        return str(error)
    return "read"


def use_profile(folder: Path, settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "config").write_text(f"[profile lab]\n{settings}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
