"""The report of a scaling sweep as one HTML page, for a reader who has not seen the sweep before."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from histoscale.slides.report_charts import page
from histoscale.sweeps.charts import Series, chart
from histoscale.sweeps.fits import Fit, Interval
from histoscale.sweeps.rows import TrialRow
from histoscale.sweeps.scaling import COMPUTE, ERROR, IMAGES, PARAMETERS, Law, ScalingFindings, rounded
from histoscale.sweeps.search import SearchResult, search_results

_CURVE_PLACES = 60
_BEYOND = 3.0  # the curve goes on to so many times the largest run


def scaling_page(findings: ScalingFindings, rows: Sequence[TrialRow], name: str, created: str) -> str:
    """SWEEP/report.html.

    Args:
        findings: What the rows say.
        rows: Of all trials.
        name: Of the sweep, for people.
        created: When, for people.
    """
    judged = [row for row in rows if row.role in ("run", "cooldown") and not row.reason]
    sections = [
        ("The answer", f"<p>{escape(findings.sentence)}</p>"),
        (f"Error on {escape(findings.target)} against work", _along_compute(findings, judged)),
        ("By images, for each size", _along_images(findings, judged)),
        ("Equal work: which size?", _slices(findings)),
        ("Are the fits to be trusted?", _check(findings)),
        ("What the fits say", _laws(findings)),
        ("Learning rate", f"<p>{escape(_lr(findings))}</p>"),
        ("What else was varied", _effects(findings)),
        ("At the scale of published models: EXTRAPOLATION", _extrapolations(findings)),
        *failed_and_all(rows),
    ]
    facts = [
        ("runs judged", f"{len(judged)}"),
        ("trials failed", f"{sum(bool(row.reason) for row in rows)}"),
        ("FLOP in all", f"{sum(row.own_flops for row in rows):.3g}"),
        ("least error", f"{min((row.error(findings.target) for row in judged), default=float('nan')):.3g}"),
    ]
    return page(f"Scaling sweep {name}", f"histoscale, {created}", facts, sections)


def failed_and_all(rows: Sequence[TrialRow]) -> list[tuple[str, str]]:
    """The last sections of every report: what a search found, what failed and why, and a table of all trials."""
    failed = [(row.name, row.reason) for row in rows if row.reason]
    searched = [_search_line(each) for each in search_results(rows)]
    tasks = list(dict.fromkeys(task for row in rows for task in row.scores))
    heads = ["trial", "role", "images", "parameters", "FLOP", *tasks, "loss"]
    body = [
        [
            row.name,
            row.role + (", held out" if row.held_out else ""),
            f"{row.images:,}",
            f"{row.parameters:,}",
            f"{row.flops:.3g}",
            *(f"{row.scores[task]:.3f}" if task in row.scores else "" for task in tasks),
            "" if row.loss is None else f"{row.loss:.4g}",
        ]
        for row in rows
    ]
    heads_of_search = ["setting", "error when found", "error with other seeds", "95 %", "seeds"]
    note = "<p>The error when found is of the best of many, and partly luck: look at the other seeds.</p>"
    return [
        *([("Search", table(heads_of_search, searched) + note)] if searched else []),
        ("Failed trials", table(["trial", "reason"], failed) if failed else "<p>None.</p>"),
        (
            "All trials",
            table(heads, body) + "<p>Scores are balanced accuracies. Losses of two runs with moving teachers "
            "are not comparable: each has its own. The same table is in trials.csv and trials.parquet.</p>",
        ),
    ]


def _search_line(result: SearchResult) -> list[str]:
    return [
        ", ".join(f"{field}={value}" for field, value in result.settings.items()),
        f"{result.found:.4f}",
        "not repeated" if result.again is None else f"{result.again:.4f}",
        "not known" if result.again_interval is None else bounds(result.again_interval, ".4f"),
        str(result.seeds),
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table; text is escaped here."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def bounds(of: Interval, form: str = ".3g") -> str:
    """An interval, for people."""
    return f"{of[0]:{form}} to {of[1]:{form}}"


def _along_compute(findings: ScalingFindings, rows: Sequence[TrialRow]) -> str:
    series = [
        Series(f"{arch}", [(row.flops, row.error(findings.target), row.name) for row in rows if row.arch == arch])
        for arch in dict.fromkeys(row.arch for row in rows)
    ]
    law = _law(findings, ERROR, (COMPUTE,))
    if law is not None and law.fit is not None:
        series.append(_curve("fit through the runs that no cheaper run beats, 95 % of the curve", law.fit))
    if findings.check is not None:
        most = max((row.flops for row in rows if row.held_out), default=float("nan"))
        series.append(
            Series("foretold for the held-out run", [(most, findings.check.predicted, "foretold")], hollow=True)
        )
    note = "" if law is None or law.fit is not None else f"<p>No curve: {escape(law.refusal)}</p>"
    return chart(series, "FLOP since new weights", "error", log_y=True) + note


def _along_images(findings: ScalingFindings, rows: Sequence[TrialRow]) -> str:
    series = []
    law = _law(findings, ERROR, (PARAMETERS, IMAGES))
    for arch in dict.fromkeys(row.arch for row in rows):
        own = [row for row in rows if row.arch == arch]
        points = [(float(row.images), row.error(findings.target), row.name) for row in own]
        curve: list[tuple[float, float]] = []
        if law is not None and law.fit is not None:
            xs = np.geomspace(min(row.images for row in own), max(row.images for row in own), _CURVE_PLACES)
            ys, _, _ = law.fit.predict(np.stack([np.full_like(xs, own[0].parameters), xs], axis=1))
            curve = list(zip(xs.tolist(), ys.tolist(), strict=True))
        series.append(Series(arch, points, curve))
    note = "" if law is None or law.fit is not None else f"<p>No curves: {escape(law.refusal)}</p>"
    return chart(series, "images seen", "error", log_y=True) + note


def _curve(name: str, fit: Fit) -> Series:
    xs = fit.points.x_NK[:, 0]
    places = np.geomspace(xs.min(), xs.max() * _BEYOND, _CURVE_PLACES)
    best, low, high = fit.predict(places[:, None])
    return Series(
        name,
        curve=list(zip(places.tolist(), best.tolist(), strict=True)),
        band=list(zip(places.tolist(), low.tolist(), high.tolist(), strict=True)),
    )


def _slices(findings: ScalingFindings) -> str:
    if not findings.slices:
        return "<p>No three sizes were trained with equal work: budgets_flops of the spec makes such slices.</p>"
    series = [
        Series(
            f"{each.flops:.3g} FLOP" + ("" if each.best is None else f": least at {rounded(each.best)} parameters"),
            [(x, y, f"{x:,.0f}") for x, y in zip(each.parameters_N.tolist(), each.y_N.tolist(), strict=True)],
            list(zip(each.parameters_N.tolist(), each.y_N.tolist(), strict=True)),
        )
        for each in findings.slices
    ]
    return chart(series, "parameters", "error", log_y=True)


def _check(findings: ScalingFindings) -> str:
    check = findings.check
    if check is None:
        return f"<p>Not checked. {escape(findings.check_refusal)}</p>"
    rows = [
        [
            "fit of the smaller runs",
            f"{check.predicted:.4g} ({bounds(check.predicted_interval)})",
            f"{check.error:.1%}",
        ],
        ["equal to the largest fitted run", f"{check.null:.4g}", f"{check.null_error:.1%}"],
    ]
    return (
        f"<p>The largest run was left out of every fit. It reached {check.observed:.4g}.</p>"
        f"{table(['foretold by', 'error', 'off by'], rows)}"
        "<p>Where the second line is the better one, the fits say nothing beyond the runs that they were made of.</p>"
    )


def _laws(findings: ScalingFindings) -> str:
    rows = []
    for law in findings.laws:
        along = " and ".join(law.along)
        if law.fit is None:
            rows.append([law.of, along, law.runs, "no fit", law.refusal])
            continue
        exponents = "; ".join(
            f"{name}: {value:.3g} ({bounds(ends)})"
            for name, value, ends in zip(law.along, law.fit.exponents, law.fit.exponent_intervals, strict=True)
        )
        offset = f"{law.fit.offset:.3g} ({bounds(law.fit.offset_interval)})"
        rows.append([law.of, along, law.runs, offset, exponents])
    heads = ["what falls", "along", "runs", "what stays for ever", "exponents"]
    return table(heads, rows) + (
        "<p>y = E + A / x^alpha. In brackets are 95 % intervals; docs/guides/sweeps.md says how often they were found "
        "to hold.</p>"
    )


def _lr(findings: ScalingFindings) -> str:
    if findings.lr is None:
        return "No rule of the learning rate was tested: sizes may differ in how well their rate suits them, too."
    return findings.lr.sentence()


def _effects(findings: ScalingFindings) -> str:
    rows = [
        [
            each.field,
            f"{each.value} instead of {each.base}",
            f"{each.difference:+.4f}",
            "one pair: not known" if each.difference_interval is None else bounds(each.difference_interval, "+.4f"),
            str(each.pairs),
        ]
        for each in findings.effects
    ]
    if not rows:
        return "<p>Nothing.</p>"
    return table(["field", "value", "change of the error", "95 %", "pairs of runs"], rows)


def _extrapolations(findings: ScalingFindings) -> str:
    price = findings.price
    rows = [
        [
            each.name,
            f"{each.parameters:,}",
            f"{each.images:,}",
            f"{each.flops:.3g} ({each.factor:,.3g} times the largest run)",
            f"{each.gpu_hours:,.0f}",
            f"{each.usd:,.0f}",
            "no fit"
            if each.error is None or each.error_interval is None
            else f"{each.error:.3g} ({bounds(each.error_interval)})",
        ]
        for each in findings.extrapolations
    ]
    heads = ["scale of", "parameters", "images", "FLOP", f"{price.gpu}-hours", "USD", "error by the fit"]
    return (
        table(heads, rows) + "<p><b>Extrapolation.</b> Nothing of this was run. Hours are work over "
        f"{price.mfu:.0%} of {price.peak_tflops:g} TFLOP/s, {price.usd_per_gpu_hour:g} USD each at the prices of "
        f"{price.as_of}, both as the spec states them. The interval knows the scatter of "
        "these runs alone: not other data, other crops, nor whether the law goes on.</p>"
    )


def _law(findings: ScalingFindings, of: str, along: tuple[str, ...]) -> Law | None:
    found: Mapping[tuple[str, tuple[str, ...]], Law] = {(law.of, law.along): law for law in findings.laws}
    return found.get((of, along))
