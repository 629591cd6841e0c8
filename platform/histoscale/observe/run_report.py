"""The report of a run: as lines what became of its time, and as a page that needs nothing else all there is to see."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from html import escape

from histoscale.checkpoint.manifest import Commit
from histoscale.config.recipe import Recipe
from histoscale.observe.goodput import Goodput, Phase, Restart, StepTimes, account
from histoscale.observe.metrics import read_metrics
from histoscale.observe.report_curves import charts_of
from histoscale.observe.report_pictures import picture_sections
from histoscale.observe.report_sections import evaluations, how_to_go_on, quarantined, what_ran
from histoscale.observe.timeline import Event, Kind, read_events
from histoscale.slides.report_charts import page, table
from histoscale.storage import Store, join

REPORT = "report.html"
_WIDTH, _BAR_PX, _HEIGHT = 860, 44, 110
_TICKS = 5
_MOST_MARKS = 1000
_MOST_RESTARTS = 200
_COLOURS = {Phase.TRAINING: "#3f8f6b", Phase.STARTING: "#e0b040", Phase.RESTARTING: "#c85a4a", Phase.STOPPED: "#e3e6eb"}
_MARKED = {Kind.PREEMPTION_NOTICE: "#e0b040", Kind.PREEMPTION: "#c85a4a", Kind.CRASH: "#c85a4a", Kind.RESIZE: "#7a5ea8"}


def write_report(store: Store, recipe: Recipe, commit: Commit | None) -> tuple[str, list[str]]:
    """Write `report.html` of a run; gives its URI, and what became of its time in lines.

    Args:
        store: The run folder.
        recipe: Of the run.
        commit: Its newest one.

    Raises:
        HistoscaleError: The timeline or the metrics cannot be read, or the report cannot be written.
    """
    committed = commit.step if commit else 0
    events, metrics = read_events(store), list(read_metrics(store, committed))
    goodput = account(events, StepTimes.of(metrics))
    sections = [
        *evaluations(store),
        *charts_of(metrics),
        *picture_sections(store, metrics),
        *time_sections(events, goodput),
        ("What ran", what_ran(store, recipe)),
        ("Slides that were left out", quarantined(commit)),
        ("How to go on", how_to_go_on(store, recipe, committed)),
    ]
    facts = [
        ("committed steps", f"{committed:,} of {recipe.steps:,}"),
        ("tiles seen", f"{committed * recipe.batch.tiles:,}"),
        ("goodput", f"{goodput.share:.1%}"),
        ("wall time", _duration(goodput.wall_s)),
    ]
    store.put(REPORT, page("Run", store.uri, facts, sections).encode())
    return join(store.uri, REPORT), list(describe(committed, goodput))


def describe(committed: int, goodput: Goodput) -> Iterator[str]:
    """A table for a terminal."""
    if goodput.wall_s <= 0.0:
        yield f"{committed:,} committed steps; the run has no timeline, so nothing is known of its time"
        return
    yield f"{committed:,} committed steps, goodput {goodput.share:.1%}"
    rows = {"wall time": goodput.wall_s, "useful steps": goodput.useful_s, **goodput.lost}
    for name, seconds in rows.items():
        yield f"  {name:<20} {_duration(seconds):>12}  {seconds / goodput.wall_s:6.1%}"
    yield f"{len(goodput.restarts)} restarts"
    for restart in goodput.restarts[-_MOST_RESTARTS:]:
        yield f"  {_clock(restart.time_s)}  at step {restart.step:,}, {_restart(restart)}: {restart.reason}"


def time_sections(events: Sequence[Event], goodput: Goodput) -> list[tuple[str, str]]:
    """When what went on, where the time went, and every restart."""
    spent = [("useful steps", goodput.useful_s), *goodput.lost.items()]
    sections = [
        ("Timeline", timeline_picture(events, goodput)),
        (
            "Where the time went",
            table(
                ("", "share", "seconds"),
                [(name, f"{s / (goodput.wall_s or 1.0):.1%}", round(s)) for name, s in spent],
            )
            + "<p>Useful: committed steps, each counted once, without what they waited. Not counted: "
            + f"{_duration(goodput.stopped_s)} between a stop and the next start.</p>",
        ),
    ]
    if goodput.restarts:
        shown = goodput.restarts[-_MOST_RESTARTS:]
        rows = [(_clock(r.time_s), f"{r.step:,}", r.workers, r.reason, _redone(r), round(r.duration_s)) for r in shown]
        heads = ("ready (UTC)", "from step", "workers", "what ended the group before", "steps taken again", "seconds")
        sections.append((f"Restarts ({len(shown)} of {len(goodput.restarts)})", table(heads, rows)))
    return sections


def timeline_picture(events: Sequence[Event], goodput: Goodput) -> str:
    """What went on when, with a mark for each commit and for what went wrong: SVG."""
    if not goodput.spans:
        return "<p>The run has no timeline yet.</p>"
    begin_s, end_s = goodput.spans[0].start_s, goodput.spans[-1].end_s
    scale = _WIDTH / max(end_s - begin_s, 1e-9)
    bars = "".join(
        f'<rect x="{(span.start_s - begin_s) * scale:.2f}" y="20" height="{_BAR_PX}" fill="{_COLOURS[span.phase]}"'
        f' width="{max((span.end_s - span.start_s) * scale, 0.5):.2f}"><title>{span.phase.value}, '
        f"{_duration(span.end_s - span.start_s)} from {_clock(span.start_s)}</title></rect>"
        for span in goodput.spans
    )
    commits = [event for event in events if event.kind is Kind.COMMIT]
    marks = "".join(
        f'<line x1="{(at := (event.time_s - begin_s) * scale):.2f}" x2="{at:.2f}" y1="52" y2="64" stroke="#fff">'
        f"<title>commit of step {event.step:,}</title></line>"
        for event in commits[:: max(1, len(commits) // _MOST_MARKS)]
    )
    marks += "".join(
        f'<circle cx="{(event.time_s - begin_s) * scale:.2f}" cy="11" r="5" fill="{_MARKED[event.kind]}">'
        f"<title>{escape(f'{event.kind.value} at step {event.step:,}: {event.reason}')}</title></circle>"
        for event in events
        if event.kind in _MARKED
    )
    ticks = "".join(
        f'<text x="{_WIDTH * n / (_TICKS - 1):.0f}" y="82" text-anchor="{_anchor(n)}">'
        f"{_clock(begin_s + n * (end_s - begin_s) / (_TICKS - 1))}</text>"
        for n in range(_TICKS)
    )
    legend = "".join(
        f'<rect x="{150 * n}" y="96" width="10" height="10" fill="{_COLOURS[phase]}"/>'
        f'<text x="{150 * n + 16}" y="105">{phase.value}</text>'
        for n, phase in enumerate(_COLOURS)
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" font-size="11" fill="#667085">'
        f"{bars}{marks}{ticks}{legend}</svg>"
    )


def _anchor(tick: int) -> str:
    return "start" if tick == 0 else "end" if tick == _TICKS - 1 else "middle"


def _restart(restart: Restart) -> str:
    return f"{restart.workers} workers, {_duration(restart.duration_s)}, {_redone(restart)} steps taken again"


def _redone(restart: Restart) -> str:
    return "unknown" if restart.steps_redone is None else f"{restart.steps_redone:,}"


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _duration(seconds: float) -> str:
    if seconds < 120.0:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h"
