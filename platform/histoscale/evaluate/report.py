"""From a run and a labelled dataset to a report in the run folder, and its table for people."""

import json
from dataclasses import asdict, dataclass

import torch

from histoscale.checkpoint.retention import BEST_KEY, read_best
from histoscale.config.decode import fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import DatasetError
from histoscale.evaluate.backbone import initial_backbone, trained_backbone
from histoscale.evaluate.baselines import colour_statistics
from histoscale.evaluate.datasets import open_dataset
from histoscale.evaluate.embed import Embedder
from histoscale.evaluate.features import Extractor, extract
from histoscale.evaluate.probes import NEIGHBOURS, PROBES, SPLITS, TEMPERATURE, TEST_SHARE, Figure, probe_features
from histoscale.storage import Store

FORMAT_VERSION = 1
PRETRAINED = "pretrained"
UNTRAINED = "untrained"
COLOUR = "colour statistics"
FOLDER = "evaluations"

_PROTOCOL = {
    "embedding": "class token ++ mean of patch tokens, EMA teacher",
    "splits": SPLITS,
    "test_share": TEST_SHARE,
    "knn": f"{NEIGHBOURS} neighbours, cosine of centred features, votes exp(cosine / {TEMPERATURE})",
    "linear": "logistic regression on z-scored features",
}
_TITLES = {"knn": f"kNN (k={NEIGHBOURS})", "linear": "linear probe"}


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
        figures: Every metric of every probe on every kind of feature.
    """

    dataset: str
    dataset_hash: str
    fingerprint: str
    step: int
    images_seen: int
    counts: dict[str, int]
    figures: tuple[Figure, ...]

    @property
    def key(self) -> str:
        """Where it lies in the run folder."""
        return report_key(self.dataset, self.step)

    def scalars(self) -> dict[str, float]:
        """Tags and figures of the pretrained network for TensorBoard."""
        return {
            f"evaluate/{self.dataset}/{figure.probe}_{figure.metric}": figure.mean
            for figure in self.figures
            if figure.features == PRETRAINED
        }

    def headline(self) -> str:
        """The pretrained network's figures, beside the untrained network's, as one line."""
        figures = [
            f"{_TITLES[probe]} {percent(self.figure(PRETRAINED, probe))}"
            f" (untrained {percent(self.figure(UNTRAINED, probe))})"
            for probe in PROBES
        ]
        return f"{self.dataset}: balanced accuracy, {', '.join(figures)}"

    def figure(self, features: str, probe: str, metric: str = "balanced_accuracy") -> Figure:
        """One figure."""
        return next(
            figure
            for figure in self.figures
            if (figure.features, figure.probe, figure.metric) == (features, probe, metric)
        )

    def table(self) -> str:
        """Balanced accuracies as text: a row per kind of feature, a column per probe."""
        rows = [("", *(_TITLES[probe] for probe in PROBES))]
        rows += [
            (features, *(percent(self.figure(features, probe)) for probe in PROBES))
            for features in (PRETRAINED, UNTRAINED, COLOUR)
        ]
        lines = [f"{name:<20}" + "".join(f"{cell:>18}" for cell in cells) for name, *cells in rows]
        tiles, classes = sum(self.counts.values()), len(self.counts)
        return "\n".join(
            [
                f"{self.dataset}: {tiles} tiles in {classes} classes, chance {1.0 / classes:.1%}; step {self.step}",
                *lines,
                f"balanced accuracy, mean +- standard deviation over {SPLITS} stratified splits",
            ]
        )


def percent(figure: Figure) -> str:
    """A share as people read it: `93.1 +- 1.2 %`."""
    return f"{100 * figure.mean:.1f} +- {100 * figure.std:.1f} %"


def evaluate_run(run_store: Store, recipe: Recipe, dataset_uri: str, device: torch.device) -> EvaluationReport:
    """Probe the newest checkpoint of a run on a labelled dataset, and write the report into the run folder.

    Where it is the best so far on its dataset, its checkpoint stays; see `note_best`.

    Raises:
        DatasetError: The dataset is incomplete or holds tiles that cannot be read.
        CheckpointError: The run has no usable checkpoint.
    """
    dataset = open_dataset(dataset_uri)
    trained, commit = trained_backbone(run_store, recipe)
    side_px = recipe.crops.global_px
    extractors: dict[str, Extractor] = {
        PRETRAINED: Embedder(trained, side_px, device),
        UNTRAINED: Embedder(initial_backbone(recipe), side_px, device),
        COLOUR: colour_statistics,
    }
    features = extract(dataset, extractors)
    figures = [
        figure for name, rows in features.by_name.items() for figure in probe_features(name, rows, dataset.labels)
    ]
    report = EvaluationReport(
        dataset=dataset.name,
        dataset_hash=features.content_hash,
        fingerprint=fingerprint(recipe),
        step=commit.step,
        images_seen=commit.images_seen,
        counts=dataset.counts(),
        figures=tuple(figures),
    )
    run_store.put(report.key, encode(report))
    note_best(run_store, report)
    return report


def note_best(run_store: Store, report: EvaluationReport) -> None:
    """Name the step of a report as the run's best, unless an earlier one has a higher kNN accuracy.

    Scores on two datasets cannot be compared, so the dataset that a run is first evaluated on stays the judge; a best
    step that somebody has written by hand stays as well.

    Raises:
        CheckpointError: `BEST_KEY` is damaged.
    """
    score = report.figure(PRETRAINED, "knn").mean
    best = read_best(run_store)
    if best and (best.get("dataset_hash") != report.dataset_hash or best["score"] > score):
        return
    best = {"step": report.step, "score": score, "dataset": report.dataset, "dataset_hash": report.dataset_hash}
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
    """A report as JSON, with means and deviations for those who read it by other means."""
    figures = [asdict(figure) | {"mean": figure.mean, "std": figure.std} for figure in report.figures]
    content = {"format": FORMAT_VERSION, **asdict(report), "protocol": _PROTOCOL, "figures": figures}
    return json.dumps(content, indent=1).encode()


def decode(data: bytes) -> EvaluationReport:
    """The report that a JSON text holds.

    Raises:
        DatasetError: It was written by another version.
    """
    values = json.loads(data)
    if values.pop("format", None) != FORMAT_VERSION:
        raise DatasetError(
            "an evaluation was written by another version of histoscale",
            expected=f"format {FORMAT_VERSION}",
            remedy="evaluate the run again",
        )
    del values["protocol"]
    figures = tuple(
        Figure(item["features"], item["probe"], item["metric"], tuple(item["values"])) for item in values.pop("figures")
    )
    return EvaluationReport(**values, figures=figures)
