"""Sizes that gain something, resizes that repay themselves, and crashes that repeat."""

from dataclasses import replace

import pytest

from histoscale.cluster.elasticity import CrashHistory, Outlook, gaining_sizes, size_for, turns_of, worthwhile
from histoscale.cluster.scaling import on_staying_nodes

RUN = Outlook(workers=2, step=100, steps=1100, step_s=1.0, restart_s=30.0)


@pytest.mark.parametrize("replicas", [1, 4, 7, 8, 12])
def test_sizes_are_the_smallest_of_each_number_of_turns(replicas: int) -> None:
    expected = {
        min(workers for workers in range(1, replicas + 1) if turns_of(workers, replicas) == turns)
        for turns in {turns_of(workers, replicas) for workers in range(1, replicas + 1)}
    }
    assert gaining_sizes(replicas, 1, 99) == tuple(sorted(expected))


def test_bounds_cut_the_sizes() -> None:
    assert gaining_sizes(8, 1, 8) == (1, 2, 3, 4, 8)
    assert gaining_sizes(8, 5, 7) == (5,)
    assert gaining_sizes(8, 2, 3) == (2, 3)


def test_a_size_needs_its_workers() -> None:
    assert [size_for(available, (2, 3, 8)) for available in (1, 2, 3, 7, 8, 99)] == [None, 2, 3, 3, 8, 8]


def test_a_resize_must_repay_its_restart() -> None:
    better = worthwhile(RUN, 4, 4, horizon_s=3600.0)
    assert better is not None
    assert better.workers == 4
    assert better.reason == (
        "from 2 to 4 workers: 1 turns a step instead of 2 save 500 s of the next 1000 s "
        "(cluster.resize_horizon_s, or the rest of the run), a restart takes 30 s"
    )
    assert worthwhile(RUN, 4, 4, horizon_s=59.0) is None
    near_the_end = replace(RUN, step=1041)
    assert worthwhile(near_the_end, 4, 4, 3600.0) is None


def test_without_a_measurement_there_is_no_gain() -> None:
    assert worthwhile(replace(RUN, step_s=None), 4, 4, 3600.0) is None


def test_the_same_size_or_a_smaller_one_is_no_gain() -> None:
    assert worthwhile(RUN, 2, 4, 3600.0) is None
    assert worthwhile(RUN, 1, 4, 3600.0) is None


def test_crashes_repeat_when_step_and_kind_do() -> None:
    history = CrashHistory()
    assert [history.repeats(7, "OSError: x"), history.repeats(7, "OSError: x")] == [1, 2]
    assert history.repeats(8, "OSError: x") == 1
    assert history.repeats(8, "OSError: y") == 1
    assert history.repeats(8, "OSError: y") == 2


def test_nodes_that_are_gone_or_going_count_for_nothing() -> None:
    reserved = {name: {"CPU": 2.0} for name in ("stays", "goes", "gone", "unknown")}
    nodes = [{"NodeID": "stays", "Alive": True}, {"NodeID": "goes", "Alive": True}, {"NodeID": "gone", "Alive": False}]
    assert on_staying_nodes(reserved, nodes, {"goes": 0}) == {"stays": {"CPU": 2.0}}
