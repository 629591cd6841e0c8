"""Spikes: found in noise and on a slope, and nowhere else."""

import math

import numpy as np
import pytest

from histoscale.observe.spikes import Spike, find_spikes, largest_spikes

LOSS, NORM = "loss/total", "optim/grad_norm"


def noisy(steps: int = 2000, slope: float = 0.0) -> list[float]:
    return (5.0 + slope * np.arange(steps) + np.random.default_rng(0).normal(0.0, 0.1, steps)).tolist()


def spikes_of(values: list[float]) -> list[Spike]:
    return find_spikes(list(enumerate(values)), LOSS)


@pytest.mark.parametrize("slope", [0.0, -0.002, 0.05])
def test_a_spike_is_found_with_what_is_typical_around_it_and_noise_is_none(slope: float) -> None:
    values = noisy(slope=slope)
    assert spikes_of(values) == []
    around, values[700] = values[700], values[700] + 30.0
    [spike] = spikes_of(values)
    assert (spike.step, spike.metric) == (700, LOSS)
    assert spike.value == pytest.approx(around + 30.0)
    assert spike.typical == pytest.approx(around, abs=0.5)
    assert spike.score > 8.0


def test_values_that_stay_high_for_some_steps_are_one_spike() -> None:
    values = noisy()
    for step, height in ((300, 20.0), (301, 40.0), (302, 30.0)):
        values[step] += height
    assert [spike.step for spike in spikes_of(values)] == [301]


def test_a_fall_a_level_and_a_start_are_no_spikes() -> None:
    values = noisy()
    values[500] = 0.0
    assert spikes_of(values) == []
    assert spikes_of([5.0] * 100) == []
    assert spikes_of([5.0] * 50 + [5.01] + [5.0] * 50) == []
    assert spikes_of([100.0 / (step + 1) for step in range(300)]) == []
    assert spikes_of([1.0] * 8 + [99.0] + [1.0] * 5) == []
    assert spikes_of([]) == []


def test_what_is_no_number_is_a_spike_and_does_not_hide_others() -> None:
    values = noisy()
    values[400], values[900] = math.nan, 50.0
    found = spikes_of(values)
    assert [spike.step for spike in found] == [400, 900]
    assert found[0].score == math.inf


def test_of_equal_heights_the_first_one_counts_and_a_curve_of_zeros_may_have_one() -> None:
    values = noisy()
    values[400] = values[404] = 50.0
    assert [spike.step for spike in spikes_of(values)] == [400]
    assert [spike.step for spike in spikes_of([0.0] * 30 + [1.0] + [0.0] * 30)] == [30]


def test_the_largest_of_both_curves_since_a_step() -> None:
    loss, norm = noisy(), noisy()
    loss[100], loss[600], loss[1200] = 290.0, 60.0, 50.0
    norm[600], norm[1500] = 80.0, 9.0
    metrics = [{"step": step, LOSS: loss[step], NORM: norm[step]} for step in range(2000)]
    found = largest_spikes(metrics, 3, since=200)
    assert [(spike.step, spike.metric) for spike in found] == [(600, NORM), (1200, LOSS), (1500, NORM)]
    assert [spike.step for spike in largest_spikes(metrics, 1)] == [100]
    assert largest_spikes([{"step": 0.0}], 3) == []
