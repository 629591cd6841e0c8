import threading
from pathlib import Path

import pytest

from histoscale.cluster.lease import Lease, read_lease
from histoscale.errors import RunError
from histoscale.storage import open_store

FAST = {"heartbeat_s": 0.05, "dead_after_s": 0.6}


def test_a_lease_names_its_holder_beats_and_is_given_back(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Lease(store, "job-a", **FAST):
        first = read_lease(store)
        assert first is not None
        assert first.holder == "job-a"
        threading.Event().wait(0.3)
        later = read_lease(store)
        assert later is not None
        assert later.beat > first.beat
    assert read_lease(store) is None


def test_a_second_holder_is_refused_and_told_who_has_the_run(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Lease(store, "job-a", **FAST), pytest.raises(RunError, match=r"held by job-a.*ray job logs --follow job-a"):
        Lease(store, "job-b", **FAST).__enter__()
    with Lease(store, "job-b", **FAST):
        state = read_lease(store)
        assert state is not None
        assert state.holder == "job-b"


def test_a_dead_holder_is_succeeded(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("lease.json", b'{"holder": "dead", "token": "x", "beat": 7}')
    with Lease(store, "job-b", **FAST):
        state = read_lease(store)
        assert state is not None
        assert state.holder == "job-b"


def test_a_torn_lease_counts_as_nobodys(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("lease.json", b'{"holder": "de')
    with Lease(store, "job-b", **FAST):
        pass


def test_a_holder_that_was_succeeded_notices_and_leaves_the_other_lease_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with Lease(store, "slow", **FAST) as lease:
        store.put("lease.json", b'{"holder": "other", "token": "x", "beat": 1}')
        for _ in range(100):
            if lease.lost:
                break
            threading.Event().wait(0.05)
        assert lease.lost
    state = read_lease(store)
    assert state is not None
    assert state.holder == "other"
