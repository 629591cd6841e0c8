"""The part of a run's report that is about its time: a timeline, where the time went, restarts and alarms."""

from collections.abc import Iterator, Sequence
from html import escape

from histoscale.observe.goodput import Goodput, Phase, Restart, Span
from histoscale.observe.report_curves import legend
from histoscale.observe.timeline import Event, Kind
from histoscale.observe.wording import clock, percent
from histoscale.slides.report_charts import table
from histoscale.units import describe_duration

_WIDTH, _BARS_PX, _MARKS_Y = 1000, 60, 8
_MOST_MARKS = 1000
_MOST_RESTARTS = 200
_COLOURS = {Phase.TRAINING: "#3f8f6b", Phase.STARTING: "#e0b040", Phase.RESTARTING: "#c85a4a", Phase.STOPPED: "#e3e6eb"}
_MARKED = {
    Kind.PREEMPTION_NOTICE: "#e0b040",
    Kind.PREEMPTION: "#c85a4a",
    Kind.CRASH: "#1c2430",
    Kind.RESIZE: "#4a7fc8",
    Kind.ALARM: "#b0578d",
}
GOODPUT_MEANS = (
    "Goodput is the share of the wall time that went into steps that count: committed ones, each counted once, without "
    "what they waited for tiles or for a checkpoint. The rest went where the rows say."
)


def describe(committed: int, goodput: Goodput) -> Iterator[str]:
    """A table for a terminal."""
    if goodput.wall_s <= 0.0:
        yield f"{committed:,} committed steps; the run has no timeline, so nothing is known of its time"
        return
    yield f"{committed:,} committed steps, goodput {goodput.share:.1%}"
    rows = {"wall time": goodput.wall_s, "useful steps": goodput.useful_s, **goodput.lost}
    for name, seconds in rows.items():
        yield f"  {name:<20} {describe_duration(seconds):>12}  {seconds / goodput.wall_s:6.1%}"
    yield f"{len(goodput.restarts)} restarts"
    for restart in goodput.restarts[-_MOST_RESTARTS:]:
        yield f"  {clock(restart.time_s)}  at step {restart.step:,}, {_restart(restart)}: {restart.reason}"


def alarm_lines(events: Sequence[Event]) -> Iterator[str]:
    """The alarms that rang, for a terminal."""
    for event in events:
        if event.kind is Kind.ALARM:
            yield f"alarm at step {event.step:,}, {clock(event.time_s)}: {event.reason}"


def alarms(events: Sequence[Event]) -> str:
    """When each alarm rang and what it said, or that none did."""
    rung = [event for event in events if event.kind is Kind.ALARM]
    if not rung:
        return "<p>None has rung.</p>"
    rows = "".join(
        f"<tr><td>{clock(event.time_s)}</td><td>{event.step:,}</td><td>{escape(event.reason)}</td></tr>"
        for event in rung
    )
    return f"<table><tr><th>when (UTC)</th><th>step</th><th>what it said</th></tr>{rows}</table>"


def time_sections(events: Sequence[Event], goodput: Goodput) -> list[tuple[str, str]]:
    """When what went on, where the time went, every restart, every alarm."""
    spent = [("useful steps", goodput.useful_s), *goodput.lost.items()]
    sections = [
        ("Timeline", timeline_picture(events, goodput)),
        (
            "Where the time went",
            table(
                ("", "share", "time"),
                [(name, percent(s / (goodput.wall_s or 1.0)), s) for name, s in spent],
                describe_duration,
            )
            + f"<p>{GOODPUT_MEANS} Not counted: {describe_duration(goodput.stopped_s)} between a stop and the next "
            "start.</p>",
        ),
        ("Alarms", alarms(events)),
    ]
    if goodput.restarts:
        shown = goodput.restarts[-_MOST_RESTARTS:]
        rows = [(clock(r.time_s), f"{r.step:,}", r.workers, r.reason, _redone(r), r.duration_s) for r in shown]
        heads = ("ready (UTC)", "from step", "workers", "what ended the group before", "steps taken again", "took")
        sections.append((f"Restarts ({len(shown)} of {len(goodput.restarts)})", table(heads, rows, describe_duration)))
    return sections


def timeline_picture(events: Sequence[Event], goodput: Goodput) -> str:
    """What went on when, with a mark for each commit and for what went wrong: SVG."""
    if not goodput.spans:
        return "<p>The run has no timeline yet.</p>"
    begin_s, end_s = goodput.spans[0].start_s, goodput.spans[-1].end_s
    scale = _WIDTH / max(end_s - begin_s, 1e-9)
    bars = "".join(_bar(span, (span.start_s - begin_s) * scale, scale) for span in goodput.spans)
    commits = [event for event in events if event.kind is Kind.COMMIT]
    marks = "".join(
        f'<line x1="{(at := (event.time_s - begin_s) * scale):.2f}" x2="{at:.2f}" y1="48" y2="{_BARS_PX}" '
        f'stroke="#fff" stroke-width="2"><title>commit of step {event.step:,}, {clock(event.time_s)}</title></line>'
        for event in commits[:: max(1, len(commits) // _MOST_MARKS)]
    )
    marked = [event for event in events if event.kind in _MARKED]
    marks += "".join(
        f'<path d="M{(event.time_s - begin_s) * scale:.2f} {_MARKS_Y}h0" stroke="{_MARKED[event.kind]}" '
        f'stroke-width="11" stroke-linecap="round">'
        f"<title>{escape(f'{_name(event.kind)} at step {event.step:,}: {event.reason}')}</title></path>"
        for event in marked[-_MOST_MARKS:]
    )
    places = [("first", 0.0), ("", 0.5), ("last", 1.0)]
    ticks = "".join(
        f'<span class="{place}" style="left:{100 * share:.0f}%">{clock(begin_s + share * (end_s - begin_s))[5:]}</span>'
        for place, share in places
    )
    phases = [phase for phase in _COLOURS if any(span.phase is phase for span in goodput.spans)]
    kinds = [kind for kind in _MARKED if any(event.kind is kind for event in marked)]
    colours = [*(_COLOURS[phase] for phase in phases), *(_MARKED[kind] for kind in kinds)]
    return (
        f'<div class="chart" style="padding-left:0"><div class="bars"><svg viewBox="0 0 {_WIDTH} {_BARS_PX}" '
        f'preserveAspectRatio="none">{bars}{marks}</svg></div><div class="x">{ticks}</div>'
        f'<div class="axis">month, day and time, UTC</div>'
        f"{legend([*(phase.value for phase in phases), *map(_name, kinds)], colours)}</div>"
        f"<p>White lines are commits.{' Dots tell more where one points at them.' if marked else ''}</p>"
    )


def _bar(span: Span, left: float, scale: float) -> str:
    length_s = span.end_s - span.start_s
    return (
        f'<rect x="{left:.2f}" y="18" width="{max(length_s * scale, 0.5):.2f}" height="{_BARS_PX - 18}" '
        f'fill="{_COLOURS[span.phase]}"><title>{span.phase.value}, {describe_duration(length_s)} from '
        f"{clock(span.start_s)}</title></rect>"
    )


def _name(kind: Kind) -> str:
    return kind.value.replace("_", " ")


def _restart(restart: Restart) -> str:
    return f"{restart.workers} workers, {describe_duration(restart.duration_s)}, {_redone(restart)} steps taken again"


def _redone(restart: Restart) -> str:
    return "unknown" if restart.steps_redone is None else f"{restart.steps_redone:,}"
