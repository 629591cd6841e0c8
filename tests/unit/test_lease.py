import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from histoscale.cluster.lease import Lease, LeaseState, read_lease, require_lease
from histoscale.errors import RunError, StorageError
from histoscale.storage import open_store
from histoscale.storage.local import LocalStore
from histoscale.storage.store import Store

FAST = {"heartbeat_s": 0.05, "dead_after_s": 0.6, "settle_s": 0.1}
DEAD = b'{"holder": "dead", "token": "x", "beat": 7}'
OTHER = b'{"holder": "other", "token": "y", "beat": 1}'
WAIT_S = 30.0


class Recorded(LocalStore):
    """A folder that counts reads of the lease, fails those that are named, and keeps what was put; a fake."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads = 0
        self.failing: set[int] = set()
        self.written: list[bytes] = []

    def get(self, key: str) -> bytes:
        self.reads += 1
        if self.reads in self.failing:
            raise StorageError("the server is away")
        return super().get(key)

    def put(self, key: str, data: bytes) -> None:
        self.written.append(data)
        super().put(key, data)


def holder_of(store: Store) -> str | None:
    state = read_lease(store)
    assert state is not None
    return state.holder


def until(happened: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_lease_names_its_holder_beats_and_is_given_back(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Lease(store, "job-a", **FAST) as lease:
        first = read_lease(store)
        assert first == LeaseState("job-a", lease.token, 0)
        threading.Event().wait(0.3)
        later = read_lease(store)
        assert later is not None
        assert later.beat > first.beat
        require_lease(store, lease.token)
    assert read_lease(store) is None


def test_nobody_waits_for_a_folder_that_nobody_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("histoscale.cluster.lease.time.sleep", waited.append)
    with Lease(open_store(tmp_path), "job-a"):
        pass
    assert waited == []


def test_a_second_holder_is_refused_and_told_who_has_the_run(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Lease(store, "job-a", **FAST), pytest.raises(RunError, match=r"held by job-a.*ray job logs --follow job-a"):
        Lease(store, "job-b", **FAST).__enter__()
    with Lease(store, "job-b", **FAST):
        assert holder_of(store) == "job-b"


# Storage that fails.


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_lease_that_cannot_be_read_is_nobodys_to_take(tmp_path: Path, failing: int) -> None:
    store = Recorded(tmp_path)
    LocalStore(tmp_path).put("lease.json", DEAD)
    store.failing = {failing}
    with pytest.raises(StorageError, match="the server is away"):
        Lease(store, "job-b", **FAST).__enter__()
    assert store.written == []
    assert store.get("lease.json") == DEAD


def test_a_beat_that_cannot_read_is_missed_and_writes_nothing(tmp_path: Path) -> None:
    store = Recorded(tmp_path)
    store.failing = {1, 2, 3}
    with Lease(store, "job-a", **FAST) as lease:
        until(lambda: store.reads >= 5)
        assert not lease.lost
    beats = [json.loads(written)["beat"] for written in store.written]
    assert beats == list(range(1, len(beats) + 1))
    assert len(beats) <= store.reads - 3
    assert read_lease(store) is None


def test_a_successor_is_not_written_over_once_the_storage_is_back(tmp_path: Path) -> None:
    store = Recorded(tmp_path)
    store.failing = set(range(1, 5))
    with Lease(store, "slow", **FAST) as lease:
        LocalStore(tmp_path).put("lease.json", OTHER)
        until(lambda: lease.lost)
    assert store.written == []
    assert store.get("lease.json") == OTHER


def test_a_lease_that_cannot_be_given_back_hides_no_outcome(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Recorded(tmp_path)

    def job() -> None:
        with Lease(store, "job-a", heartbeat_s=3600.0):
            store.failing = {1}
            raise KeyError("odd")

    with caplog.at_level(logging.WARNING), pytest.raises(KeyError, match="odd"):
        job()
    assert f"the lease of {tmp_path} could not be given back" in caplog.text
    assert "the server is away" in caplog.text


# Who succeeds whom.


def test_a_dead_holder_is_succeeded(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("lease.json", DEAD)
    with Lease(store, "job-b", **FAST):
        assert holder_of(store) == "job-b"


@pytest.mark.parametrize("torn", [b'{"holder": "de', b"\xff", b"null"])
def test_a_torn_lease_is_waited_for_like_any_other(tmp_path: Path, torn: bytes) -> None:
    store = open_store(tmp_path)
    store.put("lease.json", torn)
    began_s = time.monotonic()
    with Lease(store, "job-b", **FAST):
        assert time.monotonic() - began_s >= FAST["dead_after_s"]
        assert holder_of(store) == "job-b"


@pytest.mark.parametrize(
    ("then", "told"), [(b'{"holder": "dead"', "its damaged lease.json does not name"), (OTHER, "held by other")]
)
def test_a_torn_lease_that_changes_is_held(tmp_path: Path, then: bytes, told: str) -> None:
    store = Recorded(tmp_path)
    LocalStore(tmp_path).put("lease.json", b'{"holder": "de')
    changed = threading.Timer(0.2, LocalStore(tmp_path).put, ("lease.json", then))
    changed.start()
    with pytest.raises(RunError, match=told):
        Lease(store, "job-b", heartbeat_s=0.05, dead_after_s=WAIT_S).__enter__()
    changed.join()
    assert store.written == []


class WritingAtOnce(LocalStore):
    """A folder whose first two writers have both made up their minds before either writes; a fake."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._both = threading.Barrier(2)
        self._left = 2
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes) -> None:
        with self._lock:
            self._left -= 1
            meets = self._left >= 0
        if meets:
            self._both.wait(WAIT_S)
        super().put(key, data)


def test_of_two_newcomers_at_once_on_a_dead_lease_one_gets_it(tmp_path: Path) -> None:
    store = WritingAtOnce(tmp_path)
    LocalStore(tmp_path).put("lease.json", DEAD)
    refusals: dict[str, str] = {}
    entered: list[str] = []
    refused = threading.Event()

    def newcomer(name: str) -> None:
        try:
            with Lease(store, name, heartbeat_s=0.05, dead_after_s=0.6, settle_s=1.0) as lease:
                entered.append(name)
                until(refused.is_set)
                assert not lease.lost
                assert holder_of(store) == name
        except RunError as error:
            refusals[name] = str(error)
            refused.set()

    threads = [threading.Thread(target=newcomer, args=(name,)) for name in ("job-a", "job-b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    assert len(entered) == 1
    (loser,) = {"job-a", "job-b"} - set(entered)
    assert f"is held by {entered[0]}" in refusals[loser]


class Late(LocalStore):
    """A folder where a first write comes into effect only after that of another, who dies; a fake."""

    def put(self, key: str, data: bytes) -> None:
        if not hasattr(self, "late"):
            self.late = threading.Timer(0.4, super().put, (key, data))
            self.late.start()
            super().put(key, OTHER)
        else:
            self.late.join()
            super().put(key, data)


def test_a_write_that_comes_into_effect_late_is_ones_own_all_the_same(tmp_path: Path) -> None:
    store = Late(tmp_path)
    LocalStore(tmp_path).put("lease.json", DEAD)
    with Lease(store, "job-b", heartbeat_s=0.05, dead_after_s=1.0, settle_s=0.1) as lease:
        require_lease(store, lease.token)


class Unanswered(LocalStore):
    """A folder that takes a first write and says no, as when its answer was lost and it was sent again; a fake."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        super().put_if_absent(key, data)
        return False


def test_a_first_write_whose_answer_was_lost_is_ones_own(tmp_path: Path) -> None:
    store = Unanswered(tmp_path)
    with Lease(store, "job-a", heartbeat_s=0.05, dead_after_s=3600.0) as lease:
        require_lease(store, lease.token)


@pytest.mark.parametrize("found", [OTHER, b"", None], ids=["another's", "damaged", "given back"])
def test_a_holder_that_finds_another_lease_than_its_own_gives_up_and_leaves_it_alone(
    tmp_path: Path, found: bytes | None
) -> None:
    store = Recorded(tmp_path)
    with Lease(store, "slow", heartbeat_s=0.05) as lease:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "get", lambda key: (_ for _ in ()).throw(StorageError("away")))  # no beat meanwhile
            time.sleep(0.2)
            if found is None:
                store.delete("lease.json")
            else:
                LocalStore(tmp_path).put("lease.json", found)
        until(lambda: lease.lost)
        written = len(store.written)
    assert len(store.written) == written
    assert LocalStore(tmp_path).exists("lease.json") == (found is not None)
    if found is not None:
        assert LocalStore(tmp_path).get("lease.json") == found


# The fence.


@pytest.mark.parametrize(
    ("content", "who"), [(OTHER, "other"), (b'{"hol', "a damaged lease.json"), (None, "no lease.json")]
)
def test_who_has_lost_the_lease_is_refused(tmp_path: Path, content: bytes | None, who: str) -> None:
    store = open_store(tmp_path)
    if content is not None:
        store.put("lease.json", content)
    with pytest.raises(RunError, match=rf"was taken over by another job \(got '{who}'; expected a heartbeat"):
        require_lease(store, "x")


def test_a_fence_that_cannot_read_the_lease_says_so(tmp_path: Path) -> None:
    store = Recorded(tmp_path)
    store.failing = {1}
    with pytest.raises(StorageError, match="the server is away"):
        require_lease(store, "x")
