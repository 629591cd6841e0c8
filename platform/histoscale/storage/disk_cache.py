"""A node-local cache of small pieces of objects, shared by all processes of the node, encrypted, bounded.

One SQLite database in a folder: runs, trials and readers of one node find what any of them has fetched. What lies on
the disk is encrypted (AES-GCM) under a key that lives with the index and not on the node, and is named by keyed
hashes, so that a disk that leaves the node tells nothing. A cache that cannot be used is no cache: reading goes on
without it.
"""

import contextlib
import hashlib
import hmac
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pieces
    (name BLOB PRIMARY KEY, size INTEGER NOT NULL, used REAL NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS by_use ON pieces (used);
"""
_BUSY_TIMEOUT_S = 5.0
_NONCE_BYTES = 12
_EVICT_TO = 0.9  # of the bound: evicting a little for every piece would cost a scan each time
_CHECK_BYTES = 32 * 2**20  # the size of the cache is looked at after so many new bytes
_AT_ONCE = 500  # names in one query; SQLite takes 999


class DiskCache:
    """Pieces of objects by name; several threads and processes may use one folder.

    Args:
        folder: On a disk of this node; made for its owner only.
        max_bytes: Bound of the folder, whoever writes.
        secret: What the pieces are encrypted and named under.
    """

    def __init__(self, folder: Path, max_bytes: int, secret: bytes) -> None:
        self._path = folder / "pieces.sqlite"
        self._max_bytes = max_bytes
        self._naming = hmac.digest(secret, b"names of cached pieces", "sha256")
        self._cipher = AESGCM(hmac.digest(secret, b"contents of cached pieces", "sha256"))
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._unchecked_bytes = 0
        self._told = False
        self.hits = 0
        """Pieces that were found."""

    def get(self, names: Sequence[str]) -> dict[str, bytes]:
        """Those of the named pieces that are here and whole."""
        by_hash = {self._hash(name): name for name in names}
        found: dict[str, bytes] = {}

        def look(database: sqlite3.Connection) -> None:
            for hashed, data in _rows(database, list(by_hash)):
                with contextlib.suppress(InvalidTag):  # torn, or written under another key
                    found[by_hash[hashed]] = self._cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], hashed)
            used = [(time.time(), self._hash(name)) for name in found]
            database.executemany("UPDATE pieces SET used = ? WHERE name = ?", used)

        self._with_database(look)
        self.hits += len(found)
        return found

    def put(self, pieces: Mapping[str, bytes]) -> None:
        """Keep pieces; the least recently used make room."""
        now = time.time()
        rows = []
        for name, data in pieces.items():
            hashed, nonce = self._hash(name), os.urandom(_NONCE_BYTES)
            rows.append((hashed, len(data), now, nonce + self._cipher.encrypt(nonce, data, hashed)))

        def keep(database: sqlite3.Connection) -> None:
            database.executemany("INSERT OR REPLACE INTO pieces VALUES (?, ?, ?, ?)", rows)
            self._unchecked_bytes += sum(row[1] for row in rows)
            if self._unchecked_bytes >= min(_CHECK_BYTES, self._max_bytes // 10):
                self._unchecked_bytes = 0
                self._evict(database)

        self._with_database(keep)

    def _evict(self, database: sqlite3.Connection) -> None:
        (held_bytes,) = database.execute("SELECT coalesce(sum(size), 0) FROM pieces").fetchone()
        if held_bytes <= self._max_bytes:
            return
        surplus = held_bytes - int(self._max_bytes * _EVICT_TO)
        doomed = []
        for name, size in database.execute("SELECT name, size FROM pieces ORDER BY used"):
            if surplus <= 0:
                break
            doomed.append((name,))
            surplus -= size
        database.executemany("DELETE FROM pieces WHERE name = ?", doomed)

    def _hash(self, name: str) -> bytes:
        return hmac.digest(self._naming, name.encode(errors="surrogateescape"), hashlib.sha256)[:20]

    def _with_database(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Work in one transaction; a fault of the database costs only the cache."""
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = self._open()
                with self._connection as database:
                    work(database)
            except (sqlite3.Error, OSError) as error:
                if not self._told:
                    _log.warning("the node-local cache cannot be used: %s", type(error).__name__)
                self._told = True

    def _open(self) -> sqlite3.Connection:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=OFF")  # a cache that a power cut tears is only fetched again
        connection.executescript(_SCHEMA)
        return connection


def _rows(database: sqlite3.Connection, hashes: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    for first in range(0, len(hashes), _AT_ONCE):
        some = hashes[first : first + _AT_ONCE]
        query = f"SELECT name, data FROM pieces WHERE name IN ({','.join('?' * len(some))})"
        yield from database.execute(query, some).fetchall()
