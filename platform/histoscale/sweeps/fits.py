"""Power laws with an offset, y = E + sum of A_k x_k^-alpha_k, fitted to finished runs, with bootstrap intervals.

The way is that of Hoffmann et al. (arXiv 2203.15556): E and A are fitted as logarithms through a log-sum-exp, the
residuals are those of log y under a Huber loss, and the least of many starts counts. Residuals are summed and not
averaged, as Besiroglu et al. (arXiv 2404.10102) found that an average lets the optimiser stop early.

Intervals resample residuals: points stay where they are, so that a grid of few runs never loses its smallest or largest
one, and the spread of log y is taken to be the same everywhere. Residuals of a fit are too small by the parameters that
it has, and that few of them tell their own spread badly makes intervals wider, too: sqrt(n / (n - p)) and Student's t
over the normal quantile make up for both.

Shape suffixes: N runs, K variables, R resamples, P = 1 + 2 K parameters: log E, then log A_k and alpha_k of each.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import least_squares
from scipy.special import logsumexp, softmax

from histoscale.errors import SweepError
from histoscale.seeding import key, uniforms

HUBER_DELTA = 1e-2
"""Of log y: below the scatter of runs, so that one bad run hardly counts. Hoffmann et al. have 1e-3, with
which a fit took three times as long."""
RESAMPLES = 200
LEVEL = 0.95
LEAST_VALUES = 3
"""Of each variable: with two, nothing tells an offset from an exponent."""

_START_SHARES = (0.05, 0.5, 0.9)  # of the offset in the least y
_START_EXPONENTS = (0.1, 0.4, 1.0)
_MAX_EXPONENT = 3.0
_LOG_FLOOR = 12.0  # an offset or a term of e^-12 of the least y is none
_INSIDE = 1e-6
_NORMAL = float(stats.norm.ppf((1.0 + LEVEL) / 2.0))

Array = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Points:
    """Finished runs as a fit sees them.

    Attributes:
        names: Of the K variables, as people say them.
        x_NK: Their values, above 0.
        y_N: What is fitted: errors or losses.
        labels: Names of the runs.
        chance: y of guessing; None where there is no such thing.
    """

    names: tuple[str, ...]
    x_NK: Array
    y_N: Array
    labels: tuple[str, ...]
    chance: float | None = None


@dataclass(frozen=True)
class Fit:
    """A power law and what its resamples say.

    Attributes:
        points: What it was fitted to.
        centre_K: Geometric mean of each variable; x is counted in it.
        parameters_P: The best fit.
        samples_RP: That of each resample.
        residuals_N: Of log y, as large as those of a new run.
    """

    points: Points
    centre_K: Array
    parameters_P: Array
    samples_RP: Array
    residuals_N: Array

    @property
    def offset(self) -> float:
        """E, what is left with endless x."""
        return float(np.exp(self.parameters_P[0]))

    @property
    def offset_interval(self) -> Interval:
        """95 % interval of E."""
        return interval(np.exp(self.samples_RP[:, 0]))

    @property
    def exponents(self) -> tuple[float, ...]:
        """The exponent of each variable."""
        return tuple(map(float, self.parameters_P[2::2]))

    @property
    def exponent_intervals(self) -> tuple[Interval, ...]:
        """95 % interval of each alpha."""
        return tuple(interval(samples) for samples in self.samples_RP[:, 2::2].T)

    def predict(self, x_MK: Array) -> tuple[Array, Array, Array]:
        """The curve at M places, and the 95 % interval of the curve: [M] each."""
        best_M, samples_RM = self._at(x_MK)
        low_M, high_M = np.quantile(samples_RM, _tails(), axis=0)
        return best_M, low_M, high_M

    def predict_runs(self, x_MK: Array) -> tuple[Array, Array, Array]:
        """The curve at M places, and between which values 95 % of single runs there lie: [M] each."""
        best_M, samples_RM = self._at(x_MK)
        noise_RM = _drawn(self.residuals_N, len(samples_RM), samples_RM.shape[1], "runs")
        low_M, high_M = np.quantile(samples_RM * np.exp(noise_RM), _tails(), axis=0)
        return best_M, low_M, high_M

    def _at(self, x_MK: Array) -> tuple[Array, Array]:
        u_MK = np.log(np.asarray(x_MK, np.float64) / self.centre_K)
        curves = [np.exp(_log_law(each_P, u_MK)) for each_P in (self.parameters_P, *self.samples_RP)]
        return curves[0], np.stack(curves[1:])


def fit_power_law(points: Points, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """The power law of finished runs.

    Args:
        points: The runs.
        resamples: R.
        seed: Of the resamples.

    Raises:
        SweepError: The runs cannot tell a power law: too few, all alike, diverged, or no better than chance.
    """
    require_fit_for_fitting(points)
    centre_K = np.exp(np.log(points.x_NK).mean(axis=0))
    u_NK, log_y_N = np.log(points.x_NK / centre_K), np.log(points.y_N)
    best_P = _best(u_NK, log_y_N, _starts(u_NK, log_y_N))
    count, free = len(log_y_N), len(log_y_N) - len(best_P)
    curve_N = _log_law(best_P, u_NK)
    residuals_N = (log_y_N - curve_N) * np.sqrt(count / free) * stats.t.ppf(_tails()[1], free) / _NORMAL
    drawn_RN = _drawn(residuals_N, resamples, count, "fit", seed)
    samples = [_best(u_NK, curve_N + noise_N, (best_P,)) for noise_N in drawn_RN]
    return Fit(points, centre_K, best_P, np.array(samples), residuals_N)


def require_fit_for_fitting(points: Points) -> None:
    """Refuse runs that cannot tell a power law, with advice.

    Raises:
        SweepError: See `fit_power_law`.
    """
    count, needed = len(points.y_N), 1 + 2 * points.x_NK.shape[1]
    broken = [label for label, y in zip(points.labels, points.y_N, strict=True) if not np.isfinite(y)]
    if broken:
        raise SweepError(
            "a run that diverged cannot be fitted",
            value=", ".join(broken),
            expected="finite values",
            remedy="look at its report, lower optim.lr for its size (lr_rule), and run it again or leave it out",
        )
    chance = np.inf if points.chance is None else points.chance
    at_chance = [label for label, y in zip(points.labels, points.y_N, strict=True) if y >= chance]
    if at_chance:
        raise SweepError(
            "a run that is no better than guessing says nothing of a power law",
            value=", ".join(at_chance),
            expected=f"an error below {chance:.3g}",
            remedy="raise the smallest budget, lower optim.lr, or take a dataset that small runs learn something of",
        )
    if np.min(points.y_N, initial=np.inf) <= 0.0:
        raise SweepError(
            "a run without any error has no logarithm",
            value=points.labels[int(np.argmin(points.y_N))],
            expected="errors above 0",
            remedy="take a harder dataset",
        )
    for name, values in zip(points.names, points.x_NK.T, strict=True):
        if (distinct := len(np.unique(values))) < LEAST_VALUES:
            raise SweepError(
                f"a power law in {name} needs more values of it",
                value=distinct,
                expected=f"{LEAST_VALUES} or more",
                remedy=f"add runs of other {name}",
            )
    if count <= needed:
        raise SweepError(
            f"a power law in {' and '.join(points.names)} has {needed} parameters, too many for the runs",
            value=count,
            expected=f"{needed + 1} runs or more, so that one is left to judge the fit by",
            remedy="add budgets, sizes or seeds",
        )
    if np.ptp(points.y_N) <= 1e-9 * np.max(points.y_N):
        raise SweepError(
            "all runs are alike",
            value=float(points.y_N[0]),
            expected="values that change with the budget",
            remedy="spread the budgets over a decade or more, or take another dataset",
        )


def interval(samples: Array) -> Interval:
    """Between which values the middle 95 % of the samples lie."""
    low, high = np.quantile(samples, _tails())
    return float(low), float(high)


def t_interval(values: Sequence[float]) -> Interval | None:
    """95 % interval of a mean by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    mean, half = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half *= float(stats.t.ppf(0.975, len(values) - 1))
    return mean - half, mean + half


def _tails() -> tuple[float, float]:
    return (1.0 - LEVEL) / 2.0, (1.0 + LEVEL) / 2.0


def _drawn(values_N: Array, rows: int, columns: int, purpose: str, seed: int = 0) -> Array:
    """Draws with replacement: [rows, columns]."""
    uniform = uniforms(key(seed, "sweep", purpose), np.arange(rows, dtype=np.int64), columns)
    drawn: Array = values_N[(uniform * len(values_N)).astype(np.int64)]
    return drawn


def _terms(parameters_P: Array, u_NK: Array) -> Array:
    """Logarithms of the offset and of each term: [N, 1 + K]."""
    terms_NK = parameters_P[1::2] - parameters_P[2::2] * u_NK
    return np.concatenate([np.full((len(u_NK), 1), parameters_P[0]), terms_NK], axis=1)


def _log_law(parameters_P: Array, u_NK: Array) -> Array:
    log_y: Array = logsumexp(_terms(parameters_P, u_NK), axis=1)
    return log_y


def _jacobian(parameters_P: Array, u_NK: Array) -> Array:
    weights = softmax(_terms(parameters_P, u_NK), axis=1)
    jacobian = np.empty((len(u_NK), len(parameters_P)))
    jacobian[:, 0] = weights[:, 0]
    jacobian[:, 1::2] = weights[:, 1:]
    jacobian[:, 2::2] = -weights[:, 1:] * u_NK
    return jacobian


def _bounds(log_y_N: Array, variables: int) -> tuple[Array, Array]:
    low, high = float(log_y_N.min()), float(log_y_N.max())
    lower = [low - _LOG_FLOOR, *([low - _LOG_FLOOR, 0.0] * variables)]
    upper = [high, *([high + _LOG_FLOOR, _MAX_EXPONENT] * variables)]
    return np.array(lower), np.array(upper)


def _starts(u_NK: Array, log_y_N: Array) -> list[Array]:
    variables, least = u_NK.shape[1], float(log_y_N.min())
    spread = np.log(np.mean(np.exp(log_y_N)))
    return [
        np.array(
            [
                least + np.log(share),
                *itertools.chain.from_iterable(
                    (spread + np.log((1.0 - share * 0.9) / variables), exponent) for exponent in exponents
                ),
            ]
        )
        for share in _START_SHARES
        for exponents in itertools.product(_START_EXPONENTS, repeat=variables)
    ]


def _best(u_NK: Array, log_y_N: Array, starts: Sequence[Array]) -> Array:
    """The parameters of least loss over all starts."""
    lower, upper = _bounds(log_y_N, u_NK.shape[1])
    found = [
        least_squares(
            lambda parameters: _log_law(parameters, u_NK) - log_y_N,
            np.clip(start, lower + _INSIDE, upper - _INSIDE),
            jac=lambda parameters: _jacobian(parameters, u_NK),
            bounds=(lower, upper),
            loss="huber",
            f_scale=HUBER_DELTA,
        )
        for start in starts
    ]
    best: Array = min(found, key=lambda result: result.cost).x
    return best
