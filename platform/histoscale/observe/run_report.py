"""The report of a run: as lines what became of its time, and as a page that needs nothing else all there is to see."""

from typing import Any

from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.retention import read_best
from histoscale.config.recipe import Recipe
from histoscale.errors import CheckpointError
from histoscale.observe.goodput import StepTimes, account
from histoscale.observe.metrics import read_metrics
from histoscale.observe.report_curves import charts_of
from histoscale.observe.report_pictures import picture_sections
from histoscale.observe.report_sections import evaluations, how_to_go_on, quarantined, read_reports, what_ran
from histoscale.observe.report_summary import best_line, summary
from histoscale.observe.report_time import alarm_lines, describe, time_sections
from histoscale.observe.timeline import read_events
from histoscale.observe.wording import percent
from histoscale.slides.report_charts import page
from histoscale.storage import Store, join
from histoscale.units import describe_duration

REPORT = "report.html"


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
    reports, best = read_reports(store), _best(store)
    newest = [of_dataset[-1] for of_dataset in reports.values()]
    sections = [
        ("In short", summary(recipe, commit, events, newest, best)),
        *evaluations(reports),
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
        ("best step so far", f"{best['step']:,}" if best else "not known yet"),
        ("goodput: useful share of the wall time", percent(goodput.share) if goodput.wall_s else "not known yet"),
        ("wall time", describe_duration(goodput.wall_s)),
    ]
    store.put(REPORT, page("Run", store.uri, facts, sections).encode())
    lines = [*describe(committed, goodput), *alarm_lines(events), *([best_line(best)] if best else [])]
    return join(store.uri, REPORT), lines


def _best(store: Store) -> dict[str, Any] | None:
    """The best step; None where the file that names it is damaged, of which training and evaluation tell."""
    try:
        return read_best(store)
    except CheckpointError:
        return None
