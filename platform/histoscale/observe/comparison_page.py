"""Two runs or more on one page that needs nothing else: what they differ in, and what came of it."""

from collections.abc import Mapping, Sequence
from html import escape

from histoscale.evaluate.figures import BASELINES
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.report import JUDGE, EvaluationReport
from histoscale.observe.comparison import (
    SHAPES_THE_LOSS,
    RunRecord,
    alarms_of,
    difference,
    names_of,
    of_the_experiment,
    provenance_rows,
    recipe_rows,
    same_test,
    tiles_per_s,
    worker_hours,
)
from histoscale.observe.report_curves import CHARTS, Axes, line_chart
from histoscale.observe.report_sections import accuracies, accuracy_curves, probe_title, text_table
from histoscale.observe.report_time import GOODPUT_MEANS
from histoscale.observe.wording import percent, percents, points
from histoscale.slides.report_charts import page
from histoscale.units import describe_duration

WHAT_IS_SOUND = (
    "A difference is established here where the two 95 % intervals do not meet. The range in brackets goes from the "
    "lower end of the one to the upper end of the other: it holds the difference in at least 90 of 100 cases whatever "
    "ties the two, and in 95 where they are about normal. That asks for more than is needed: a paired comparison on "
    "the same tiles finds smaller differences, but it needs the answers tile by tile, which reports do not hold; "
    "jobs/evaluate.py --run RUN --beside OTHER makes one. A difference is about these checkpoints on other patients "
    "(other tiles, where no patients are known), not about their recipes: a second seed may move a figure, too. "
    "Nothing is corrected for how many figures you look at."
)
_MOVING = (
    "Each run has a teacher of its own that moves with it, so a lower loss is no better model. The evaluations tell."
)


def comparison_page(records: Sequence[RunRecord], left_out: Sequence[str] = ()) -> str:
    """The page.

    Args:
        records: Of two runs or more; the first is what the others are held against.
        left_out: Why runs that were asked for are not there, for people.
    """
    names = names_of([record.uri for record in records])
    by_name = dict(zip(names, records, strict=True))
    rows = recipe_rows([record.recipe for record in records])
    sections = [
        ("In short", _in_short(by_name, rows, left_out)),
        ("What differs in the recipes", _recipes(names, rows)),
        *_evaluations(by_name),
        *_curves(by_name, _on_losses(by_name, rows)),
        ("Time and cost", _time(by_name)),
        ("Code, packages and index", _provenance(by_name)),
    ]
    facts = [(f"tiles seen by {name}", f"{record.tiles:,}") for name, record in by_name.items()]
    return page("Runs compared", ", ".join(record.uri for record in records), facts, sections)


def _in_short(by_name: Mapping[str, RunRecord], rows: Sequence[Sequence[str]], left_out: Sequence[str]) -> str:
    experiment = [row[0] for row in rows if of_the_experiment(row[0])]
    lines = [
        f"The recipes differ in {len(experiment)} fields of the experiment: {', '.join(experiment[:8])}"
        f"{' and others' if len(experiment) > 8 else ''}."
        if experiment
        else "The recipes are the same but for how the runs are looked at and what they run on."
    ]
    verdicts = [
        line
        for dataset in _datasets(by_name)
        for line in _verdicts(dataset, by_name)
        if f", {probe_title(JUDGE)}" in line
    ]
    lines += verdicts or ["Which is better is not known yet because no two runs were evaluated on the same tiles."]
    lines += [f"Left out: {line}" for line in left_out]
    return "".join(f'<p class="said">{escape(line)}</p>' for line in lines)


def _recipes(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "<p>Nothing.</p>"
    shown = [(*row, "experiment" if of_the_experiment(row[0]) else "how it ran") for row in rows]
    return text_table(shown, ("field", *names, "part of"))


def _datasets(by_name: Mapping[str, RunRecord]) -> list[str]:
    return sorted({dataset for record in by_name.values() for dataset in record.reports})


def _evaluations(by_name: Mapping[str, RunRecord]) -> list[tuple[str, str]]:
    """For each dataset a heading, the newest figures of each run, what is established, and their curves."""
    return [(f"Evaluation on {escape(dataset)}", _evaluation(dataset, by_name)) for dataset in _datasets(by_name)] or [
        ("Evaluations", "<p>None of the runs was evaluated: jobs/evaluate.py --run RUN --dataset DIR.</p>")
    ]


def _evaluation(dataset: str, by_name: Mapping[str, RunRecord]) -> str:
    reports = {name: record.reports[dataset] for name, record in by_name.items() if dataset in record.reports}
    rows = [
        (
            name,
            probe_title(figure.probe),
            figure.embedding,
            f"{of_run[-1].step:,}",
            f"{of_run[-1].images_seen:,}",
            percent(figure.mean),
            percents(figure.interval),
        )
        for name, of_run in reports.items()
        for figure in accuracies(of_run[-1])
    ]
    heads = ("run", "probe", "embedding", "step", "tiles seen", "balanced accuracy", "95 %")
    said = "".join(f'<p class="said">{escape(line)}</p>' for line in _verdicts(dataset, by_name))
    robust = [
        (name, each.embedding, f"{each.index:.3f}", f"{each.index_interval[0]:.3f} to {each.index_interval[1]:.3f}")
        for name, of_run in reports.items()
        for each in of_run[-1].robustness
        if each.features == "pretrained"
    ]
    return (
        text_table(rows, heads)
        + said
        + f"<p>{WHAT_IS_SOUND}</p>"
        + _paired(reports)
        + accuracy_curves(reports, over_tiles=True)
        + (text_table(robust, ("run", "embedding", "robustness index", "95 %")) if robust else "")
    )


def _paired(reports: Mapping[str, Sequence[EvaluationReport]]) -> str:
    """The differences that evaluations have found by pairing networks on the same tiles."""
    rows = [
        (
            name,
            gain.baseline,
            probe_title(gain.probe),
            gain.embedding,
            points(gain.difference),
            percents(gain.interval),
            "not measured" if gain.p_value is None else f"{gain.p_value:.3g}",
        )
        for name, of_run in reports.items()
        for gain in of_run[-1].gains
        if gain.metric == BALANCED_ACCURACY and gain.baseline not in BASELINES
    ]
    heads = ("run", "above", "probe", "embedding", "points", "95 %, paired", "p")
    return text_table(rows, heads) if rows else ""


def _verdicts(dataset: str, by_name: Mapping[str, RunRecord]) -> list[str]:
    """A line for each run and probe that can be held against the first run with an evaluation on the dataset."""
    newest: dict[str, EvaluationReport] = {
        name: record.reports[dataset][-1] for name, record in by_name.items() if dataset in record.reports
    }
    (first, ours), *others = newest.items()
    lines = []
    for name, report in others:
        if not same_test(ours, report):
            lines.append(
                f"{dataset}: {name} and {first} were not evaluated on the same tiles with the same splits, and are not "
                "held against each other."
            )
            continue
        before = {(figure.probe, figure.embedding): figure for figure in accuracies(ours)}
        for figure in accuracies(report):
            base = before.get((figure.probe, figure.embedding))
            if base is not None:
                found = difference(figure, base)
                lines.append(
                    f"{dataset}, {probe_title(figure.probe)}, {figure.embedding}: {name} is {points(found.value)} "
                    f"points against {first} ({percents(found.interval)}), which is "
                    f"{'' if found.established else 'not '}established"
                    + (
                        "."
                        if ours.images_seen == report.images_seen
                        else f"; they have seen {report.images_seen:,} and {ours.images_seen:,} tiles."
                    )
                )
    return lines


def _on_losses(by_name: Mapping[str, RunRecord], rows: Sequence[Sequence[str]]) -> str:
    """Whether losses of the runs mean the same."""
    shaping = [row[0] for row in rows if row[0].startswith(SHAPES_THE_LOSS)]
    moving = "" if all(record.recipe.distill for record in by_name.values()) else f" {_MOVING}"
    if shaping:
        return (
            f"The losses of these runs cannot be compared with each other: they differ in {', '.join(shaping)}.{moving}"
        )
    return f"The recipes define the same loss.{moving}"


def _curves(by_name: Mapping[str, RunRecord], on_losses: str) -> list[tuple[str, str]]:
    """A picture for each metric that a run has, over tiles seen, so that runs of other batches compare."""
    found = []
    for chart in CHARTS:
        for metric, label in chart.names.items():
            series = {name: curve for name, record in by_name.items() if (curve := record.curve(metric))}
            if series:
                note = on_losses if metric.startswith("loss/") else chart.note
                picture = line_chart(series, Axes("tiles seen", chart.axis, chart.percent))
                title = chart.title if len(chart.names) == 1 else f"{chart.title}, {label}"
                found.append((title, picture + (f"<p>{escape(note)}</p>" if note else "")))
    return found


def _time(by_name: Mapping[str, RunRecord]) -> str:
    rows = []
    for name, record in by_name.items():
        pace, hours, wall_s = tiles_per_s(record), worker_hours(record), record.goodput.wall_s
        rows.append(
            (
                name,
                f"{record.committed:,} of {record.recipe.steps:,}",
                describe_duration(wall_s),
                percent(record.goodput.share) if wall_s else "not known",
                f"{pace:,.1f}" if pace is not None else "not known",
                f"{record.tiles / wall_s:,.1f}" if wall_s else "not known",
                f"{hours:,.2f}",
                f"{record.tiles / hours:,.0f}" if hours else "not known",
                f"{len(record.goodput.restarts):,}",
                f"{alarms_of(record):,}",
            )
        )
    heads = (
        "run",
        "steps",
        "wall time",
        "goodput",
        "tiles/s, median step",
        "tiles/s of wall time",
        "worker hours",
        "tiles per worker hour",
        "restarts",
        "alarms",
    )
    return (
        text_table(rows, heads)
        + f"<p>{GOODPUT_MEANS}</p><p>A worker is one process with one GPU, or with some CPUs. What a run has cost is "
        "its worker hours times the price of one; evaluations and readers on other nodes come on top. Paces compare "
        "on the same machines alone.</p>"
    )


def _provenance(by_name: Mapping[str, RunRecord]) -> str:
    rows = provenance_rows(list(by_name.values()))
    return (
        text_table([(*row, "same" if len(set(row[1:])) == 1 else "differs") for row in rows], ("", *by_name, ""))
        + "<p>Packages are listed where they differ. A run that was continued with other code lists both.</p>"
    )
