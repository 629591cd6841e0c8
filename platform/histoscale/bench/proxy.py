"""A server of objects that misbehaves on purpose: a proxy on 127.0.0.1 before a real S3 server.

Signatures hold, for every header of a request passes unchanged, its Host as well: what verifies a request must know it
by the proxy's address, as servers do that look at nothing but the header.
"""

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from urllib.parse import urlsplit

from histoscale import seeding

FAULTS = ("unavailable", "reset", "truncated", "shortened", "delay")
STALLED, GIVEN_UP = "stalled", "given up"
_LOCALHOST = "127.0.0.1"
_HEAD_LIMIT_BYTES = 64 * 1024
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "expect"}
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: closing sends RST
_Headers = dict[str, str]


@contextlib.contextmanager
def faulty_proxy(
    upstream: str, share: float, seed: int, *, kinds: Sequence[str] = FAULTS, delay_s: float = 5.0
) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Run a proxy in a thread of its own; a keyed share of the ranged GETs that reach it goes wrong.

    What happens to the n-th request for a range is a function of the seed, the object, the range and n alone. All that
    is no ranged GET passes. The kinds of faults, drawn evenly:

    * `unavailable`: 503 SlowDown
    * `reset`: the connection is reset instead of an answer
    * `truncated`: half of the body, then the end of the connection
    * `shortened`: half of the body under a Content-Length of that half
    * `delay`: the right answer, late
    * `stalled`: half of the body, then silence until the client goes; only where it is asked for

    Args:
        upstream: The S3 server, `http://host:port`.
        share: Share of the ranged GETs that go wrong, 0 to 1.
        seed: Of the draws.
        kinds: The faults to draw from.
        delay_s: How late a `delay` is, in seconds.

    Yields:
        The proxy's endpoint, and how many requests were `passed`, went wrong in each way and, of those that stalled,
        were `given up` so far.
    """
    proxy = _Proxy(upstream, _KeyedDraws(share, seed, kinds).draw, delay_s)
    with _running(proxy) as endpoint:
        yield endpoint, proxy.counts


class Switch:
    """Makes requests go wrong when it is told to; see `switched_proxy`.

    Attributes:
        endpoint: The proxy's.
        counts: As of `faulty_proxy`.
    """

    def __init__(self, upstream: str) -> None:
        self._proxy = _Proxy(upstream, self._draw, 0.0)
        self._outage: str | None = None
        self._next: list[str] = []
        self.endpoint = ""
        self.counts: Mapping[str, int] = self._proxy.counts

    @contextlib.contextmanager
    def outage(self, kind: str) -> Iterator[None]:
        """While the block lasts every request goes wrong, of whatever method."""
        self._outage = kind
        try:
            yield
        finally:
            self._outage = None

    def spoil(self, kind: str, count: int) -> None:
        """The next `count` ranged GETs go wrong."""
        self._next.extend([kind] * count)

    def _draw(self, name: str | None) -> str | None:
        if self._outage is None and name is not None and self._next:
            return self._next.pop()
        return self._outage


@contextlib.contextmanager
def switched_proxy(upstream: str) -> Iterator[Switch]:
    """Run a proxy in a thread of its own that passes everything on until it is switched.

    Args:
        upstream: The S3 server, `http://host:port`.
    """
    switch = Switch(upstream)
    with _running(switch._proxy) as switch.endpoint:
        yield switch


@contextlib.contextmanager
def _running(proxy: "_Proxy") -> Iterator[str]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="faulty-proxy", daemon=True)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(proxy.start(), loop).result()
    finally:
        asyncio.run_coroutine_threadsafe(proxy.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class _KeyedDraws:
    """A keyed share of the ranged GETs goes wrong."""

    def __init__(self, share: float, seed: int, kinds: Sequence[str]) -> None:
        self._share = share
        self._seed = seed
        self._kinds = kinds
        self._seen: Counter[str] = Counter()

    def draw(self, name: str | None) -> str | None:
        """What goes wrong with the next request of this name; None: nothing."""
        if name is None:
            return None
        self._seen[name] += 1
        word = seeding.key(self._seed, "proxy", name, self._seen[name])
        if (word >> 32) >= self._share * 2**32:
            return None
        return self._kinds[(word & 0xFFFFFFFF) % len(self._kinds)]


class _Proxy:
    """Passes requests on, or spoils them.

    Args:
        upstream: The S3 server.
        draw: What goes wrong with a request, given the name of the object and the range, or None where it is no GET of
            a range.
        delay_s: How late a `delay` is.
    """

    def __init__(self, upstream: str, draw: Callable[[str | None], str | None], delay_s: float) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or _LOCALHOST, parts.port or 80)
        self._draw = draw
        self._delay_s = delay_s
        self.counts: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, _LOCALHOST, 0, limit=_HEAD_LIMIT_BYTES, backlog=512)
        return f"http://{_LOCALHOST}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection, one after the other."""
        try:
            # A client that leaves, or an upstream that does, ends the connection and nothing else.
            with contextlib.suppress(OSError, EOFError):
                while await self._answer(reader, writer):
                    await writer.drain()
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False where the connection is to end."""
        request, headers = await _read_head(reader)
        if "100-continue" in headers.get("expect", "").lower():
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, target, _ = request.split(" ", 2)
        fault = self._draw(f"{target} {headers['range']}" if method == "GET" and "range" in headers else None)
        self.counts[fault or "passed"] += 1
        if fault == "unavailable":
            head = _render("HTTP/1.1 503 Slow Down", {"content-length": str(len(_SLOW_DOWN))})
            writer.write(head if method == "HEAD" else head + _SLOW_DOWN)
            return True
        if fault == "reset":
            _reset(writer)
            return False
        if fault == "delay":
            await asyncio.sleep(self._delay_s)
        status, answer_headers, answer = await self._ask(f"{method} {target} HTTP/1.0", headers, body)
        if method != "HEAD":  # its answer has the length of a body that does not follow
            answer_headers["content-length"] = str(len(answer) // (2 if fault == "shortened" else 1))
        kept = len(answer) // 2 if fault in ("truncated", "shortened", STALLED) else len(answer)
        writer.write(_render(status, answer_headers) + answer[:kept])
        if fault == STALLED:
            await writer.drain()
            await reader.read(1)
            self.counts[GIVEN_UP] += 1
            return False
        return fault != "truncated" and headers.get("connection", "").lower() != "close"

    async def _ask(self, request: str, headers: _Headers, body: bytes) -> tuple[str, _Headers, bytes]:
        """Pass a request on, over a connection of its own: in HTTP/1.0 the answer ends where the connection does."""
        reader, writer = await asyncio.open_connection(*self._upstream, limit=_HEAD_LIMIT_BYTES)
        try:
            writer.write(_render(request, headers) + body)
            status, answer_headers = await _read_head(reader)
            return f"HTTP/1.1 {status.split(' ', 1)[1]}", answer_headers, await reader.read()
        finally:
            writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, _Headers]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    return first, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


def _render(first: str, headers: _Headers) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers.items() if name not in _HOP_BY_HOP)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    writer.transport.abort()
