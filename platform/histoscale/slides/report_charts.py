"""Pieces of the index's report as HTML and SVG; text is escaped here."""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _FOOT = 860, 170, 34
_BINS = 64
_CONTENTS_FROM = 4
_STYLE = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #f5f6f8; margin: 0 }
main { max-width: 900px; margin: 0 auto; padding: 32px 24px 64px }
h1 { font-size: 26px; margin: 0 } h2 { font-size: 17px; margin: 0 0 10px } h3 { font-size: 15px; margin: 14px 0 6px }
.by { color: #667085; margin: 2px 0 20px; overflow-wrap: anywhere }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin-bottom: 18px }
.facts div, section, nav { background: #fff; border: 1px solid #e3e6eb; border-radius: 8px; padding: 12px 16px }
.facts b { display: block; font-size: 20px; font-variant-numeric: tabular-nums } .facts span { color: #667085 }
nav { margin-bottom: 14px; font-size: 13px } nav a { margin-right: 14px; display: inline-block; color: #5b3f8f }
section { margin-bottom: 14px; overflow-x: auto } section p { color: #667085; font-size: 13px; margin: 8px 0 0 }
section p.said { color: #1c2430; font-size: 15px }
table { border-collapse: collapse; width: 100% }
th { text-align: left; color: #667085; font-weight: 500; font-size: 13px; vertical-align: bottom }
td, th { padding: 4px 10px 4px 0; border-bottom: 1px solid #eef0f3 } td { vertical-align: top }
td.s { white-space: nowrap }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.bar { height: 6px; border-radius: 3px; background: #7a5ea8; min-width: 2px }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px }
figure { margin: 0; text-align: center } figure img { max-width: 100%; max-height: 192px; border: 1px solid #e3e6eb }
pre { background: #f5f6f8; padding: 8px 10px; margin: 0 0 6px; white-space: pre-wrap; overflow-wrap: anywhere }
figcaption { color: #667085; font-size: 12px }
.chart { color: #667085; font-size: 12px; padding-left: 64px; position: relative; margin: 10px 0 }
.chart .plot { position: relative; height: 190px; border-left: 1px solid #c8cdd5; border-bottom: 1px solid #c8cdd5 }
.chart .bars { position: relative; height: 60px }
.chart svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible }
.chart svg * { vector-effect: non-scaling-stroke }
.chart .y span { position: absolute; right: 100%; margin-right: 8px; transform: translateY(-50%); white-space: nowrap }
.chart .x { position: relative; height: 20px }
.chart .x span { position: absolute; top: 2px; transform: translateX(-50%); white-space: nowrap }
.chart .x span.first { transform: none } .chart .x span.last { transform: translateX(-100%) }
.chart .axis { text-align: center } .chart .axis.up { text-align: left; margin: 0 0 6px -64px }
.chart .legend span { display: inline-block; margin-right: 18px }
.chart .legend i { display: inline-block; width: 10px; height: 10px; margin-right: 6px }
.hit { fill: transparent } .hit:hover { fill: rgba(28, 36, 48, 0.08) }
@media (max-width: 600px) { main { padding: 16px 8px 32px } section, nav { padding: 10px } }
@media print {
  body { background: #fff } main { max-width: none; padding: 0 } nav { display: none }
  section, .facts div { break-inside: avoid; border-color: #c8cdd5 }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""


def page(title: str, by: str, facts: Sequence[tuple[str, str]], sections: Sequence[tuple[str, str]]) -> str:
    """A page: what it is, a few numbers, and sections of (heading, HTML), which a list of contents leads to.

    Text is dark on light, on paper and on a narrow screen too; the page loads nothing.
    """
    numbers = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in facts)
    anchors = _anchors([heading for heading, _ in sections])
    body = "".join(
        f'<section id="{anchor}"><h2>{heading}</h2>{content}</section>'
        for anchor, (heading, content) in zip(anchors, sections, strict=True)
    )
    links = "".join(
        f'<a href="#{anchor}">{heading}</a>' for anchor, (heading, _) in zip(anchors, sections, strict=True)
    )
    contents = f"<nav>{links}</nav>" if len(sections) >= _CONTENTS_FROM else ""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f'<main><h1>{escape(title)}</h1><p class="by">{escape(by)}</p><div class="facts">{numbers}</div>'
        f"{contents}{body}</main></html>"
    )


def _anchors(headings: Sequence[str]) -> list[str]:
    """A name for each heading: its words, and a number where two would be alike."""
    found: list[str] = []
    for heading in headings:
        name = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"
        found.append(name if name not in found else f"{name}-{len(found)}")
    return found


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str | float]], shown: Callable[[float], str] = "{:,.0f}".format
) -> str:
    """A table whose last column is a number, written as `shown` does, with a bar for it."""
    most = max((float(row[-1]) for row in rows), default=0.0) or 1.0
    head = (
        "".join(f"<th>{escape(name)}</th>" for name in heads[:-1]) + f'<th class="n">{escape(heads[-1])}</th><th></th>'
    )
    lines = []
    for *texts, number in rows:
        cells = "".join(f"<td>{escape(str(text)) or '<i>not known</i>'}</td>" for text in texts)
        width = 100.0 * float(number) / most
        bar = (
            '<td style="width:30%;vertical-align:middle">' + f'<div class="bar" style="width:{width:.1f}%"></div></td>'
        )
        lines.append(f'<tr>{cells}<td class="n">{escape(shown(float(number)))}</td>{bar}</tr>')
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def share_table(name: str, rows: Sequence[tuple[str, int, Sequence[int]]], heads: Sequence[str]) -> str:
    """A table of (value, slides, those of them that serve each head), shaded by the share."""
    head = f"<th>{escape(name)}</th>" + "".join(f'<th class="n">{escape(text)}</th>' for text in ("slides", *heads))
    lines = []
    for value, slides, served in rows:
        cells = "".join(
            f'<td class="n" style="background:rgba(122,94,168,{0.45 * number / max(slides, 1):.2f})">{number:,}</td>'
            for number in served
        )
        label = escape(value) or "<i>not known</i>"
        lines.append(f'<tr><td>{label}</td><td class="n">{slides:,}</td>{cells}</tr>')
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def histogram(values: Mapping[float, int], axis: str) -> str:
    """Numbers by value as bars, SVG; each bar tells its own on hovering."""
    low, high = min(values), max(values)
    low, high = (low, high) if high > low else (low * 0.9, high * 1.1)
    bins = [0] * _BINS
    for value, number in values.items():
        bins[min(int((value - low) / (high - low) * _BINS), _BINS - 1)] += number
    step = _WIDTH / _BINS
    bars = "".join(_bar(n, number, max(bins), low + n * (high - low) / _BINS, step) for n, number in enumerate(bins))
    ticks = "".join(
        f'<text x="{_WIDTH * n / 4:.0f}" y="{_HEIGHT + 16}" text-anchor="{("start", *["middle"] * 3, "end")[n]}">'
        f"{low + (high - low) * n / 4:.3g}</text>"
        for n in range(5)
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + _FOOT}" width="100%" font-size="12" fill="#667085">{bars}'
        f'<line x1="0" x2="{_WIDTH}" y1="{_HEIGHT}" y2="{_HEIGHT}" stroke="#c8cdd5"/>{ticks}'
        f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT + 31}" text-anchor="middle">{escape(axis)}</text></svg>'
    )


def _bar(place: int, number: int, most: int, value: float, step: float) -> str:
    if not number:
        return ""
    height = max(2.0, (_HEIGHT - 20) * number / most)
    top = _HEIGHT - height
    return (
        f'<rect x="{place * step + 1:.1f}" y="{top:.1f}" width="{step - 2:.1f}" height="{height:.1f}" fill="#7a5ea8">'
        f"<title>{number:,} slides from {value:.3g}</title></rect>"
        + (f'<text x="{(place + 0.5) * step:.1f}" y="{top - 4:.1f}" text-anchor="middle">{number:,}</text>')
    )
