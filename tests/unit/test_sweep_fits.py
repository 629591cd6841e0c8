"""Power laws: planted ones are found, intervals hold as often as stated, and runs that tell none are refused."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from histoscale.errors import SweepError
from histoscale.sweeps.fits import HUBER_DELTA, Array, Points, fit_power_law
from histoscale.sweeps.laws import Fit, WorkLaw, frontier, held_out, optimum, slices, work_law

E, A, ALPHA, B, BETA = 0.08, 0.2, 0.4, 0.3, 0.5
SIZES = np.array([2e5, 8e5, 2e6, 6e6])
IMAGES = np.array([2e3, 6e3, 2e4, 6e4])


def law(parameters: Any, images: Any) -> Any:
    return E + A * (parameters / 2e5) ** -ALPHA + B * (images / 2e3) ** -BETA


def grid(noise: float = 0.0, seed: int = 0) -> Points:
    x_NK = np.array([(size, images) for size in SIZES for images in IMAGES])
    draws = np.random.default_rng(seed).standard_normal(len(x_NK))
    return Points(
        ("parameters", "images"), x_NK, law(*x_NK.T) * np.exp(noise * draws), tuple(f"run{n}" for n in range(len(x_NK)))
    )


def curve(noise: float = 0.0, seed: int = 0, count: int = 8, **changes: Any) -> Points:
    x_N = np.geomspace(1e3, 1e6, count)
    draws = np.random.default_rng(seed).standard_normal(count)
    y_N = (0.1 + 0.5 * (x_N / 1e3) ** -0.35) * np.exp(noise * draws)
    values = {"names": ("images",), "x_NK": x_N[:, None], "y_N": y_N, "labels": tuple(f"run{n}" for n in range(count))}
    return Points(**{**values, **changes})


@pytest.fixture(scope="module")
def noisy() -> Fit:
    return fit_power_law(grid(0.01), resamples=30)


def test_a_planted_law_is_found() -> None:
    fit = fit_power_law(curve(), resamples=2)
    assert fit.offset == pytest.approx(0.1, rel=1e-3)
    assert fit.exponents[0] == pytest.approx(0.35, rel=1e-3)
    assert fit.predict(np.array([[1e9]]))[0] == pytest.approx(0.1 + 0.5 * 1e6**-0.35, rel=1e-3)


def test_a_planted_law_in_two_variables_is_found() -> None:
    fit = fit_power_law(grid(), resamples=1)
    assert fit.offset == pytest.approx(E, rel=0.01)
    assert fit.exponents == pytest.approx((ALPHA, BETA), rel=0.01)


def test_the_loss_is_that_of_another_optimiser() -> None:
    """The same objective written down again, and minimised by a simplex from the planted values."""
    points = curve(0.03)
    fit = fit_power_law(points, resamples=1)
    log_x, log_y = np.log(points.x_NK[:, 0]), np.log(points.y_N)

    def objective(parameters: Array) -> float:
        offset, amount, exponent = parameters
        total = 0.0
        for u, v in zip(log_x, log_y, strict=True):
            residual = abs(math.log(math.exp(offset) + math.exp(amount - exponent * u)) - v)
            total += residual**2 / 2 if residual < HUBER_DELTA else HUBER_DELTA * (residual - HUBER_DELTA / 2)
        return total

    start = np.array([math.log(0.1), math.log(0.5) + 0.35 * math.log(1e3), 0.35])
    options = {"maxiter": 20_000, "maxfev": 20_000, "xatol": 1e-10, "fatol": 1e-14}
    theirs = minimize(objective, start, method="Nelder-Mead", options=options)
    log_e, log_a, alpha = fit.parameters_P
    ours = objective(np.array([log_e, log_a + alpha * math.log(fit.centre_K[0]), alpha]))
    assert ours <= theirs.fun * 1.001


def test_one_bad_run_hardly_counts() -> None:
    y_N = curve(0.005).y_N.copy()
    y_N[4] *= 1.5
    fit = fit_power_law(curve(y_N=y_N), resamples=1)
    assert fit.exponents[0] == pytest.approx(0.35, abs=0.05)


def test_the_same_seed_gives_the_same_intervals_and_more_noise_wider_ones() -> None:
    fits = [fit_power_law(curve(noise), resamples=25) for noise in (0.01, 0.01, 0.05)]
    widths = [np.ptp(fit.exponent_intervals[0]) for fit in fits]
    assert widths[0] == widths[1] < widths[2]
    assert fits[0].offset_interval[0] < 0.1 < fits[2].offset_interval[1]


def coverage(datasets: int, resamples: int, noise: float) -> dict[str, float]:
    """How often 95 % intervals hold the truth, over simulated sweeps of eight runs."""
    far, within = np.array([[3e7]]), np.array([[1e5]])
    held = dict.fromkeys(("offset", "exponent", "beyond", "within", "run"), 0)
    for seed in range(datasets):
        fit = fit_power_law(curve(noise, seed), resamples, seed)
        draw = np.random.default_rng(10_000 + seed).standard_normal()
        for name, truth, (low, high) in (
            ("offset", 0.1, fit.offset_interval),
            ("exponent", 0.35, fit.exponent_intervals[0]),
            ("beyond", 0.1 + 0.5 * 3e4**-0.35, [bound[0] for bound in fit.predict(far)[1:]]),
            ("within", 0.1 + 0.5 * 1e2**-0.35, [bound[0] for bound in fit.predict(within)[1:]]),
            ("run", (0.1 + 0.5 * 3e4**-0.35) * math.exp(noise * draw), [b[0] for b in fit.predict_runs(far)[1:]]),
        ):
            held[name] += low <= truth <= high
    return {name: count / datasets for name, count in held.items()}


def test_intervals_hold_the_truth_in_most_simulated_sweeps() -> None:
    held = coverage(datasets=20, resamples=30, noise=0.02)
    assert all(share >= 0.7 for share in held.values()), held


@pytest.mark.slow
def test_intervals_hold_the_truth_about_as_often_as_the_guide_states() -> None:
    held = coverage(datasets=100, resamples=100, noise=0.02)
    assert all(share >= 0.8 for share in held.values()), held


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (curve(count=1), r"needs more values of it \(got 1; expected 3 or more"),
        (curve(count=3), r"has 3 parameters, too many for the runs \(got 3; expected 4 runs or more"),
        (curve(y_N=np.full(8, 0.3)), "all runs are alike"),
        (curve(x_NK=np.full((8, 1), 5.0)), "needs more values of it"),
        (curve(y_N=np.array([0.5, np.nan, *[0.3] * 6])), r"diverged cannot be fitted \(got 'run1'.*[Ll]ower optim.lr"),
        (curve(y_N=np.array([0.5, 0.0, *[0.3] * 6])), r"without any error has no logarithm \(got 'run1'"),
        (curve(chance=0.5), r"no better than guessing .*\(got 'run0'; expected an error below 0.5"),
        (
            Points(
                ("parameters", "images"),
                np.array([(a, b) for a in (1.0, 2.0) for b in (1.0, 2.0, 4.0)]),
                np.linspace(0.5, 0.2, 6),
                tuple("abcdef"),
            ),
            "a power law in parameters needs more values",
        ),
    ],
)
def test_runs_that_tell_no_law_are_refused_with_advice(points: Points, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        fit_power_law(points)


def test_the_best_size_is_that_of_trying_them_all(noisy: Fit) -> None:
    work, flops = WorkLaw(6.0, 1.1), 2e11
    found = optimum(noisy, work, flops)
    sizes = np.geomspace(1e4, 1e8, 20_001)
    values, _, _ = noisy.predict(np.stack([sizes, work.images(flops, sizes)], axis=1))
    assert found.parameters == pytest.approx(sizes[np.argmin(values)], rel=2e-3)
    assert found.images == pytest.approx(flops / (6.0 * found.parameters**1.1))
    assert found.y == pytest.approx(values.min(), rel=1e-6)
    low, high = found.parameters_interval
    assert low < found.parameters < high
    assert not found.extrapolated
    assert optimum(noisy, work, flops * 1e4).extrapolated


def test_without_an_effect_of_data_there_is_no_best_size(noisy: Fit) -> None:
    parameters_P = noisy.parameters_P.copy()
    parameters_P[4] = 0.0
    flat = Fit(noisy.points, noisy.centre_K, parameters_P, noisy.samples_RP, noisy.residuals_N)
    with pytest.raises(SweepError, match="knows no best size"):
        optimum(flat, WorkLaw(6.0, 1.0), 1e12)


def test_a_resample_without_an_effect_makes_the_interval_as_wide_as_can_be(noisy: Fit) -> None:
    samples_RP = noisy.samples_RP.copy()
    samples_RP[::2, 4] = 0.0
    loose = Fit(noisy.points, noisy.centre_K, noisy.parameters_P, samples_RP, noisy.residuals_N)
    found = optimum(loose, WorkLaw(6.0, 1.0), 6e12)
    assert found.parameters_interval[1] == pytest.approx(1e12)
    assert found.images_interval[0] == pytest.approx(1.0)


def test_work_by_size_is_a_power_law_and_of_one_size_in_proportion() -> None:
    found = work_law(SIZES, 7.0 * SIZES**0.9)
    assert (found.amount, found.exponent) == pytest.approx((7.0, 0.9))
    assert work_law(SIZES[:1], np.array([1e6])) == WorkLaw(5.0, 1.0)


def test_slices_of_equal_work_have_their_least_error_where_it_was_planted() -> None:
    sizes = np.tile([1e5, 2e5, 4e5, 8e5], 2)
    flops = np.repeat([1e12, 4e12], 4) * (1.0 + 0.02 * np.tile([0, 1, -1, 0], 2))
    y = 0.2 * np.exp(0.1 * (np.log(sizes) - np.log(3e5)) ** 2)
    low, high = slices(sizes, flops, y)
    assert (low.best, high.best) == pytest.approx((3e5, 3e5), rel=1e-6)
    assert low.flops == pytest.approx(1e12, rel=0.01)
    assert slices(sizes[:2], flops[:2], y[:2]) == ()
    (falling,) = slices(sizes[:4], flops[:4], 1.0 / sizes[:4])
    assert falling.best is None


def test_the_held_out_run_is_compared_with_the_largest_fitted_one(noisy: Fit) -> None:
    far = np.array([[2e7, 2e5]])
    found = held_out(noisy, noisy.points.x_NK.prod(axis=1), far, np.array([law(2e7, 2e5)]))
    assert found.null == noisy.points.y_N[-1]
    assert found.error < 0.1 < found.null_error
    assert found.predicted_interval[0] < found.predicted < found.predicted_interval[1]


def test_the_frontier_is_what_no_cheaper_run_beats() -> None:
    assert frontier([1, 2, 3, 3, 4], [0.5, 0.6, 0.4, 0.3, 0.3]) == [0, 3]
