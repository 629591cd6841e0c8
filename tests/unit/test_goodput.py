"""The estimate of goodput on spot nodes against closed forms, and its bookkeeping."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import lambertw

from histoscale.bench.goodput import Fleet, goodput, parts_for
from histoscale.cluster.goodput import GoodputParts, daly_interval_s, expected_share, simulate

CALM = GoodputParts(
    nodes=8,
    commit_every_s=900.0,
    stall_s=2.0,
    jit_s=15.0,
    restart_s=60.0,
    preempted_every_s=1e12,
    notice_s=120.0,
    replacement_s=0.0,
)
HARSH = replace(CALM, notice_s=0.0, preempted_every_s=3600.0)  # no notice: what is not committed is lost


@pytest.mark.parametrize("commit_s", [1.0, 10.0, 60.0, 300.0])
@pytest.mark.parametrize("mtbf_s", [600.0, 3600.0, 86_400.0])
def test_dalys_interval_is_the_best_of_the_closed_form(commit_s: float, mtbf_s: float) -> None:
    best_s = mtbf_s * (1.0 + lambertw(-math.exp(-(1.0 + commit_s / mtbf_s))).real)
    ours_s = daly_interval_s(commit_s, mtbf_s)
    assert ours_s == pytest.approx(best_s, rel=0.006)
    shares = [expected_share(s, commit_s, 60.0, mtbf_s) for s in np.linspace(0.2, 3.0, 200) * best_s]
    assert expected_share(ours_s, commit_s, 60.0, mtbf_s) >= max(shares) - 1e-5


def test_the_interval_tends_to_youngs_and_ends_at_the_mean_time_between_failures() -> None:
    assert daly_interval_s(1.0, 1e8) == pytest.approx(math.sqrt(2e8), rel=1e-3)
    assert daly_interval_s(100.0, 50.0) == daly_interval_s(500.0, 50.0) == 50.0


@pytest.mark.parametrize("mtbf_s", [1200.0, 6000.0])
@pytest.mark.parametrize("commit_every_s", [120.0, 900.0])
def test_without_notice_the_simulation_is_the_closed_form(mtbf_s: float, commit_every_s: float) -> None:
    parts = replace(HARSH, preempted_every_s=mtbf_s, commit_every_s=commit_every_s)
    shares = [simulate(parts, 1000 * mtbf_s, seed).share for seed in range(4)]
    expected = expected_share(commit_every_s, parts.stall_s, parts.restart_s, mtbf_s)
    assert np.mean(shares) == pytest.approx(expected, rel=0.015)


def test_with_notice_nothing_is_taken_again_and_each_preemption_costs_the_same() -> None:
    found = simulate(replace(CALM, preempted_every_s=6000.0), 3e6, seed=1)
    assert found.redone_s == 0.0
    assert found.preemptions == pytest.approx(500, rel=0.15)
    cost_s = found.preemptions * (CALM.jit_s + CALM.restart_s)
    assert found.wall_s - found.useful_s == pytest.approx(cost_s + found.useful_s / 900.0 * 2.0, rel=0.05)


def test_an_undisturbed_run_loses_its_commits_alone() -> None:
    found = simulate(CALM, 9e5, seed=0)
    assert found.share == pytest.approx(900.0 / 902.0)
    assert found.work_share == pytest.approx(found.share)
    assert (found.preemptions, found.restarts, found.idle_s) == (0, 0, 0.0)


def test_every_second_is_accounted_for_and_a_seed_repeats() -> None:
    draws = np.random.default_rng(4)
    for seed in range(40):
        parts = GoodputParts(
            nodes=int(draws.integers(1, 9)),
            commit_every_s=float(draws.uniform(10, 2000)),
            stall_s=float(draws.uniform(0, 20)),
            jit_s=float(draws.uniform(1, 240)),
            restart_s=float(draws.uniform(1, 300)),
            preempted_every_s=float(draws.uniform(300, 5000)),
            notice_s=float(draws.choice([0.0, 30.0, 120.0])),
            replacement_s=float(draws.uniform(0, 2000)),
        )
        found = simulate(parts, 2e5, seed)
        spent = found.useful_s + found.restarting_s + found.redone_s + found.stalls_s + found.idle_s
        assert spent == pytest.approx(found.wall_s)
        assert 0.0 <= found.work_share <= found.share + 1e-9 < 1.0
        assert simulate(parts, 2e5, seed) == found


def test_a_single_node_is_waited_for_and_many_go_on_without_it() -> None:
    one = simulate(replace(CALM, nodes=1, preempted_every_s=6000.0, replacement_s=600.0), 2e6, seed=2)
    many = simulate(replace(CALM, nodes=8, preempted_every_s=6000.0, replacement_s=600.0), 2e6, seed=2)
    assert one.idle_s == pytest.approx(one.preemptions * (600.0 - CALM.jit_s), rel=0.05)
    assert many.idle_s == 0.0
    assert many.restarts > 1.5 * many.preemptions, "one without the node, one when another has come"
    assert many.share > one.share


def test_the_benchmark_says_that_it_estimates() -> None:
    figures = list(goodput())
    assert [figure.details["gpus"] for figure in figures] == 2 * [8, 8, 64, 512]
    for figure in figures:
        assert figure.figure == "goodput.share"
        assert figure.baseline is None
        assert figure.details["estimate"] is True
        assert 0.3 < figure.value < 1.0
    assert all(parts_for(Fleet(gpus, 8), 60.0).jit_s < 120.0 for gpus in (8, 64, 512))
