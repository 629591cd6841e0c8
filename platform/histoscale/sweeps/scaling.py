"""Findings of a scaling sweep: from the rows of its trials to fits, the best size, extrapolations and one sentence."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.config.archs import ARCHS
from histoscale.config.recipe import ModelSection, Recipe
from histoscale.errors import SweepError
from histoscale.sweeps.fits import Array, Fit, Interval, Points, fit_power_law, t_interval
from histoscale.sweeps.laws import HeldOut, Optimum, Slice, WorkLaw, frontier, held_out, optimum, slices, work_law
from histoscale.sweeps.rows import TrialRow
from histoscale.sweeps.rules import LrCheck, check_lr
from histoscale.sweeps.spec import Price, ScalingSpec
from histoscale.train.flops import step_flops_per_tile
from histoscale.train.memory import backbone_parameters

ERROR, LOSS = "error", "loss"
PARAMETERS, IMAGES, COMPUTE, SLIDES = "parameters", "images", "FLOP", "slides"
# Name -> size, and tiles seen; the tiles are told by one unreliable note, see docs/recipes.md.
_PUBLISHED = {"Virchow2": ("vit_h14_reg4", 1_700_000_000), "Virchow2G": ("vit_gigantic14_reg8", 1_900_000_000)}


@dataclass(frozen=True)
class Law:
    """One fit that was asked for.

    Attributes:
        of: What falls: the error of the probe, or the loss.
        along: The variables.
        runs: Which runs it was fitted to, for people.
        fit: The fit; None where the runs could not tell one.
        refusal: Why there is none, and what to do.
    """

    of: str
    along: tuple[str, ...]
    runs: str
    fit: Fit | None
    refusal: str = ""


@dataclass(frozen=True)
class Extrapolation:
    """What a run far beyond the sweep would cost, and what the fit expects of it.

    Attributes:
        name: Of the published model that has this scale.
        parameters: Of its backbone.
        images: That it sees.
        flops: Of its training.
        gpu_hours: At the spec's GPU and share of its peak.
        usd: At the spec's price.
        error: By the fit; None without one.
        error_interval: Of a single run, by the fit alone.
        factor: Times the work of the largest fitted run.
    """

    name: str
    parameters: int
    images: int
    flops: float
    gpu_hours: float
    usd: float
    error: float | None
    error_interval: Interval | None
    factor: float


@dataclass(frozen=True)
class Effect:
    """What a value of the grid changes, all else equal.

    Attributes:
        field: Of the recipe.
        value: Compared with `base`.
        base: The first value of the grid.
        difference: Mean of the error less that of `base`.
        difference_interval: 95 %, by Student's t; None for a single pair.
        pairs: How many pairs of runs.
    """

    field: str
    value: str
    base: str
    difference: float
    difference_interval: Interval | None
    pairs: int


@dataclass(frozen=True)
class ScalingFindings:
    """What a scaling sweep found.

    Attributes:
        sentence: The answer.
        target: The task whose error decides.
        laws: Every fit that was asked for, the one in parameters and images first.
        check: Of the held-out runs; None where none could be foretold.
        check_refusal: Why.
        best: The best use of the work of the largest run; None without a fit.
        slices: Equal-compute slices.
        lr: How well the rule of the rate holds; None where it was not tested.
        effects: Of the values of the grid, and of fewer slides.
        extrapolations: To published scales.
        work: Of one image by size.
        price: Of the work.
    """

    sentence: str
    target: str
    laws: tuple[Law, ...]
    check: HeldOut | None
    check_refusal: str
    best: Optimum | None
    slices: tuple[Slice, ...]
    lr: LrCheck | None
    effects: tuple[Effect, ...]
    extrapolations: tuple[Extrapolation, ...]
    work: WorkLaw
    price: Price


def analyse_scaling(spec: ScalingSpec, rows: Sequence[TrialRow], resamples: int = 200) -> ScalingFindings:
    """What the rows of a sweep's trials say.

    Args:
        spec: Of the sweep.
        rows: One for each trial that has ended.
        resamples: Of each fit.

    Raises:
        SweepError: No trial has ended with a score.
    """
    target = spec.evaluation.target
    judged = [row for row in rows if row.role in ("run", "cooldown") and not row.reason and target in row.scores]
    if not judged:
        raise SweepError(
            "no trial has ended with a score",
            value=f"{sum(bool(row.reason) for row in rows)} of {len(rows)} failed",
            expected="runs that were judged",
            remedy="read the reasons of the failed trials in the table, and run the same command again",
        )
    plain = _one_setting(judged)
    law_of = _Laws(plain, target, resamples)
    laws = law_of.all()
    check, refusal = _check(law_of, plain, target)
    work = work_law(_column(plain, PARAMETERS), _column(plain, COMPUTE) / _column(plain, IMAGES))
    best = _best(laws[0], work, max(row.flops for row in plain))
    errors = np.array([row.error(target) for row in plain])
    return ScalingFindings(
        sentence=_sentence(laws[0], check, refusal, best, plain, target),
        target=target,
        laws=laws,
        check=check,
        check_refusal=refusal,
        best=best,
        slices=slices(_column(plain, PARAMETERS), _column(plain, COMPUTE), errors),
        lr=check_lr(spec.lr_rule, rows, target) if spec.lr_rule and spec.lr_rule.check_factors else None,
        effects=_effects(judged, target),
        extrapolations=tuple(_extrapolate(name, laws, plain, spec.price) for name in _PUBLISHED),
        work=work,
        price=spec.price,
    )


def _one_setting(rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The rows with the first combination of the grid: a fit over several would mix two causes."""
    first = rows[0]
    return [row for row in rows if (dict(row.settings), row.slides) == (dict(first.settings), first.slides)]


def _column(rows: Sequence[TrialRow], name: str) -> Array:
    attribute = {PARAMETERS: "parameters", IMAGES: "images", COMPUTE: "flops", SLIDES: "slides"}[name]
    return np.array([getattr(row, attribute) for row in rows], np.float64)


def _richest(rows: Sequence[TrialRow], fixed: str, varied: str) -> list[TrialRow]:
    """The runs of one value of `fixed`: of those with the most values of `varied`, the largest."""
    places: dict[float, set[float]] = {}
    for at, value in zip(_column(rows, fixed).tolist(), _column(rows, varied).tolist(), strict=True):
        places.setdefault(at, set()).add(value)
    best = max(places, key=lambda at: (len(places[at]), at), default=0.0)
    return [row for row, at in zip(rows, _column(rows, fixed).tolist(), strict=True) if at == best]


def rounded(value: float) -> str:
    """A number for people: `3.94 million`."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{float(f'{value:.3g}'):,.0f}"


class _Laws:
    """Fits of the runs that are not held out."""

    def __init__(self, rows: Sequence[TrialRow], target: str, resamples: int) -> None:
        self.rows = [row for row in rows if not row.held_out]
        self._target, self._resamples = target, resamples

    def all(self) -> tuple[Law, ...]:
        """Every fit: of the error, then of the loss."""
        rows = self.rows
        widest = _richest(rows, PARAMETERS, IMAGES)
        longest = _richest(rows, IMAGES, PARAMETERS)
        laws = []
        for of in (ERROR, LOSS):
            laws += [
                self.fit(of, (PARAMETERS, IMAGES), rows, "all fitted runs"),
                self.fit(of, (COMPUTE,), self._cheapest(of), "runs that no cheaper run beats"),
                self.fit(of, (IMAGES,), widest, "runs of one model"),
                self.fit(of, (PARAMETERS,), longest, "runs of one number of images"),
            ]
        return tuple(laws)

    def fit(self, of: str, along: tuple[str, ...], rows: Sequence[TrialRow], runs: str) -> Law:
        """One fit, or why there is none."""
        value = self._value(of)
        points = Points(
            names=along,
            x_NK=np.stack([_column(rows, name) for name in along], axis=1),
            y_N=np.array([value(row) for row in rows]),
            labels=tuple(row.name for row in rows),
            chance=1.0 - rows[0].chance[self._target]
            if of == ERROR and rows and self._target in rows[0].chance
            else None,
        )
        try:
            return Law(of, along, runs, fit_power_law(points, self._resamples))
        except SweepError as error:
            return Law(of, along, runs, None, str(error))

    def _cheapest(self, of: str) -> list[TrialRow]:
        value = self._value(of)
        rows = [row for row in self.rows if math.isfinite(value(row))]
        return [rows[n] for n in frontier([row.flops for row in rows], [value(row) for row in rows])]

    def _value(self, of: str) -> Callable[[TrialRow], float]:
        if of == ERROR:
            return lambda row: row.error(self._target)
        return lambda row: math.nan if row.loss is None else row.loss


def _check(law_of: _Laws, rows: Sequence[TrialRow], target: str) -> tuple[HeldOut | None, str]:
    out = [row for row in rows if row.held_out]
    if not out:
        return None, "No held-out run has ended: nothing shows how far these fits foretell."
    refusals = []
    for along in ((PARAMETERS, IMAGES), (COMPUTE,)):
        law = law_of.fit(ERROR, along, law_of.rows, "all fitted runs")
        if law.fit is not None:
            x_MK = np.stack([_column(out, name) for name in along], axis=1)
            observed = np.array([row.error(target) for row in out])
            return held_out(law.fit, _column(law_of.rows, COMPUTE), x_MK, observed), ""
        refusals.append(law.refusal)
    return None, refusals[0]


def _best(law: Law, work: WorkLaw, flops: float) -> Optimum | None:
    if law.fit is None:
        return None
    try:
        return optimum(law.fit, work, flops)
    except SweepError:
        return None


def _extrapolate(name: str, laws: Sequence[Law], rows: Sequence[TrialRow], price: Price) -> Extrapolation:
    arch, images = _PUBLISHED[name]
    recipe = Recipe(model=ModelSection(arch=arch))
    flops = step_flops_per_tile(recipe, ARCHS[arch]) * images
    parameters = backbone_parameters(ARCHS[arch], recipe.crops.global_px, recipe.model.qk_norm)
    hours = price.gpu_hours(flops)
    at: Mapping[str, float] = {PARAMETERS: parameters, IMAGES: images, COMPUTE: flops}
    law = next((law for law in laws[:2] if law.fit is not None), None)
    error = bounds = None
    if law is not None and law.fit is not None:
        value, low, high = law.fit.predict_runs(np.array([[at[variable] for variable in law.along]]))
        error, bounds = float(value[0]), (float(low[0]), float(high[0]))
    most = max(row.flops for row in rows)
    return Extrapolation(
        name, parameters, images, flops, hours, hours * price.usd_per_gpu_hour, error, bounds, flops / most
    )


def _effects(rows: Sequence[TrialRow], target: str) -> tuple[Effect, ...]:
    """Each value of each field against the first one, over pairs of runs that agree in all else."""
    effects = []
    fields = list(dict.fromkeys(field for row in rows for field in row.settings))
    for field in [*fields, SLIDES]:
        of = [{**row.settings, SLIDES: "all" if row.slides is None else f"{row.slides}"} for row in rows]
        values = list(dict.fromkeys(each[field] for each in of))
        alike = [
            (row.arch, row.images, row.seed, *((name, value) for name, value in sorted(each.items()) if name != field))
            for row, each in zip(rows, of, strict=True)
        ]
        error = {(each[field], place): row.error(target) for row, each, place in zip(rows, of, alike, strict=True)}
        for value in values[1:]:
            pairs = [
                error[value, place] - error[values[0], place]
                for place in dict.fromkeys(alike)
                if (value, place) in error and (values[0], place) in error
            ]
            if pairs:
                effects.append(Effect(field, value, values[0], statistics.fmean(pairs), t_interval(pairs), len(pairs)))
    return tuple(effects)


def _sentence(
    law: Law,
    check: HeldOut | None,
    refusal: str,
    best: Optimum | None,
    rows: Sequence[TrialRow],
    target: str,
) -> str:
    if best is None:
        least = min(rows, key=lambda row: row.error(target))
        reason = law.refusal or "The fit knows no best size."
        return (
            f"This sweep cannot say which model is best: {reason} The least error on {target} was "
            f"{least.error(target):.3g}, by {least.arch} after {least.images:,} images."
        )
    nearest = min(rows, key=lambda row: abs(math.log(row.parameters / best.parameters)))
    size, images = (
        f"{rounded(low)} to {rounded(high)}" for low, high in (best.parameters_interval, best.images_interval)
    )
    where = "; this lies outside of what was tried" if best.extrapolated else f", nearest is {nearest.arch}"
    answer = (
        f"With {best.flops:.3g} FLOP, the work of the largest run, a model of {rounded(best.parameters)} parameters "
        f"({size}) that sees {rounded(best.images)} images ({images}) does best{where}: the fit expects an error on "
        f"{target} of {best.y:.3g} ({best.y_interval[0]:.3g} to {best.y_interval[1]:.3g})."
    )
    if check is None:
        return f"{answer} Not checked: {refusal}"
    verdict = (
        "so the fit foretells more than that"
        if check.error < check.null_error
        else "so the fit foretells no better than that: do not rely on it beyond the runs"
    )
    return (
        f"{answer} Of the held-out run it was {check.error:.1%} off, and 'as good as the largest fitted run' "
        f"{check.null_error:.1%}, {verdict}."
    )
