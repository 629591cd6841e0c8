"""The timeline of a run, and what became of its time."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from histoscale.errors import RunError, StorageError
from histoscale.observe.goodput import Goodput, GoodputMeter, Phase, Restart, StepTimes, account
from histoscale.observe.timeline import FOLDER, Event, Kind, Timeline, read_events, sessions, wall_before, write_event
from histoscale.storage import open_store
from histoscale.storage.local import LocalStore


def steps(count: int, step_s: float = 1.0, wait_s: float = 0.0) -> StepTimes:
    return StepTimes.of({"time/step_s": step_s, "time/wait_s": wait_s} for _ in range(count))


def parts(goodput: Goodput) -> float:
    return goodput.useful_s + sum(goodput.lost.values())


def test_events_come_back_by_time_whoever_wrote_them(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    events = [
        Event(Kind.START, 1_700_000_000.25, 0, 2),
        Event(Kind.RESUME, 1_700_000_010.5, 0, 2, restart_s=3.5, steps_redone=4),
        Event(Kind.COMMIT, 1_700_000_050.0, 20, 2, stall_s=0.5),
        Event(Kind.PREEMPTION_NOTICE, 1_700_000_051.0, 21, 2, "node drained"),
    ]
    driver, worker = Timeline(store), Timeline(store)
    for event, writer in zip(reversed(events), [driver, worker, driver, worker], strict=True):
        writer.tell(event)
    driver.close()
    worker.close()
    store.put(f"{FOLDER}notes.txt", b"mine")
    assert read_events(store) == events
    assert wall_before(store, 1_700_000_060.25) == 60.0
    assert wall_before(open_store(tmp_path / "new"), 1_700_000_060.25) == 0.0


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1, "kind": "stop"}'])
def test_a_damaged_event_is_named(tmp_path: Path, content: str) -> None:
    store = open_store(tmp_path)
    write_event(store, Event(Kind.STOP, 1.0, 0))
    (key,) = (info.key for info in store.list(FOLDER))
    store.put(key, content.encode())
    with pytest.raises(RunError, match=r"timeline/0{11}1000-stop-\w+\.json is no event of a run"):
        read_events(store)


def test_an_event_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: LocalStore, key: str, data: bytes) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(LocalStore, "put", refuse)
    timeline = Timeline(open_store(tmp_path))
    with caplog.at_level(logging.WARNING, "histoscale"):
        timeline.tell(Event(Kind.STOP, 1.0, 0))
        timeline.close()
    assert "the disk is full" in caplog.text


def test_sessions_end_with_a_stop_and_a_silent_death_is_no_pause() -> None:
    marks = [(0.0, Kind.START), (50.0, Kind.STOP), (100.0, Kind.START), (130.0, Kind.COMMIT), (150.0, Kind.START)]
    assert sessions([*marks, (170.0, Kind.END), (171.0, Kind.STOP)]) == [(0.0, 50.0), (100.0, 170.0)]
    assert sessions(marks[:4]) == [(0.0, 50.0), (100.0, 130.0)]
    assert sessions([]) == []


def test_an_undisturbed_run_loses_its_start_its_waiting_and_its_stalls() -> None:
    events = [
        Event(Kind.START, 100.0, 0, 2),
        Event(Kind.RESUME, 110.0, 0, 2),
        Event(Kind.COMMIT, 132.0, 10, 2, stall_s=2.0),
        Event(Kind.COMMIT, 154.0, 20, 2, stall_s=2.0),
        Event(Kind.END, 155.0, 20, 2),
    ]
    lines = [{"time/step_s": 2.0, "time/wait_s": 0.5, "time/stall_s": 0.0} for _ in range(20)]
    lines[10] |= {"time/step_s": 4.0, "time/stall_s": 2.0}
    found = account(events, StepTimes.of(lines))
    assert found.wall_s == 55.0
    assert found.useful_s == pytest.approx(20 * 1.5)
    assert found.lost == pytest.approx(
        {
            "starting": 10.0,
            "restarting": 0.0,
            "steps taken again": 0.0,
            "waiting for data": 10.0,
            "checkpoint stalls": 4.0,
            "idle or unknown": 1.0,
        }
    )
    assert found.share == pytest.approx(30.0 / 55.0)
    assert found.restarts == ()
    assert [span.phase for span in found.spans] == [Phase.STARTING, Phase.TRAINING]


def test_a_preemption_with_notice_loses_its_restart_and_no_step() -> None:
    events = [
        Event(Kind.START, 0.0, 0, 4),
        Event(Kind.RESUME, 5.0, 0, 4),
        Event(Kind.PREEMPTION_NOTICE, 24.0, 19, 4, "node drained"),
        Event(Kind.COMMIT, 25.5, 20, 4, stall_s=0.5),
        Event(Kind.PREEMPTION, 26.0, 20, 4, "node drained"),
        Event(Kind.RESUME, 36.0, 20, 3, steps_redone=0),
        Event(Kind.COMMIT, 56.0, 40, 3),
        Event(Kind.END, 56.0, 40, 3),
    ]
    found = account(events, steps(40))
    assert found.restarts == (Restart(36.0, 20, 3, "node drained", 10.0, 0),)
    assert (found.useful_s, found.restarting_s, found.redone_s) == (40.0, 10.0, 0.0)
    assert parts(found) == pytest.approx(found.wall_s) == 56.0


def test_a_silent_crash_is_told_by_the_workers_that_follow() -> None:
    events = [
        Event(Kind.START, 0.0, 0, 2),
        Event(Kind.RESUME, 5.0, 0, 2),
        Event(Kind.COMMIT, 25.0, 20, 2),
        Event(Kind.RESUME, 42.0, 20, 2, restart_s=10.0, steps_redone=7),
        Event(Kind.COMMIT, 62.0, 40, 2),
        Event(Kind.STOP, 62.0, 40, 2),
        Event(Kind.START, 1062.0, 40, 1),
        Event(Kind.RESUME, 1070.0, 40, 1),
        Event(Kind.END, 1071.0, 40, 1),
    ]
    found = account(events, steps(40))
    assert found.restarts == (Restart(42.0, 20, 2, "unknown", 10.0, 7),)
    assert (found.useful_s, found.redone_s, found.restarting_s) == (40.0, 7.0, 10.0)
    assert (found.starting_s, found.stopped_s, found.idle_s) == (13.0, 1000.0, pytest.approx(1.0))
    assert parts(found) == pytest.approx(found.wall_s) == 71.0


def test_a_crash_that_was_told_twice_is_one_restart() -> None:
    events = [
        Event(Kind.START, 0.0, 0, 2),
        Event(Kind.RESUME, 5.0, 0, 2),
        Event(Kind.CRASH, 20.0, 15, 2, "SIGKILL"),
        Event(Kind.RESTART, 21.0, 0, 2, "after a crash"),
        Event(Kind.RESUME, 30.0, 0, 2, restart_s=10.5, steps_redone=15),
        Event(Kind.COMMIT, 50.0, 20, 2),
    ]
    found = account(events, steps(20))
    assert found.restarts == (Restart(30.0, 0, 2, "SIGKILL", 10.5, 15),)
    assert (found.redone_s, found.restarting_s) == (15.0, 10.0)
    assert parts(found) == pytest.approx(found.wall_s)


def test_a_driver_that_died_leaves_idle_time_inside_the_run() -> None:
    events = [
        Event(Kind.START, 0.0, 0, 1),
        Event(Kind.RESUME, 5.0, 0, 1),
        Event(Kind.COMMIT, 15.0, 10, 1),
        Event(Kind.START, 500.0, 10, 1),
        Event(Kind.RESUME, 505.0, 10, 1),
        Event(Kind.COMMIT, 515.0, 20, 1),
        Event(Kind.END, 515.0, 20, 1),
    ]
    found = account(events, steps(20))
    assert found.restarts == ()
    assert (found.useful_s, found.idle_s, found.wall_s) == (20.0, 485.0, 515.0)


def test_random_timelines_account_for_every_second() -> None:
    draws = np.random.default_rng(3)
    kinds = list(Kind)
    for _ in range(300):
        times_s = np.cumsum(draws.exponential(10.0, 12))
        events = [
            Event(kinds[draws.integers(len(kinds))], float(at_s), 0, stall_s=1.0, steps_redone=2, restart_s=4.0)
            for at_s in times_s
        ]
        found = account(events, steps(int(draws.integers(0, 40)), wait_s=0.25))
        assert parts(found) == pytest.approx(found.wall_s)
        assert min(found.useful_s, *found.lost.values()) >= -1e-9
        assert found.wall_s + found.stopped_s == pytest.approx(times_s[-1] - times_s[0])
        assert 0.0 <= found.share <= 1.0
    assert account([], steps(0)).share == 0.0


def test_the_meter_goes_on_from_what_was_committed() -> None:
    meter = GoodputMeter(useful_s=60.0, wall_s=100.0, now_s=7.0)
    line = json.loads('{"time/step_s": 10.0, "time/wait_s": 2.0, "time/stall_s": 3.0}')
    assert meter.add(line, now_s=17.0) == pytest.approx(65.0 / 110.0)
    assert meter.add(line, now_s=27.0) == pytest.approx(70.0 / 120.0)
