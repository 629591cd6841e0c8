"""Charts of a sweep as SVG: points, curves with bands, on plain or logarithmic axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _FOOT, _ROW = 860, 300, 70, 40, 18
_COLOURS = ("#7a5ea8", "#3f8f6b", "#c85a4a", "#e0b040", "#4a7fc8", "#667085")
_TICKS = 4
_ROOM = 0.04


@dataclass(frozen=True)
class Series:
    """What shares a colour and a line of the legend.

    Attributes:
        name: For the legend.
        points: (x, y, what it is on hovering).
        curve: (x, y) along a line.
        band: (x, low, high) around it.
        bars: (x, low, high) of single points.
        hollow: Points are rings: what was foretold, or not fitted.
    """

    name: str
    points: Sequence[tuple[float, float, str]] = ()
    curve: Sequence[tuple[float, float]] = ()
    band: Sequence[tuple[float, float, float]] = ()
    bars: Sequence[tuple[float, float, float]] = ()
    hollow: bool = False


class _Axis:
    """From values to pixels."""

    def __init__(self, values: Sequence[float], first_px: float, last_px: float, log: bool) -> None:
        self._log, self._first_px, self._last_px = log, first_px, last_px
        ends = [self._of(value) for value in values]
        low, high = min(ends), max(ends)
        room = _ROOM * (high - low) or 0.5 * (abs(low) or 1.0)
        self._low, self._high = low - room, high + room

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / (self._high - self._low)
        return self._first_px + share * (self._last_px - self._first_px)

    def ticks(self) -> list[float]:
        """Values of some even places."""
        places = [self._low + (self._high - self._low) * n / _TICKS for n in range(_TICKS + 1)]
        return [10.0**place if self._log else place for place in places]

    def _of(self, value: float) -> float:
        return math.log10(value) if self._log else value


def chart(series: Sequence[Series], x_title: str, y_title: str, *, log_x: bool = True, log_y: bool = False) -> str:
    """A chart; values that an axis cannot show (not finite, or not above 0 on a logarithmic one) are left out."""

    def shown(x: float, *ys: float) -> bool:
        return all(
            math.isfinite(value) and (value > 0.0 or not log) for value, log in ((x, log_x), *((y, log_y) for y in ys))
        )

    kept = [
        Series(
            each.name,
            [point for point in each.points if shown(*point[:2])],
            [point for point in each.curve if shown(*point)],
            [point for point in each.band if shown(*point)],
            [point for point in each.bars if shown(*point)],
            each.hollow,
        )
        for each in series
    ]
    xs = [point[0] for each in kept for part in (each.points, each.curve, each.band, each.bars) for point in part]
    ys = [point[1] for each in kept for part in (each.points, each.curve) for point in part]
    ys += [bound for each in kept for _, low, high in (*each.band, *each.bars) for bound in (low, high)]
    if not xs or not ys:
        return "<p>Nothing to draw yet.</p>"
    x, y = _Axis(xs, _LEFT + 8, _WIDTH - 12, log_x), _Axis(ys, _HEIGHT - 8, 8, log_y)
    drawn = "".join(_draw(each, _COLOURS[place % len(_COLOURS)], x, y) for place, each in enumerate(kept))
    height = _HEIGHT + _FOOT + _ROW * len(kept)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" width="100%" font-size="11" fill="#667085">'
        f"{_frame(x, y, x_title, y_title)}{drawn}{_legend(kept)}</svg>"
    )


def _frame(x: _Axis, y: _Axis, x_title: str, y_title: str) -> str:
    lines = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#eef0f3"/>'
        f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in y.ticks()
    )
    ticks = "".join(
        f'<text x="{x(value):.0f}" y="{_HEIGHT + 14}" text-anchor="{("start", *["middle"] * 3, "end")[n]}">'
        f"{value:.3g}</text>"
        for n, value in enumerate(x.ticks())
    )
    titles = (
        f'<text x="{(_WIDTH + _LEFT) / 2:.0f}" y="{_HEIGHT + 30}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text transform="translate(12 {_HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    )
    return lines + ticks + titles


def _draw(series: Series, colour: str, x: _Axis, y: _Axis) -> str:
    parts = []
    if series.band:
        edge = [f"{x(at):.1f},{y(high):.1f}" for at, _, high in series.band]
        edge += [f"{x(at):.1f},{y(low):.1f}" for at, low, _ in reversed(series.band)]
        parts.append(f'<polygon fill="{colour}" fill-opacity="0.15" points="{" ".join(edge)}"/>')
    if series.curve:
        line = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in series.curve)
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.4" points="{line}"/>')
    parts += [
        f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" stroke="{colour}"/>'
        for at, low, high in series.bars
    ]
    look = f'fill="#fff" stroke="{colour}" stroke-width="2"' if series.hollow else f'fill="{colour}"'
    parts += [
        f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="4" {look}><title>{escape(text)}</title></circle>'
        for at, value, text in series.points
    ]
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    lines = []
    for n, each in enumerate(series):
        top, colour = _HEIGHT + _FOOT + _ROW * n, _COLOURS[n % len(_COLOURS)]
        look = f'fill="#fff" stroke="{colour}" stroke-width="2"' if each.hollow else f'fill="{colour}"'
        lines.append(
            f'<rect x="{_LEFT + 1}" y="{top + 1}" width="8" height="8" {look}/>'
            f'<text x="{_LEFT + 16}" y="{top + 9}">{escape(each.name)}</text>'
        )
    return "".join(lines)
