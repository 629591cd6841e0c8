"""Ranks of a simulation that are threads: one that fails ends the simulation, whatever the others wait for."""

import threading
from typing import Any

import pytest

from histoscale.cluster import simulate
from histoscale.cluster.simulate import Simulation
from histoscale.config.recipe import Recipe
from histoscale.errors import StreamError
from histoscale.sampling.spec import PlanSpec
from histoscale.stream.windows import FeedSpec, RankShare

RECIPE = Recipe()
WORKERS = 3


class FakeFeed:
    """Not a feed: what a rank gets from it is written down beforehand, by rank."""

    failing: int | None = None
    made: list["FakeFeed"]
    all_made: threading.Barrier

    def __init__(self, spec: FeedSpec, share: RankShare, start_step: int) -> None:
        assert (share.workers, start_step) == (WORKERS, 0)
        self.spec, self.rank = spec, share.rank
        self.steps: list[int] = []
        self.closed = threading.Event()
        self.made.append(self)

    def micro_batches(self, step: int) -> None:
        self.steps.append(step)
        if step == 0:
            self.all_made.wait()
        if self.rank == self.failing:
            raise StreamError("a block of another plan")
        if self.failing is not None:
            self.closed.wait()
            raise StreamError("the feed ended too early")

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    ended: list[Any] = []
    FakeFeed.made, FakeFeed.all_made = [], threading.Barrier(WORKERS)
    monkeypatch.setattr(simulate, "RankFeed", FakeFeed)
    monkeypatch.setattr(simulate, "start_feed", lambda _: "master")
    monkeypatch.setattr(simulate.ray, "kill", ended.append)
    return ended


def lines() -> list[str]:
    return list(simulate._dealt(Simulation(RECIPE, 10, WORKERS, RECIPE.batch.replicas), PlanSpec.from_recipe(RECIPE)))


def test_every_rank_takes_every_step(killed: list[Any]) -> None:
    assert lines()[-1] == "every block was the one of the plan, in order"
    assert sorted(feed.rank for feed in FakeFeed.made) == [0, 1, 2]
    steps = list(range(FakeFeed.made[0].spec.steps))
    assert all(feed.steps == steps and feed.closed.is_set() for feed in FakeFeed.made)
    assert not killed


def test_a_rank_that_fails_ends_the_simulation(killed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeFeed, "failing", 2)
    with pytest.raises(StreamError, match="a block of another plan"):
        lines()
    assert all(feed.closed.is_set() for feed in FakeFeed.made)
    assert killed == ["master"]
