"""When boto3's requests are tried again: as byte ranges are, and without a budget that an outage spends."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from histoscale.errors import StorageError
from histoscale.storage import open_store, ranges_retry, s3

TRIES = ranges_retry.TRIES


class FlakyServer:
    """Answers requests with what it is told to, in turn, and then with a body; a fake of an S3 server."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers: list[int] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.asked += 1
                status = self.answers.pop(0) if self.answers else 200
                if status:  # else the connection ends without an answer
                    handler.send_response(status)
                    handler.send_header("Content-Length", "5")
                    handler.end_headers()
                    handler.wfile.write(b"hello")

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    flaky = FlakyServer()
    names = {"ENDPOINT_URL": f"http://127.0.0.1:{flaky.server.server_port}", "ACCESS_KEY_ID": "a"}
    for name, value in {**names, "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(ranges_retry, "FIRST_PAUSE_S", 0.0)
    yield flaky
    flaky.server.shutdown()
    flaky.server.server_close()
    s3._client.cache_clear()


@pytest.mark.parametrize("status", [0, 500, 503, 507])
def test_what_may_pass_is_waited_for(server: FlakyServer, status: int) -> None:
    server.answers = [status] * (TRIES - 1)
    assert open_store("s3://bucket/p").get("o") == b"hello"
    assert server.asked == TRIES


@pytest.mark.parametrize("status", [0, 503])
def test_every_request_has_all_its_tries_however_many_failed_before(server: FlakyServer, status: int) -> None:
    for count in range(1, 11):
        server.answers = [status] * TRIES
        with pytest.raises(StorageError):
            open_store("s3://bucket/p").get("o")
        assert server.asked == count * TRIES


def test_a_refusal_is_final_and_the_number_of_tries_can_be_set(
    server: FlakyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [403]
    with pytest.raises(StorageError, match="denied"):
        open_store("s3://bucket/p").get("o")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    server.answers = [503] * 2
    with pytest.raises(StorageError, match="overloaded"):
        open_store("s3://bucket/p").get("o")
    assert server.asked == 3
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(StorageError, match="cannot use the AWS settings"):
        open_store("s3://bucket/p").get("o")
