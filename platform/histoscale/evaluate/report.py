"""What an evaluation found, as a report in the run folder and as a table for people; and which step is the best."""

import json
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from histoscale.checkpoint.retention import BEST_KEY, read_best
from histoscale.errors import DatasetError
from histoscale.evaluate.embed import BOTH
from histoscale.evaluate.figures import PRETRAINED, UNTRAINED, Figure, Gain, Robustness, find_figure
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.probes import PROBES
from histoscale.evaluate.table import WIDTH, figures_table, robustness_table
from histoscale.storage import Store
from histoscale.storage.json_object import decode_json

FORMAT_VERSION = 2
FOLDER = "evaluations"
JUDGE = "knn"
"""The probe whose accuracy names the best step: it fits nothing, so it follows the embedding alone."""


@dataclass(frozen=True)
class EvaluationReport:
    """What one evaluation found.

    Attributes:
        dataset: Name of the dataset.
        dataset_hash: Names its tiles and labels, wherever they lie.
        fingerprint: Of the recipe.
        step: Optimiser steps of the checkpoint.
        images_seen: Tiles that entered them.
        counts: Tiles of each class.
        division: How the tiles were divided, and over what intervals are.
        figures: Every metric of every probe on every kind of feature.
        gains: Of the pretrained network over the baselines.
        robustness: Against the center, where centers are known.
        notes: What could not be measured, or is not to be trusted, and why.
    """

    dataset: str
    dataset_hash: str
    fingerprint: str
    step: int
    images_seen: int
    counts: dict[str, int]
    division: str
    figures: tuple[Figure, ...]
    gains: tuple[Gain, ...] = ()
    robustness: tuple[Robustness, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Where it lies in the run folder."""
        return report_key(self.dataset, self.step)

    def scalars(self) -> dict[str, float]:
        """Tags and figures of the pretrained network for TensorBoard."""
        values = {
            f"evaluate/{self.dataset}/{figure.embedding}/{figure.probe}_{figure.metric}": figure.mean
            for figure in self.figures
            if figure.features == PRETRAINED
        }
        for each in self.robustness:
            if each.features == PRETRAINED:
                values[f"evaluate/{self.dataset}/{each.embedding}/robustness_index"] = each.index
                values[f"evaluate/{self.dataset}/{each.embedding}/center_accuracy"] = each.center_accuracy
        return values

    def headline(self) -> str:
        """The pretrained network's accuracies, beside the untrained network's, as one line."""
        figures = [
            f"{PROBES[probe].title} {self.figure(PRETRAINED, probe).mean:.1%}"
            f" (untrained {self.figure(UNTRAINED, probe).mean:.1%})"
            for probe in self.probes
        ]
        return f"{self.dataset}: balanced accuracy, {', '.join(figures)}"

    @property
    def probes(self) -> tuple[str, ...]:
        """Names of the probes, as they were asked for."""
        return tuple(dict.fromkeys(figure.probe for figure in self.figures))

    def figure(
        self, features: str, probe: str, metric: str = BALANCED_ACCURACY, embedding: str | None = None
    ) -> Figure:
        """One figure; without `embedding`, that of the first kind that was measured.

        Raises:
            LookupError: It was not measured.
        """
        return find_figure(self.figures, features, probe, metric, embedding)

    def table(self) -> str:
        """Balanced accuracies, gains and robustness as text."""
        tiles, classes = sum(self.counts.values()), len(self.counts)
        return "\n".join(
            [
                f"{self.dataset}: {tiles} tiles in {classes} classes, chance {1.0 / classes:.1%}; step {self.step}",
                *figures_table(self.figures, self.gains),
                *robustness_table(self.robustness),
                "balanced accuracy and gains in percent, with 95 % intervals",
                *textwrap.wrap(f"measured on {self.division}", WIDTH),
                *(line for note in self.notes for line in textwrap.wrap(note, WIDTH)),
            ]
        )


def note_best(run_store: Store, report: EvaluationReport) -> None:
    """Name the step of a report as the run's best, unless an earlier one has a higher kNN accuracy.

    Scores on two datasets, or of two kinds of embedding, cannot be compared, so what a run is first evaluated on stays
    the judge; a best step that somebody has written by hand stays as well. Without a kNN probe nothing is named.

    Raises:
        CheckpointError: `BEST_KEY` is damaged.
    """
    if JUDGE not in report.probes:
        return
    figure = report.figure(PRETRAINED, JUDGE)
    judge = (report.dataset_hash, figure.embedding)
    best = read_best(run_store)
    # One that names no embedding was found with both parts of it.
    if best and ((best.get("dataset_hash"), best.get("embedding", BOTH)) != judge or best["score"] > figure.mean):
        return
    best = {
        "step": report.step,
        "score": figure.mean,
        "dataset": report.dataset,
        "dataset_hash": report.dataset_hash,
        "embedding": figure.embedding,
    }
    run_store.put(BEST_KEY, json.dumps(best).encode())


def report_key(dataset: str, step: int) -> str:
    """Key of the report on a dataset at a step, in the run folder."""
    return f"{FOLDER}/{dataset}-step-{step:08d}.json"


def latest_step(run_store: Store, dataset: str) -> int:
    """The newest step of a run that was evaluated on a dataset, or 0."""
    start = report_key(dataset, 0).removesuffix(f"{0:08d}.json")
    keys = (info.key for info in run_store.list(FOLDER))
    return max((int(key.removeprefix(start).removesuffix(".json")) for key in keys if key.startswith(start)), default=0)


def latest_report(run_store: Store, dataset: str) -> EvaluationReport | None:
    """The report on a dataset at the newest evaluated step of a run, or None where there is none.

    Raises:
        DatasetError: It was written by another version.
    """
    start = report_key(dataset, 0).removesuffix(f"{0:08d}.json")
    keys = [info.key for info in run_store.list(FOLDER) if info.key.startswith(start)]
    return decode(run_store.get(keys[-1])) if keys else None


def encode(report: EvaluationReport) -> bytes:
    """A report as JSON, with means, deviations and protocols for those who read it by other means."""
    content = {
        "format": FORMAT_VERSION,
        **asdict(report),
        "figures": [asdict(figure) | {"mean": figure.mean, "std": figure.std} for figure in report.figures],
        "protocol": {probe: PROBES[probe].protocol for probe in report.probes},
    }
    return json.dumps(content, indent=1).encode()


def decode(data: bytes) -> EvaluationReport:
    """The report that a JSON text holds.

    Raises:
        DatasetError: It is damaged, or was written by another version.
    """
    return decode_json(
        data,
        _decoded,
        kind=DatasetError,
        what="an evaluation is damaged, or was written by another version of histoscale",
        expected=f"format {FORMAT_VERSION}",
        remedy="evaluate the run again",
    )


def _decoded(values: dict[str, Any]) -> EvaluationReport:
    if values.pop("format", None) != FORMAT_VERSION:
        raise ValueError("another format")
    del values["protocol"]
    for item in values["figures"]:
        del item["mean"], item["std"]
    for name, kind in (("figures", Figure), ("gains", Gain), ("robustness", Robustness)):
        values[name] = tuple(kind(**_with_tuples(item)) for item in values[name])
    return EvaluationReport(**values | {"notes": tuple(values["notes"])})


def _with_tuples(item: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in item.items()}
