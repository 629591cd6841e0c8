"""Does the rule of the learning rate hold? From runs at multiples of its rate, at several widths."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from histoscale.config.archs import ARCHS
from histoscale.sweeps.rows import TrialRow
from histoscale.sweeps.spec import LrRule


@dataclass(frozen=True)
class LrCheck:
    """How well a rule of the rate holds.

    Attributes:
        errors: Architecture -> multiple of the rule's rate -> mean error.
        best: Architecture -> the multiple with the least error.
        exponent: Of the width, by the best multiples: rate ~ width ** -exponent; None with one width.
        stated: The rule's exponent.
        holds: The best multiple is 1 at every width.
        at_an_end: Architectures whose best multiple is the largest or the smallest that was tried.
    """

    errors: Mapping[str, Mapping[float, float]]
    best: Mapping[str, float]
    exponent: float | None
    stated: float
    holds: bool
    at_an_end: tuple[str, ...]

    def sentence(self) -> str:
        """The verdict, for people."""
        if not self.best:
            return "The rule of the learning rate was not tested: no run at another multiple of its rate has ended."
        best = ", ".join(f"{factor:g} at {arch}" for arch, factor in self.best.items())
        if self.holds:
            return f"The rule of the learning rate holds: its own rate does best at every width ({best})."
        ends = f" At {', '.join(self.at_an_end)} the best may lie beyond what was tried." if self.at_an_end else ""
        found = "" if self.exponent is None else f" The best rates go as width^-{self.exponent:.2f}."
        return (
            f"The rule of the learning rate (width^-{self.stated:g}) does not hold within the steps tried: the best "
            f"multiples are {best}.{found}{ends} Sizes then differ in how well their rate suits them, too."
        )


def check_lr(rule: LrRule, rows: Sequence[TrialRow], target: str) -> LrCheck:
    """The check of a rule.

    Args:
        rule: What was stated.
        rows: Of all trials; those of role `lr_check`, and those beside them at the rule's own rate, are looked at.
        target: The task that decides.
    """
    done = [row for row in rows if not row.reason and math.isfinite(row.error(target))]
    places = {_place(row) for row in done if row.role == "lr_check"}
    found: dict[str, dict[float, list[float]]] = {}
    for row in done:
        if row.role in ("lr_check", "run", "cooldown") and _place(row) in places:
            found.setdefault(row.arch, {}).setdefault(row.lr_factor, []).append(row.error(target))
    errors = {
        arch: {factor: statistics.fmean(values) for factor, values in sorted(each.items())}
        for arch, each in found.items()
    }
    best = {arch: min(each, key=lambda factor: (each[factor], abs(math.log(factor)))) for arch, each in errors.items()}
    return LrCheck(
        errors=errors,
        best=best,
        exponent=_exponent(rule, best),
        stated=rule.width_exponent,
        holds=bool(best) and all(factor == 1.0 for factor in best.values()),
        at_an_end=tuple(arch for arch, factor in best.items() if factor in (min(errors[arch]), max(errors[arch]))),
    )


def _place(row: TrialRow) -> tuple[object, ...]:
    return row.arch, row.images, row.seed, row.slides, *sorted(row.settings.items())


def _exponent(rule: LrRule, best: Mapping[str, float]) -> float | None:
    widths = np.log([ARCHS[arch].width for arch in best])
    if len(set(widths.tolist())) < 2:
        return None
    slope, _ = np.polyfit(widths, np.log(list(best.values())), 1)
    return rule.width_exponent - float(slope)
