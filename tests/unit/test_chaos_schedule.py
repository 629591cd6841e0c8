"""What happens when to the runs of tests/chaos is a function of the seed, and everything happens."""

import itertools

import pytest
from tests.chaos.schedule import FIRST_SHARE, LAST_SHARE, Kind, schedule

STEPS = 400


@pytest.mark.parametrize("seed", range(20))
def test_everything_happens_once_in_steps_that_ascend(seed: int) -> None:
    planned = schedule(seed, STEPS, Kind)
    assert sorted(one.kind.name for one in planned) == sorted(kind.name for kind in Kind)
    assert planned[0].kind is Kind.NODES_ADDED
    steps = [one.step for one in planned]
    assert steps[0] >= STEPS * FIRST_SHARE
    assert steps[-1] <= STEPS * LAST_SHARE
    gap = STEPS * (LAST_SHARE - FIRST_SHARE) / len(planned)
    assert all(later - earlier >= gap / 2 - 1 for earlier, later in itertools.pairwise(steps))


def test_a_seed_says_it_all_and_another_says_something_else() -> None:
    kinds = list(Kind)
    assert schedule(1, STEPS, kinds) == schedule(1, STEPS, reversed(kinds))
    orders = {tuple(one.kind for one in schedule(seed, STEPS, kinds)) for seed in range(20)}
    assert len(orders) == 20
    assert len({schedule(seed, STEPS, kinds)[0].step for seed in range(20)}) > 5
