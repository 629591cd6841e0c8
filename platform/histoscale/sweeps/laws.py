"""What follows from a fit: the best size for some work, equal-compute slices, and a check on held-out runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.errors import SweepError
from histoscale.sweeps.fits import LEAST_VALUES, Array, Fit, Interval, interval

_ALIKE = 0.1  # logarithms of compute that differ by less are one slice


@dataclass(frozen=True)
class WorkLaw:
    """Work of one image as a power of the size: flops = amount x parameters ** exponent."""

    amount: float
    exponent: float

    def images(self, flops: float, parameters: Array) -> Array:
        """How many images so much work pays for, at each size."""
        images: Array = flops / (self.amount * parameters**self.exponent)
        return images


@dataclass(frozen=True)
class Optimum:
    """The best use of some work, by a fit in parameters and images.

    Attributes:
        flops: The work.
        parameters: The best size.
        parameters_interval: 95 % interval.
        images: That the rest of the work pays for.
        images_interval: 95 % interval.
        y: What the fit expects there.
        y_interval: 95 % interval of the curve.
        extrapolated: The size or the number of images lies outside of what was fitted.
    """

    flops: float
    parameters: float
    parameters_interval: Interval
    images: float
    images_interval: Interval
    y: float
    y_interval: Interval
    extrapolated: bool


@dataclass(frozen=True)
class Slice:
    """Runs of equal work, and the size with the least y by a parabola in the logarithm of the size.

    Attributes:
        flops: Their work, geometric mean.
        parameters_N: Sizes, ascending.
        y_N: Mean at each size.
        best: The parabola's lowest point; None where it has none inside of what was tried.
    """

    flops: float
    parameters_N: Array
    y_N: Array
    best: float | None


@dataclass(frozen=True)
class HeldOut:
    """How well a fit of smaller runs foretells the largest, beside saying "as good as the largest that was fitted".

    Attributes:
        observed: Mean of the held-out runs.
        predicted: By the fit.
        predicted_interval: Where 95 % of single runs should lie.
        null: Mean of the largest fitted runs.
    """

    observed: float
    predicted: float
    predicted_interval: Interval
    null: float

    @property
    def error(self) -> float:
        """Of the fit, as a share of what was observed."""
        return abs(self.predicted - self.observed) / self.observed

    @property
    def null_error(self) -> float:
        """Of the null model, likewise."""
        return abs(self.null - self.observed) / self.observed


def work_law(parameters_N: Array, flops_per_image_N: Array) -> WorkLaw:
    """The power law through sizes and their work for an image; a single size has work in proportion to it."""
    logs = np.log(parameters_N)
    if np.ptp(logs) < _ALIKE:
        return WorkLaw(float(np.mean(flops_per_image_N / parameters_N)), 1.0)
    exponent, constant = np.polyfit(logs, np.log(flops_per_image_N), 1)
    return WorkLaw(float(np.exp(constant)), float(exponent))


def optimum(fit: Fit, work: WorkLaw, flops: float) -> Optimum:
    """The size that spends the work best: where E + A N^-a + B D^-b is least with amount x N^k x D = flops.

    At the least, a A N^-a = k b B D^-b; with D from the work this is one equation for log N.

    Args:
        fit: In parameters and images, in this order.
        work: Of one image by size.
        flops: The work.

    Raises:
        SweepError: The fit says that size, or data, changes nothing: there is no best size.
    """
    best = _best_size(fit.parameters_P[None], fit.centre_K, work, flops)[0]
    if not np.isfinite(best):
        raise SweepError(
            "the fit knows no best size, as one of its exponents is 0",
            value=", ".join(f"{name} {value:.3g}" for name, value in zip(fit.points.names, fit.exponents, strict=True)),
            expected="exponents above 0",
            remedy="spread sizes and budgets further, or repeat runs with more seeds",
        )
    sizes_R = _best_size(fit.samples_RP, fit.centre_K, work, flops)
    # By some resamples size, or data, changes nothing: the best size is then the smallest or the largest that there is.
    affordable = (flops / work.amount) ** (1.0 / work.exponent)
    sizes_R = np.clip(np.nan_to_num(sizes_R, nan=best, posinf=affordable), 1.0, affordable)
    images = float(work.images(flops, np.array(best)))
    y, low, high = fit.predict(np.array([[best, images]]))
    tried = [(values.min(), values.max()) for values in fit.points.x_NK.T]
    return Optimum(
        flops=flops,
        parameters=float(best),
        parameters_interval=interval(sizes_R),
        images=images,
        images_interval=interval(work.images(flops, sizes_R)),
        y=float(y[0]),
        y_interval=(float(low[0]), float(high[0])),
        extrapolated=not all(low <= x <= high for x, (low, high) in zip((best, images), tried, strict=True)),
    )


def _best_size(parameters_RP: Array, centre_K: Array, work: WorkLaw, flops: float) -> Array:
    """The best size by each of R laws: [R]; NaN or infinite where there is none."""
    log_a, alpha, log_b, beta = parameters_RP[:, 1:5].T
    log_a, log_b = log_a + alpha * np.log(centre_K[0]), log_b + beta * np.log(centre_K[1])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = log_a + np.log(alpha) - log_b - np.log(beta) - np.log(work.exponent)
        affordable = np.log(flops) - np.log(work.amount)
        sizes: Array = np.exp((ratio + beta * affordable) / (alpha + beta * work.exponent))
    return sizes


def slices(parameters_N: Array, flops_N: Array, y_N: Array) -> tuple[Slice, ...]:
    """Equal-compute slices among runs: groups of alike work with three sizes or more, ascending in work."""
    order = np.argsort(flops_N)
    groups: list[list[int]] = []
    for n in order.tolist():
        if groups and np.log(flops_N[n] / flops_N[groups[-1][0]]) < _ALIKE:
            groups[-1].append(n)
        else:
            groups.append([n])
    found = []
    for group in groups:
        sizes = np.unique(parameters_N[group])
        if len(sizes) >= LEAST_VALUES:
            means = np.array([np.mean([y_N[n] for n in group if parameters_N[n] == size]) for size in sizes])
            work = float(np.exp(np.mean(np.log(flops_N[group]))))
            found.append(Slice(work, sizes, means, _lowest(sizes, means)))
    return tuple(found)


def _lowest(sizes: Array, y: Array) -> float | None:
    bend, slope, _ = np.polyfit(np.log(sizes), np.log(y), 2)
    if bend <= 0.0:
        return None
    best = -slope / (2.0 * bend)
    return float(np.exp(best)) if np.log(sizes[0]) <= best <= np.log(sizes[-1]) else None


def held_out(fit: Fit, flops_N: Array, x_MK: Array, y_M: Array) -> HeldOut:
    """The check of a fit on runs that it has not seen.

    Args:
        fit: Of the smaller runs.
        flops_N: Work of each fitted run; the null model is the mean of those of the most.
        x_MK: Where the held-out runs lie.
        y_M: What they reached.
    """
    largest = np.log(flops_N.max() / flops_N) < _ALIKE
    predicted, low, high = (float(np.mean(each)) for each in fit.predict_runs(x_MK))
    return HeldOut(float(np.mean(y_M)), predicted, (low, high), float(np.mean(fit.points.y_N[largest])))


def frontier(flops: Sequence[float], y: Sequence[float]) -> list[int]:
    """Indices of the runs that no cheaper run beats, ascending in work."""
    kept: list[int] = []
    for n in sorted(range(len(y)), key=lambda n: (flops[n], y[n])):
        if not kept or y[n] < y[kept[-1]]:
            kept.append(n)
    return kept
