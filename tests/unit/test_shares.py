"""Shares of strata: capped without loss, in whole slots, spread evenly over a cycle."""

import numpy as np
import pytest

from histoscale.sampling.shares import MOST_STRATA, capped, cycle, whole_slots


def test_what_a_cap_cuts_goes_to_the_others_in_proportion() -> None:
    shares = capped(np.array([0.6, 0.3, 0.1]), np.array([0.2, 1.0, 1.0]))
    np.testing.assert_allclose(shares, [0.2, 0.6, 0.2])


def test_caps_may_bind_one_after_the_other() -> None:
    shares = capped(np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.4, 0.9]))
    np.testing.assert_allclose(shares, [0.3, 0.4, 0.3])


def test_caps_that_do_not_bind_change_nothing() -> None:
    shares = np.array([0.5, 0.25, 0.25])
    np.testing.assert_array_equal(capped(shares, np.full(3, 0.6)), shares)


def test_caps_that_sum_to_one_are_the_shares() -> None:
    caps = np.array([0.1] * 10)
    rng = np.random.default_rng(0)
    for _ in range(50):
        shares = rng.random(10)
        np.testing.assert_allclose(capped(shares / shares.sum(), caps), caps)


def test_water_filling_meets_its_conditions_on_random_shares() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        shares, caps = rng.random(12) ** 4, rng.random(12)
        shares, caps = shares / shares.sum(), caps / caps.sum() * 1.3
        filled = capped(shares, caps)
        assert filled.sum() == pytest.approx(1.0)
        assert (filled <= caps + 1e-12).all()
        free = filled < caps - 1e-12
        scales = filled[free] / shares[free]
        np.testing.assert_allclose(scales, scales[0])
        assert (caps[~free] <= scales[0] * shares[~free] + 1e-12).all()


def test_slots_are_a_power_of_two_and_follow_the_shares() -> None:
    slots = whole_slots(np.array([3.0, 1.0, 1.0, 0.4]))
    assert slots.sum() == 1 << 16
    assert np.abs(slots - np.array([3.0, 1.0, 1.0, 0.4]) / 5.4 * 2**16).max() < 1
    assert whole_slots(np.array([2.0])).tolist() == [1 << 16]


def test_small_shares_get_a_longer_cycle_and_the_smallest_one_slot() -> None:
    slots = whole_slots(np.array([1.0, 1e-5]))
    assert slots.sum() == 1 << 19
    assert slots[1] == round(1e-5 * 2**19)
    slots = whole_slots(np.concatenate([[1.0], np.full(999, 1e-11)]))
    assert slots.sum() == 1 << 22
    assert slots[1:].tolist() == [1] * 999


def test_the_most_strata_still_have_many_slots_each() -> None:
    slots = whole_slots(np.ones(MOST_STRATA))
    assert set(slots.tolist()) == {64}


def test_a_cycle_counts_the_slots_of_each_stratum_in_order() -> None:
    slots = np.array([50_000, 12_000, 3_000, 535, 1])
    pattern, rank = cycle(slots, np.array([0.1, 0.9, 0.5, 0.3, 0.7]))
    assert (pattern.dtype, rank.dtype) == (np.int32, np.int32)
    for stratum, count in enumerate(slots.tolist()):
        assert rank[pattern == stratum].tolist() == list(range(count))


def test_every_stretch_of_a_cycle_holds_nearly_the_shares_of_the_whole() -> None:
    slots = np.array([30_000, 20_000, 10_000, 5_000, 536])
    pattern, _ = cycle(slots, np.array([0.0, 0.2, 0.4, 0.6, 0.8]))
    for stratum, count in enumerate(slots.tolist()):
        behind = np.cumsum(pattern == stratum) - np.arange(1, len(pattern) + 1) * (count / len(pattern))
        assert np.ptp(behind) < 5


def test_the_phases_decide_who_comes_first() -> None:
    slots = np.full(4, 1 << 14)
    assert cycle(slots, np.array([0.6, 0.2, 0.4, 0.1]))[0][:4].tolist() == [3, 1, 2, 0]
