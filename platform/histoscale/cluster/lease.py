"""One driver a run folder: a lease with a heartbeat, judged by what it does and never by anybody's clock.

`lease.json` holds who has the run, and a counter that goes up every few seconds. A newcomer that sees the counter
move knows that the holder lives; one that sees it stand still for long enough takes the lease over.
"""

import json
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from histoscale.errors import RunError, StorageError
from histoscale.storage import Store

HEARTBEAT_S = 2.0
DEAD_AFTER_S = 12.0
_KEY = "lease.json"


@dataclass(frozen=True)
class LeaseState:
    """Who holds a run folder, and the beat of its heart."""

    holder: str
    token: str
    beat: int


class Lease:
    """Hold a run folder for as long as the `with` block lasts.

    Args:
        store: The run folder.
        holder: What to call the holder in front of others: the submission id of its job.
        heartbeat_s: Seconds between two beats.
        dead_after_s: Seconds without a beat after which a holder counts as dead.

    Raises:
        RunError: On entering, where another living job holds the run.
    """

    def __init__(
        self, store: Store, holder: str, heartbeat_s: float = HEARTBEAT_S, dead_after_s: float = DEAD_AFTER_S
    ) -> None:
        self._store = store
        self._state = LeaseState(holder, uuid.uuid4().hex, 0)
        self._heartbeat_s = heartbeat_s
        self._dead_after_s = dead_after_s
        self._stopping = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether another job has taken the lease over (after this one stood still for too long)."""
        return self._lost.is_set()

    def __enter__(self) -> Self:
        if not self._store.put_if_absent(_KEY, _encode(self._state)):
            self._wait_for_a_dead_holder()
            self._store.put(_KEY, _encode(self._state))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        state = read_lease(self._store)
        if state is not None and state.token == self._state.token:
            self._store.delete(_KEY)

    def _wait_for_a_dead_holder(self) -> None:
        seen = read_lease(self._store)
        deadline_s = time.monotonic() + self._dead_after_s
        while seen is not None and time.monotonic() < deadline_s:
            time.sleep(min(self._heartbeat_s, 0.5))
            now = read_lease(self._store)
            if now is not None and now != seen:
                raise RunError(
                    f"run {self._store.uri} is held by {now.holder}",
                    expected="one job a run folder",
                    remedy=f"follow that job with `ray job logs --follow {now.holder}`, or stop it with"
                    f" `ray job stop {now.holder}` and run this command again",
                )
            if now is None:
                return

    def _beat(self) -> None:
        while not self._stopping.wait(self._heartbeat_s):
            try:
                found = read_lease(self._store)
                if found is not None and found.token != self._state.token:
                    self._lost.set()
                    return
                self._state = LeaseState(self._state.holder, self._state.token, self._state.beat + 1)
                self._store.put(_KEY, _encode(self._state))
            except StorageError:
                continue  # a storage that fails for longer than DEAD_AFTER_S loses the lease, which the next beat sees


def read_lease(store: Store) -> LeaseState | None:
    """Who holds the run folder, or None where nobody does."""
    if not store.exists(_KEY):
        return None
    try:
        return LeaseState(**json.loads(store.get(_KEY)))
    except (StorageError, ValueError, TypeError):
        return None  # given back between the two calls, or torn by a crash: either way nobody's


def _encode(state: LeaseState) -> bytes:
    return json.dumps(asdict(state)).encode()
