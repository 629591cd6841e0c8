"""The curves of a run as pictures for its report: SVG, with spikes kept however many steps there are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from histoscale.sampling.tile_groups import BY_MPP, BY_STRATUM

_WIDTH, _HEIGHT = 1000, 100  # of the picture's own units, which are stretched to the width of the page
_BUCKETS = 400
_COLOURS = ("#7a5ea8", "#3f8f6b", "#c85a4a", "#e0b040", "#4a7fc8", "#667085", "#b0578d", "#2b2f38")
_TICKS = 5
_HITS = 120
_DOTS = 40
_MARGIN = 0.06

Points = Sequence[tuple[float, float]]  # (step or tiles, value), ascending


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes.

    Attributes:
        title: What they show.
        names: Name of the metric in `metrics.jsonl` -> what the legend calls it.
        note: What a reader should know, for people.
        axis: What the values are, with their unit.
        percent: Whether they are shares.
    """

    title: str
    names: Mapping[str, str]
    note: str = ""
    axis: str = "value"
    percent: bool = False


@dataclass(frozen=True)
class Axes:
    """What is drawn over what.

    Attributes:
        x: What the curves run over.
        y: What the values are, with their unit.
        percent: Whether the values are shares.
    """

    x: str = "step"
    y: str = "value"
    percent: bool = False

    def value(self, value: float) -> str:
        """A value, as a reader sees it."""
        return f"{100 * value:.4g} %" if self.percent else f"{value:.4g}"


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
        "loss of a step",
    ),
    Chart(
        "Do tiles stay apart?",
        {"health/mean_cosine": "mean cosine of class tokens"},
        "Near 1 all tiles look the same to the model: it has collapsed.",
        "cosine",
    ),
    Chart(
        "How many directions do class tokens take?",
        {"health/effective_rank": "effective rank"},
        "A model that learns keeps it up; near 1 it has collapsed.",
        "directions",
    ),
    Chart("Gradient", {"optim/grad_norm": "norm before clipping"}, axis="norm"),
    Chart(
        "How far does a step move the weights?",
        {"optim/update_norm": "change in a step", "optim/ema_distance": "distance from their average, the teacher"},
        "Shares of the length of all weights. Changes of 0.02 to 1 % in a step are usual; above 3 % the run diverges.",
        "share of the length",
        percent=True,
    ),
    Chart("Learning rate", {"optim/lr": "learning rate"}, axis="learning rate"),
    Chart(
        "Pace",
        {"time/tiles_per_s": "tiles/s"},
        "Of the whole run; dips are commits, restarts, other sizes of the worker group, or other work on the machines.",
        "tiles per second",
    ),
    Chart(
        "Waiting for tiles",
        {"time/wait_share": "share of a step"},
        "Above a few percent, more readers would help.",
        "share of a step",
        percent=True,
    ),
)

GROUPS = {BY_MPP: "Loss by magnification, um/px", BY_STRATUM: "Loss by stratum"}
_GROUPS_NOTE = (
    "The class tokens' part of the loss, on the tiles of each group: curves that stay together are as they should be. "
    "At most five groups are drawn, those furthest from the mean."
)
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
            picture = line_chart(series, Axes(y=chart.axis, percent=chart.percent))
            found.append((chart.title, picture + (f"<p>{escape(chart.note)}</p>" if chart.note else "")))
    for prefix, title in GROUPS.items():
        if apart := _furthest_apart(metrics, prefix):
            picture = line_chart(apart, Axes(y="loss of class tokens"))
            found.append((title, picture + f"<p>{escape(_GROUPS_NOTE)}</p>"))
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


@dataclass(frozen=True)
class _Scale:
    """From places and values to units of the picture."""

    first: float
    last: float
    low: float
    high: float

    def x(self, place: float) -> float:
        """Left to right; a single place lies in the middle."""
        return _WIDTH * (0.5 if self.last <= self.first else (place - self.first) / (self.last - self.first))

    def y(self, value: float) -> float:
        """Top to bottom."""
        return _HEIGHT * (1.0 - (value - self.low) / (self.high - self.low))


def line_chart(
    series: Mapping[str, Points],
    axes: Axes | None = None,
    intervals: Mapping[str, Mapping[float, tuple[float, float]]] | None = None,
) -> str:
    """Curves with names at both axes, a legend, and what each stands at where one points; no value that is not finite.

    Args:
        series: Name for the legend -> points.
        axes: What is drawn over what.
        intervals: Name for the legend -> place of a point -> its interval, drawn as an upright line.
    """
    axes, intervals = axes or Axes(), intervals or {}
    finite = {name: thinned([one for one in points if math.isfinite(one[1])]) for name, points in series.items()}
    everything = [point for points in finite.values() for point in points]
    if not everything:
        return "<p>No finite value yet.</p>"
    places = [place for place, _ in everything]
    values = [value for _, value in everything]
    values += [end for spans in intervals.values() for span in spans.values() for end in span]
    scale = _Scale(min(places), max(places), *_with_margin(min(values), max(values)))
    drawn = "".join(
        _curve(points, _COLOURS[number % len(_COLOURS)], scale, intervals.get(name, {}))
        for number, (name, points) in enumerate(finite.items())
        if points
    )
    levels = nice_ticks(scale.low, scale.high)
    grid = "".join(
        f'<line x1="0" x2="{_WIDTH}" y1="{scale.y(level):.2f}" y2="{scale.y(level):.2f}" stroke="#eef0f3"/>'
        for level in levels
    )
    return (
        f'<div class="chart"><div class="axis up">{escape(axes.y)}</div><div class="plot"><div class="y">'
        + "".join(f'<span style="top:{scale.y(level):.2f}%">{axes.value(level)}</span>' for level in levels)
        + f'</div><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none">'
        + f"{grid}{drawn}{_hits(finite, axes, scale, intervals)}</svg></div>"
        + f'<div class="x">{_x_ticks(scale)}</div><div class="axis">{escape(axes.x)}</div>{legend(list(finite))}</div>'
    )


def legend(names: Sequence[str], colours: Sequence[str] = _COLOURS) -> str:
    """A square of its colour before each name."""
    squares = "".join(
        f'<span><i style="background:{colours[number % len(colours)]}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return f'<div class="legend">{squares}</div>'


def nice_ticks(low: float, high: float, about: int = _TICKS) -> list[float]:
    """Round values between two bounds, ascending: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1.0, 2.0, 5.0, 10.0) if power * factor >= 0.8 * rough)
    ticks = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [0.0 if abs(tick) < 1e-9 * step else tick for tick in ticks]


def _curve(points: Points, colour: str, scale: _Scale, intervals: Mapping[float, tuple[float, float]]) -> str:
    """A line, its intervals, and dots where there are few points."""
    line = " ".join(f"{scale.x(place):.1f},{scale.y(value):.2f}" for place, value in points)
    spans = "".join(
        f'<line x1="{(x := scale.x(place)):.1f}" x2="{x:.1f}" y1="{scale.y(low):.2f}" y2="{scale.y(high):.2f}"'
        f' stroke="{colour}" stroke-width="2" stroke-opacity="0.5"/>'
        for place, (low, high) in intervals.items()
    )
    dots = "".join(f"M{scale.x(place):.1f} {scale.y(value):.2f}h0" for place, value in points)
    dotted = f'<path d="{dots}" stroke="{colour}" stroke-width="7" stroke-linecap="round"/>'
    return (
        f'{spans}<polyline fill="none" stroke="{colour}" stroke-width="1.4" points="{line}"/>'
        f"{dotted if len(points) <= _DOTS else ''}"
    )


def _hits(
    series: Mapping[str, Points],
    axes: Axes,
    scale: _Scale,
    intervals: Mapping[str, Mapping[float, tuple[float, float]]],
) -> str:
    """Upright strips that cannot be seen, and that tell what all curves stand at where one points."""
    places = sorted({place for points in series.values() for place, _ in points})
    strips = min(_HITS, len(places))
    starts = [len(places) * strip // strips for strip in range(strips)] + [len(places)]
    strip_of = {place: strip for strip in range(strips) for place in places[starts[strip] : starts[strip + 1]]}
    found: list[dict[str, list[tuple[float, float]]]] = [{} for _ in range(strips)]
    for name, points in series.items():
        for point in points:
            found[strip_of[point[0]]].setdefault(name, []).append(point)
    drawn, left = [], 0.0
    for strip, here in enumerate(found):
        first, last = places[starts[strip]], places[starts[strip + 1] - 1]
        right = _WIDTH if strip + 1 == strips else (scale.x(last) + scale.x(places[starts[strip + 1]])) / 2
        head = f"{axes.x} {first:,.0f}" + (f" to {last:,.0f}" if last > first else "")
        lines = [f"{name}: {_told(points, axes, intervals.get(name, {}))}" for name, points in here.items()]
        drawn.append(
            f'<rect class="hit" x="{left:.1f}" y="0" width="{right - left:.1f}" height="{_HEIGHT}">'
            f"<title>{escape(chr(10).join([head, *lines]))}</title></rect>"
        )
        left = right
    return "".join(drawn)


def _told(points: Points, axes: Axes, spans: Mapping[float, tuple[float, float]]) -> str:
    values = [value for _, value in points]
    if len(values) > 1:
        place, highest = max(points, key=_value)
        return f"{axes.value(min(values))} to {axes.value(highest)}, highest at {axes.x} {place:,.0f}"
    span = spans.get(points[0][0])
    beside = f" (95 %: {axes.value(span[0])} to {axes.value(span[1])})" if span else ""
    return axes.value(values[0]) + beside


def _x_ticks(scale: _Scale) -> str:
    """The first and last place, and round ones between that leave room for them."""
    if scale.last <= scale.first:
        return f'<span style="left:50%">{scale.first:,.0f}</span>'
    length = scale.last - scale.first
    between = [
        tick
        for tick in nice_ticks(scale.first, scale.last, 3)
        if tick == round(tick) and 0.22 < (tick - scale.first) / length < 0.78
    ]
    inner = "".join(f'<span style="left:{scale.x(tick) / 10:.1f}%">{tick:,.0f}</span>' for tick in between)
    return (
        f'<span class="first" style="left:0">{scale.first:,.0f}</span>{inner}'
        f'<span class="last" style="left:100%">{scale.last:,.0f}</span>'
    )


def _with_margin(low: float, high: float) -> tuple[float, float]:
    """Bounds with some room around; values that are all alike get bounds of their own size."""
    margin = _MARGIN * (high - low) if high > low else 0.5 * (abs(low) or 1.0)
    return low - margin, high + margin


def _value(point: tuple[float, float]) -> float:
    return point[1]
