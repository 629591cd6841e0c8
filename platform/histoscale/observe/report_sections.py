"""Parts of a run's report beside time and curves: what ran, what evaluations found, what was left out, how to go on."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.run_record import find_index, recorded_origins
from histoscale.config.recipe import Recipe
from histoscale.errors import DatasetError
from histoscale.evaluate.figures import BASELINES, PRETRAINED, UNTRAINED, Figure
from histoscale.evaluate.intervals import Interval
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.probes import PROBES
from histoscale.evaluate.report import FOLDER, EvaluationReport, decode
from histoscale.observe.code_record import code_lines
from histoscale.observe.report_curves import Axes, line_chart
from histoscale.observe.wording import percent, percents, points
from histoscale.storage import Store

Cells = Sequence[str]
_ON_ONE_LINE = 22


def what_ran(store: Store, recipe: Recipe) -> str:
    """The run in a few rows: network, batch, tiles, index, what it learns from beside slides, and the code."""
    batch, crops = recipe.batch, recipe.crops
    mix = ", ".join(f"{_mpp(entry.mpp)} um/px {entry.share:g}" for entry in recipe.data.mix)
    rows = [
        ("network", f"{recipe.model.arch}, crops of {crops.global_px} and {crops.local_px} px, {recipe.precision}"),
        ("length", f"{recipe.schedule.images:,} tiles in {recipe.steps:,} steps of {batch.tiles:,}"),
        ("batch", f"{batch.replicas} replicas of {batch.per_replica} tiles, ZeRO {recipe.cluster.zero_stage}"),
        ("magnifications, by weight", mix),
    ]
    index = find_index(store)
    if index is not None:
        rows.append(("index", f"{index[0]}, snapshot {index[1]}"))
    rows += [("learns from", line) for line in recorded_origins(store)]
    rows += [("code", line) for line in code_lines(store)]
    return text_table(rows)


def read_reports(store: Store) -> dict[str, list[EvaluationReport]]:
    """The evaluations of a run by the name of the dataset, steps ascending; those of another version are left out."""
    by_dataset: dict[str, list[EvaluationReport]] = {}
    for info in store.list(FOLDER):
        if info.key.endswith(".json") and "-step-" in info.key:
            try:
                report = decode(store.get(info.key))
            except DatasetError:  # evaluating again would overwrite it
                continue
            by_dataset.setdefault(report.dataset, []).append(report)
    return dict(sorted(by_dataset.items()))


def evaluations(by_dataset: Mapping[str, Sequence[EvaluationReport]]) -> list[tuple[str, str]]:
    """For each dataset a heading, the newest figures, and their curve over the steps."""
    return [
        (f"Evaluation on {escape(name)}, step {reports[-1].step:,}", _evaluation(reports))
        for name, reports in by_dataset.items()
    ]


def quarantined(commit: Commit | None) -> str:
    """The slides that gave no tiles any more, or that there are none."""
    if commit is None or not commit.quarantine:
        return "<p>Every slide could be read.</p>"
    heads = ("slide", "from step", "why")
    return text_table([(one.slide_id, f"{one.step:,}", one.reason) for one in commit.quarantine], heads)


def how_to_go_on(store: Store, recipe: Recipe, committed: int) -> str:
    """The commands that continue, evaluate and export the run."""
    index = (find_index(store) or ("INDEX", ""))[0]
    run = shlex.quote(store.uri)
    lines = [f"python jobs/export.py --run {run} --format timm --out DIR"]
    lines.insert(0, f"python jobs/evaluate.py --run {run} --dataset DIR")
    if committed < recipe.steps:
        recipe_file = f"{run}/recipe.yaml"
        lines.insert(0, f"python jobs/pretrain.py --recipe {recipe_file} --index {shlex.quote(index)} --out {run}")
    return "".join(f"<pre>{escape(line)}</pre>" for line in lines) + (
        "<p>Each after <code>ray job submit ... --</code>, or with the Python of histoscale's own environment.</p>"
    )


def _evaluation(reports: Sequence[EvaluationReport]) -> str:
    newest = reports[-1]
    others = dict.fromkeys((*BASELINES, *(gain.baseline for gain in newest.gains)))
    heads = ("probe", "embedding", "balanced accuracy", "95 %", "untrained", *(f"gain over {name}" for name in others))
    rows = []
    for figure in accuracies(newest):
        gains = {
            gain.baseline: f"{points(gain.difference)} ({percents(gain.interval)})"
            for gain in newest.gains
            if (gain.embedding, gain.probe, gain.metric) == (figure.embedding, figure.probe, BALANCED_ACCURACY)
        }
        untrained = newest.figure(UNTRAINED, figure.probe, embedding=figure.embedding)
        rows.append(
            (
                probe_title(figure.probe),
                figure.embedding,
                percent(figure.mean),
                percents(figure.interval),
                percent(untrained.mean),
                *(gains.get(name, "") for name in others),
            )
        )
    chance = 1.0 / len(newest.counts)
    text = (
        f"<p>{sum(newest.counts.values()):,} tiles, {len(newest.counts)} classes, chance {percent(chance)}; "
        f"{escape(newest.division)}. Where the interval of a gain holds 0, the gain is not established.</p>"
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in newest.notes)
    return text_table(rows, heads) + text + notes + accuracy_curves({"": reports}) + _robustness(newest)


def accuracies(report: EvaluationReport) -> Iterator[Figure]:
    """The balanced accuracies of the pretrained network."""
    for figure in report.figures:
        if (figure.features, figure.metric) == (PRETRAINED, BALANCED_ACCURACY):
            yield figure


def accuracy_curves(by_run: Mapping[str, Sequence[EvaluationReport]], over_tiles: bool = False) -> str:
    """Balanced accuracy by each probe with its intervals, over steps or over tiles seen.

    Args:
        by_run: Name of the run for the legend, empty for none -> its reports on one dataset.
        over_tiles: Whether to draw over tiles seen, by which runs of different batches compare.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    intervals: dict[str, dict[float, Interval]] = {}
    for run, reports in by_run.items():
        for report in reports:
            place = float(report.images_seen if over_tiles else report.step)
            first = {figure.probe: figure for figure in reversed(tuple(accuracies(report)))}
            for probe, figure in first.items():
                name = " ".join(filter(None, (run, probe_title(probe))))
                series.setdefault(name, []).append((place, figure.mean))
                intervals.setdefault(name, {})[place] = figure.interval
    axes = Axes("tiles seen" if over_tiles else "step", "balanced accuracy, with 95 % intervals", percent=True)
    return line_chart(series, axes, intervals)


def _robustness(report: EvaluationReport) -> str:
    heads = ("features", "embedding", "robustness index", "95 %", "center told", "95 %", "by chance")
    rows = [
        (
            each.features,
            each.embedding,
            f"{each.index:.3f}",
            f"{each.index_interval[0]:.3f} to {each.index_interval[1]:.3f}",
            percent(each.center_accuracy),
            percents(each.center_interval),
            percent(each.center_chance),
        )
        for each in report.robustness
    ]
    return text_table(rows, heads) if rows else ""


def _mpp(mpp: float | tuple[float, float]) -> str:
    return f"{mpp[0]:g} to {mpp[1]:g}" if isinstance(mpp, tuple) else f"{mpp:g}"


def probe_title(probe: str) -> str:
    """The name of a probe for people."""
    return PROBES[probe].title if probe in PROBES else probe


def text_table(rows: Sequence[Cells], heads: Cells = ()) -> str:
    """A table of texts."""
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in heads) + "</tr>" if heads else ""
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _cell(text: str) -> str:
    return f"<td{' class=s' if len(text) <= _ON_ONE_LINE else ''}>{escape(text)}</td>"
