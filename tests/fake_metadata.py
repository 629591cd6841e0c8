"""A stand-in for the metadata service of an EC2 instance, on 127.0.0.1."""

import contextlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeMetadataServer:
    """Not AWS: a fake IMDSv2 that hands out tokens, refuses old ones, and can be slow or odd."""

    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    token: str = "token-1"
    token_status: int = 200
    delay_s: float = 0.0
    tokens_given: int = 0
    lives: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                fake.tokens_given += 1
                fake.lives.append(self.headers["X-aws-ec2-metadata-token-ttl-seconds"])
                self.reply(fake.token_status, fake.token.encode())

            def do_GET(self) -> None:
                time.sleep(fake.delay_s)
                if self.headers["X-aws-ec2-metadata-token"] != fake.token:
                    self.reply(401, b"")
                else:
                    self.reply(*fake.answers.get(self.path, (404, b"")))

            def reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # nobody waits for a slow answer
                    self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=lambda: self.server.serve_forever(poll_interval=0.01), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def announce(self, path: str, fields: object) -> None:
        self.answers[path] = (200, json.dumps(fields).encode())
