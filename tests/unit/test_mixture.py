"""Every group of steps holds each magnification's share, exact to one tile, and can be reached at once."""

import numpy as np
import pytest

from histoscale.sampling import mixture as mixture_module
from histoscale.sampling.mixture import PARTS, Mixture, parts_per_million


@pytest.mark.parametrize("tiles", [2, 5, 16, 4096])
@pytest.mark.parametrize("shares", [(0.2, 0.4, 0.2, 0.2), (1, 1, 1), (0.001, 0.5, 7.0), (3.0,)])
def test_each_group_holds_floor_or_ceiling_of_every_share(shares: tuple[float, ...], tiles: int) -> None:
    mixture, parts = Mixture(shares, tiles), parts_per_million(shares)
    seen = [0] * len(shares)
    for group in range(500):
        assert mixture.before(group) == seen
        bounds = mixture.bounds(group)
        assert (bounds[0], bounds[-1]) == (0, tiles)
        for q, part in enumerate(parts):
            count = bounds[q + 1] - bounds[q]
            assert count in (tiles * part // PARTS, -(-tiles * part // PARTS))
            seen[q] += count
            assert abs(seen[q] - (group + 1) * tiles * part / PARTS) < 3


def test_shares_are_exact_after_a_million_groups() -> None:
    shares = (0.123456, 0.4, 0.476544)
    for laps in (1, 7):
        assert Mixture(shares, 5).before(laps * PARTS) == [5 * laps * p for p in parts_per_million(shares)]


def test_parts_sum_to_exactly_a_million() -> None:
    for shares in ((1, 1, 1), (0.2, 0.4, 0.2, 0.2), (1e-3, 1e6), (1 / 7,) * 7):
        assert sum(parts_per_million(shares)) == PARTS


def test_cuts_are_kept_for_a_bounded_number_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_module, "_KEPT_GROUPS", 3)
    mixture = Mixture((0.3, 0.7), 16)
    for group in (0, 1, 0, 900, 17, 1, 0):
        bounds, before = mixture.cut(group)
        np.testing.assert_array_equal(bounds, mixture.bounds(group))
        np.testing.assert_array_equal(before, mixture.before(group))
        assert mixture.cut(group)[0] is bounds
        assert len(mixture._cuts) <= 3
