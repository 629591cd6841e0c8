"""Parts of a run's report beside time and curves: what ran, what evaluations found, what was left out, how to go on."""

import json
import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

from histoscale.checkpoint.manifest import Commit
from histoscale.config.recipe import Recipe
from histoscale.errors import DatasetError
from histoscale.evaluate.figures import PRETRAINED, UNTRAINED
from histoscale.evaluate.intervals import Interval
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.report import FOLDER, EvaluationReport, decode
from histoscale.observe.report_curves import line_chart
from histoscale.storage import Store

_INDEX_KEY, _ORIGINS_KEY, _PROVENANCE = "index.json", "origins.json", "provenance"
_PACKAGES = ("torch", "deepspeed", "ray")

Cells = Sequence[str]


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
    if store.exists(_INDEX_KEY):
        index = json.loads(store.get(_INDEX_KEY))
        rows.append(("index", f"{index['index']}, snapshot {index['snapshot_id']}"))
    if store.exists(_ORIGINS_KEY):
        rows += [("learns from", line) for line in json.loads(store.get(_ORIGINS_KEY))]
    rows += [("code", line) for line in _code(store)]
    return _table(rows)


def evaluations(store: Store) -> list[tuple[str, str]]:
    """For each dataset a heading, the newest figures, and their curve over the steps."""
    by_dataset: dict[str, list[EvaluationReport]] = {}
    for info in store.list(FOLDER):
        if info.key.endswith(".json") and "-step-" in info.key:
            try:
                report = decode(store.get(info.key))
            except DatasetError:  # of another version: evaluating again would overwrite it
                continue
            by_dataset.setdefault(report.dataset, []).append(report)
    return [
        (f"Evaluation on {escape(name)}, step {reports[-1].step:,}", _evaluation(reports))
        for name, reports in sorted(by_dataset.items())
    ]


def quarantined(commit: Commit | None) -> str:
    """The slides that gave no tiles any more, or that there are none."""
    if commit is None or not commit.quarantine:
        return "<p>Every slide could be read.</p>"
    heads = ("slide", "from step", "why")
    return _table([(one.slide_id, f"{one.step:,}", one.reason) for one in commit.quarantine], heads)


def how_to_go_on(store: Store, recipe: Recipe, committed: int) -> str:
    """The commands that continue, evaluate and export the run."""
    index = json.loads(store.get(_INDEX_KEY))["index"] if store.exists(_INDEX_KEY) else "INDEX"
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
    heads = ("probe", "embedding", "balanced accuracy", "95 %", "untrained", "gain over untrained", "over colour")
    rows = []
    for figure in newest.figures:
        if (figure.features, figure.metric) != (PRETRAINED, BALANCED_ACCURACY):
            continue
        gains = {
            gain.baseline: f"{100 * gain.difference:+.1f} ({_interval(gain.interval)})"
            for gain in newest.gains
            if (gain.embedding, gain.probe, gain.metric) == (figure.embedding, figure.probe, BALANCED_ACCURACY)
        }
        untrained = newest.figure(UNTRAINED, figure.probe, embedding=figure.embedding)
        rows.append(
            (
                figure.probe,
                figure.embedding,
                f"{100 * figure.mean:.1f} %",
                _interval(figure.interval),
                f"{100 * untrained.mean:.1f} %",
                *gains.values(),
            )
        )
    chance = 1.0 / len(newest.counts)
    text = (
        f"<p>{sum(newest.counts.values()):,} tiles, {len(newest.counts)} classes, chance {chance:.1%}; "
        f"{escape(newest.division)}. Where the interval of a gain holds 0, the gain is not established.</p>"
    )
    curves = {
        f"{probe}": [
            (float(each.step), each.figure(PRETRAINED, probe).mean) for each in reports if probe in each.probes
        ]
        for probe in newest.probes
    }
    notes = "".join(f"<p>{escape(note)}</p>" for note in newest.notes)
    return _table(rows, heads) + text + notes + (line_chart(curves) if len(reports) > 1 else "") + _robustness(newest)


def _robustness(report: EvaluationReport) -> str:
    heads = ("features", "embedding", "robustness index", "95 %", "center told", "95 %", "by chance")
    rows = [
        (
            each.features,
            each.embedding,
            f"{each.index:.3f}",
            _interval(each.index_interval),
            f"{each.center_accuracy:.1%}",
            _interval(each.center_interval),
            f"{each.center_chance:.1%}",
        )
        for each in report.robustness
    ]
    return _table(rows, heads) if rows else ""


def _code(store: Store) -> list[str]:
    lines = []
    for info in store.list(_PROVENANCE):
        if info.key.endswith(".json"):
            record: dict[str, Any] = json.loads(store.get(info.key))
            packages = ", ".join(f"{name} {record['packages'].get(name, 'unknown')}" for name in _PACKAGES)
            git = record.get("git")
            at = f", commit {git['commit'][:12]}{' and changes' if git['difference'] else ''}" if git else ""
            lines.append(f"source {record['source_sha256'][:12]}{at}, Python {record['python']}, {packages}")
    return lines


def _mpp(mpp: float | tuple[float, float]) -> str:
    return f"{mpp[0]:g} to {mpp[1]:g}" if isinstance(mpp, tuple) else f"{mpp:g}"


def _interval(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _table(rows: Sequence[Cells], heads: Cells = ()) -> str:
    head = "<tr>" + "".join(f"<th>{escape(name)}</th>" for name in heads) + "</tr>" if heads else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{head}{body}</table>"
