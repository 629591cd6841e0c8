"""The curves of a run as pictures for its report: SVG, with spikes kept however many steps there are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from histoscale.sampling.tile_groups import BY_MPP, BY_STRATUM

_WIDTH, _HEIGHT, _LEFT, _FOOT = 860, 190, 64, 44
_BUCKETS = 400
_COLOURS = ("#7a5ea8", "#3f8f6b", "#c85a4a", "#e0b040", "#4a7fc8", "#667085")
_TICKS = 4
_STRIPES = 160  # of a chart, each of which tells on hovering what it holds

Points = Sequence[tuple[float, float]]  # (step, value), steps ascending


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes.

    Attributes:
        title: What they show.
        names: Name of the metric in `metrics.jsonl` -> what the legend calls it.
        note: What a reader should know, for people.
    """

    title: str
    names: Mapping[str, str]
    note: str = ""


CHARTS = (
    Chart(
        "Loss",
        {
            "loss/total": "total",
            "loss/dino": "DINO",
            "loss/ibot": "iBOT",
            "loss/kde": "KDE",
            "loss/cls": "class",
            "loss/patch": "patches",
        },
        "With a teacher that moves, the loss may stand still while the model still learns: the evaluations tell.",
    ),
    Chart(
        "Do tiles stay apart?",
        {"health/mean_cosine": "mean cosine of class tokens"},
        "Near 1 all tiles look the same to the model: it has collapsed.",
    ),
    Chart(
        "How many directions do class tokens take?",
        {"health/effective_rank": "effective rank"},
        "A model that learns keeps it up; near 1 it has collapsed.",
    ),
    Chart("Gradient", {"optim/grad_norm": "norm before clipping"}),
    Chart(
        "How far does a step move the weights?",
        {"optim/update_norm": "of a step", "optim/ema_distance": "from the average"},
        "As shares of their length.",
    ),
    Chart("Learning rate", {"optim/lr": "learning rate"}),
    Chart(
        "Pace",
        {"time/tiles_per_s": "tiles/s"},
        "Of the whole run; dips are commits, restarts, other sizes of the worker group, or other work on the machines.",
    ),
    Chart(
        "Waiting for tiles", {"time/wait_share": "share of a step"}, "Above a few hundredths, more readers would help."
    ),
)


GROUPS = {BY_MPP: "Loss by magnification, um/px", BY_STRATUM: "Loss by stratum"}
_GROUPS_NOTE = "Of the class tokens; of many groups, those furthest from the mean."
_MOST_GROUPS = 5


def charts_of(metrics: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """Headings and pictures of the charts that a run has values for.

    Args:
        metrics: What `metrics.jsonl` holds of each step, steps ascending.
    """
    found = []
    for chart in CHARTS:
        series = {
            label: points
            for name, label in chart.names.items()
            if (points := [(line["step"], line[name]) for line in metrics if name in line])
        }
        if series:
            found.append((chart.title, line_chart(series) + (f"<p>{escape(chart.note)}</p>" if chart.note else "")))
    for prefix, title in GROUPS.items():
        if apart := _furthest_apart(metrics, prefix):
            found.append((title, line_chart(apart) + f"<p>{escape(_GROUPS_NOTE)}</p>"))
    return found


def _furthest_apart(metrics: Sequence[Mapping[str, float]], prefix: str) -> dict[str, Points]:
    """Curves of the groups of tiles whose mean is furthest from that of all."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in metrics:
        for name in line:
            if name.startswith(prefix):
                curves.setdefault(name.removeprefix(prefix), []).append((line["step"], line[name]))
    means = {name: fmean(value for _, value in points) for name, points in curves.items()}
    middle = fmean(means.values()) if means else 0.0
    furthest = sorted(curves, key=lambda name: -abs(means[name] - middle))[:_MOST_GROUPS]
    return {name: curves[name] for name in furthest} if len(curves) > 1 else {}


def thinned(points: Points, buckets: int = _BUCKETS) -> list[tuple[float, float]]:
    """At most two points for each of some stretches of steps: its lowest and its highest, so that no spike is lost."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept = []
    for bucket in range(buckets):
        part = points[len(points) * bucket // buckets : len(points) * (bucket + 1) // buckets]
        kept += sorted({min(part, key=_value), max(part, key=_value)})
    return kept


def line_chart(series: Mapping[str, Points]) -> str:
    """Curves over steps; values that are not finite are left out.

    Args:
        series: Name for the legend -> points.
    """
    finite = {name: [point for point in points if math.isfinite(point[1])] for name, points in series.items()}
    everything = [point for points in finite.values() for point in points]
    if not everything:
        return "<p>No finite value yet.</p>"
    steps, values = [step for step, _ in everything], [value for _, value in everything]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT) * (step - first) / max(last - first, 1)

    def y(value: float) -> float:
        return 6 + (_HEIGHT - 12) * (1.0 - (value - low) / (high - low))

    lines = "".join(
        f'<polyline fill="none" stroke="{_COLOURS[place % len(_COLOURS)]}" stroke-width="1.4" points="'
        + " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in thinned(points))
        + f'"><title>{escape(name)}: {points[0][1]:.4g} at step {points[0][0]:,.0f}, {points[-1][1]:.4g} at step '
        f"{points[-1][0]:,.0f}</title></polyline>"
        for place, (name, points) in enumerate(finite.items())
        if points
    )
    grid = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#eef0f3"/>'
        f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in (low + (high - low) * n / _TICKS for n in range(_TICKS + 1))
    )
    ticks = "".join(
        f'<text x="{x(step):.0f}" y="{_HEIGHT + 14}" text-anchor="{("start", "middle", "end")[n]}">{step:,.0f}</text>'
        for n, step in enumerate((first, (first + last) / 2, last))
    )
    legend = "".join(
        f'<rect x="{_LEFT + 150 * n}" y="{_HEIGHT + 26}" width="10" height="10" '
        f'fill="{_COLOURS[n % len(_COLOURS)]}"/>'
        f'<text x="{_LEFT + 150 * n + 16}" y="{_HEIGHT + 35}">{escape(name)}</text>'
        for n, name in enumerate(finite)
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}" width="100%" font-size="11" fill="#667085">'
        f"{grid}{lines}{ticks}{legend}{_stripes(finite, x)}</svg>"
    )


def _stripes(series: Mapping[str, Points], x: Callable[[float], float]) -> str:
    """Invisible stripes that tell the steps and values beneath them: of several steps, where each curve is highest."""
    width = (_WIDTH - _LEFT) / _STRIPES
    highest: dict[int, dict[str, tuple[float, float]]] = {}
    for name, points in series.items():
        for point in points:
            stripe = highest.setdefault(min(int((x(point[0]) - _LEFT) / width), _STRIPES - 1), {})
            stripe[name] = max(stripe.get(name, point), point, key=_value)
    return "".join(
        f'<rect x="{_LEFT + place * width:.1f}" y="0" width="{width:.1f}" height="{_HEIGHT}" fill="transparent"><title>'
        + escape("\n".join(f"step {step:,.0f}: {name} {value:.4g}" for name, (step, value) in stripe.items()))
        + "</title></rect>"
        for place, stripe in sorted(highest.items())
    )


def _value(point: tuple[float, float]) -> float:
    return point[1]
