"""Stands in for memcached, within the proxy's one process: it remembers which accounts and buckets exist."""

import time
from collections.abc import Callable, Iterable
from typing import Any

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class MemoryCache:
    """The part of Swift's memcached client that its proxy and its S3 API call."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[float, Any]] = {}

    def get(self, key: str, **_: object) -> Any:
        expiry_s, value = self._values.get(key, (0.0, None))
        return value if expiry_s > time.time() else None

    def set(self, key: str, value: Any, time: int = 0, **_: object) -> None:
        self._values[key] = (_expiry_s(time), value)

    def delete(self, key: str, **_: object) -> None:
        self._values.pop(key, None)


def _expiry_s(lifetime_s: int) -> float:
    return time.time() + lifetime_s if lifetime_s else float("inf")


def filter_factory(_: dict[str, str], **__: str) -> Callable[[App], App]:
    """Entry point that `proxy.conf.in` names."""
    cache = MemoryCache()

    def wrap(app: App) -> App:
        def call(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            environ["swift.cache"] = cache
            return app(environ, start_response)

        return call

    return wrap
