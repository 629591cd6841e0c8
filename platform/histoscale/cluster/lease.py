"""One driver a run folder: a lease with a heartbeat, judged by what it does and never by anybody's clock.

`lease.json` holds who has the run, and a counter that goes up every few seconds. A newcomer that sees the counter
move knows that the holder lives; one that sees it stand still for long enough takes the lease over. Whose token is in
the file has the run: a holder that finds another's, or none, has lost it, and its workers' commits are refused.
"""

import json
import logging
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from histoscale.errors import RunError, StorageError
from histoscale.storage import Store
from histoscale.storage.store import ObjectChanged

HEARTBEAT_S = 2.0
DEAD_AFTER_S = 12.0
SETTLE_S = 4.0  # longer than a request takes
_KEY = "lease.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeaseState:
    """Who holds a run folder, and the beat of its heart.

    Attributes:
        holder: None where the lease is damaged: its token is then its content, so that it changes as a beat does.
    """

    holder: str | None
    token: str
    beat: int


class Lease:
    """Hold a run folder for as long as the `with` block lasts.

    Args:
        store: The run folder.
        holder: What to call the holder in front of others: the submission id of its job.
        heartbeat_s: Seconds between two beats.
        dead_after_s: Seconds without a beat after which a holder counts as dead.
        settle_s: Seconds until others that took the lease over at the same time have written too.

    Raises:
        RunError: On entering, where another living job holds the run.
        StorageError: On entering, where the lease cannot be read or written.
    """

    def __init__(
        self,
        store: Store,
        holder: str,
        heartbeat_s: float = HEARTBEAT_S,
        dead_after_s: float = DEAD_AFTER_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._store = store
        self._state = LeaseState(holder, uuid.uuid4().hex, 0)
        self._heartbeat_s = heartbeat_s
        self._dead_after_s = dead_after_s
        self._settle_s = settle_s
        self._stopping = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether another job has taken the lease over (after this one stood still for too long)."""
        return self._lost.is_set()

    @property
    def token(self) -> str:
        """What the lease holds for as long as it is this one's; see `require_lease`."""
        return self._state.token

    def __enter__(self) -> Self:
        if not self._store.put_if_absent(_KEY, _encode(self._state)):
            self._succeed()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        try:
            if self._is_ours(read_lease(self._store)):
                self._store.delete(_KEY)
        except StorageError as problem:
            _log.warning(
                "the lease of %s could not be given back, the next job waits until it counts as dead: %s",
                self._store.uri,
                problem,
            )

    def _succeed(self) -> None:
        """Take the lease over once its holder is dead; of several that do so at once, the last to write has it."""
        seen = read_lease(self._store)
        while not self._is_ours(seen):
            self._wait_for_a_dead_holder(seen)
            self._store.put(_KEY, _encode(self._state))
            time.sleep(self._settle_s)
            seen = read_lease(self._store)

    def _wait_for_a_dead_holder(self, seen: LeaseState | None) -> None:
        deadline_s = time.monotonic() + self._dead_after_s
        while seen is not None and time.monotonic() < deadline_s:
            time.sleep(min(self._heartbeat_s, 0.5))
            now = read_lease(self._store)
            if now is None or self._is_ours(now):  # given back, or a write of ours was late
                return
            if now != seen:
                raise _held(self._store, now.holder)

    def _is_ours(self, state: LeaseState | None) -> bool:
        return state is not None and state.token == self.token

    def _beat(self) -> None:
        while not self._stopping.wait(self._heartbeat_s):
            try:
                # One that was given back is lost as well: who has had it meanwhile may have gone on with the run.
                if not self._is_ours(read_lease(self._store)):
                    self._lost.set()
                    return
                self._state = LeaseState(self._state.holder, self._state.token, self._state.beat + 1)
                self._store.put(_KEY, _encode(self._state))
            except StorageError:
                continue  # a storage that fails for longer than DEAD_AFTER_S loses the lease, which the next beat sees


def read_lease(store: Store) -> LeaseState | None:
    """Who holds the run folder, or None where nobody does.

    Raises:
        StorageError: It cannot be read.
    """
    try:
        content = store.get(_KEY)
    except ObjectChanged:
        return None
    try:
        return LeaseState(**json.loads(content))
    except (ValueError, TypeError):
        return LeaseState(None, content.hex(), 0)


def require_lease(store: Store, token: str) -> None:
    """Refuse to write a run that another job has by now.

    Args:
        store: The run folder.
        token: Of the lease under which the run is written.

    Raises:
        RunError: The folder is held under another token, or by nobody.
        StorageError: The lease cannot be read.
    """
    found = read_lease(store)
    if found is None or found.token != token:
        raise taken_over(store.uri, (found.holder or f"a damaged {_KEY}") if found else f"no {_KEY}")


def taken_over(run_uri: str, found: str | None = None) -> RunError:
    """The error for a job that has lost its run; `found` is what holds it now, where that is known."""
    return RunError(
        f"run {run_uri} was taken over by another job",
        value=found,
        expected="a heartbeat of this job every few seconds",
        remedy="follow that job; this one was silent for too long",
    )


def _held(store: Store, holder: str | None) -> RunError:
    if holder is None:
        return RunError(
            f"run {store.uri} is held by a job that its damaged {_KEY} does not name",
            expected="one job a run folder",
            remedy=f"find out what writes {_KEY}, and run this command again when that has ended",
        )
    return RunError(
        f"run {store.uri} is held by {holder}",
        expected="one job a run folder",
        remedy=f"follow that job with `ray job logs --follow {holder}`, or stop it with"
        f" `ray job stop {holder}` and run this command again",
    )


def _encode(state: LeaseState) -> bytes:
    return json.dumps(asdict(state)).encode()
