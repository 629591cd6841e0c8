"""What embeddings tell of whole slides: attention pooling against the mean of the tiles, on slides with labels."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from histoscale.embeddings.abmil import Abmil, FittedAbmil
from histoscale.embeddings.bags import Bags, load_bags
from histoscale.embeddings.files import read_embedding
from histoscale.embeddings.folder import read_folder, require_name
from histoscale.embeddings.heatmap import write_attention, write_heatmap
from histoscale.embeddings.labels import SlideLabels
from histoscale.embeddings.progress import Tell
from histoscale.errors import EmbeddingError
from histoscale.evaluate.intervals import Interval, Told, bootstrap, interval, permutation_p, values_of
from histoscale.evaluate.linear import Linear
from histoscale.evaluate.metrics import AUROC, BALANCED_ACCURACY, METRICS, Samples
from histoscale.evaluate.splits import Split, splits_of, units_of
from histoscale.storage import Store

PROBES = "probes"
ABMIL, MEAN = "abmil", "mean"
FEW_GROUPS = 20
"""Below so many groups in the test parts, intervals are too narrow to be trusted."""


@dataclass(frozen=True)
class ProbePlan:
    """What is asked of the slides.

    Attributes:
        name: Of the task, in the names of files.
        seeds: How many splits are drawn where the labels name none.
        max_tiles: Tiles of a slide that attention is learnt from; it is measured on all of them.
        heatmaps: Whether a picture is drawn of each slide.
    """

    name: str
    seeds: int = 5
    max_tiles: int = 4096
    heatmaps: bool = False

    def __post_init__(self) -> None:
        require_name(self.name)
        if self.seeds < 1 or self.max_tiles < 1:
            raise EmbeddingError(
                "a probe needs a split and a tile",
                value=f"--seeds {self.seeds} --max-tiles {self.max_tiles}",
                expected="1 or more of each",
            )


@dataclass(frozen=True)
class SlideFigure:
    """A metric of a way to pool: of each split, their mean, and its 95 % interval."""

    pooling: str
    metric: str
    values: tuple[float, ...]
    mean: float
    interval: Interval


@dataclass(frozen=True)
class SlideGain:
    """By how much attention is better than the mean; `p_value` is None for AUROC."""

    metric: str
    difference: float
    interval: Interval
    p_value: float | None


@dataclass(frozen=True)
class SlideReport:
    """What was found.

    Attributes:
        name: Of the task.
        embeddings: Fingerprint of the embeddings.
        counts: Slides of each class.
        groups: How many groups no split divides; None where none are known.
        splits: How many splits.
        figures: Of both ways to pool.
        gains: Of attention over the mean.
        notes: What is not to be trusted.
    """

    name: str
    embeddings: str
    counts: dict[str, int]
    groups: int | None
    splits: int
    figures: tuple[SlideFigure, ...]
    gains: tuple[SlideGain, ...]
    notes: tuple[str, ...]

    def figure(self, pooling: str, metric: str) -> SlideFigure:
        """One of the figures."""
        return next(each for each in self.figures if (each.pooling, each.metric) == (pooling, metric))

    def table(self) -> str:
        """Balanced accuracy and AUROC as text."""
        slides, classes = sum(self.counts.values()), len(self.counts)
        lines = [f"{self.name}: {slides} slides in {classes} classes, chance {100 / classes:.1f}; {self.splits} splits"]
        lines.append(f"{'pooling':<12}{'accuracy [95 %]':>24}{'AUROC [95 %]':>24}")
        for pooling, title in ((ABMIL, "attention"), (MEAN, "mean")):
            cells = [_bounded(each.mean, each.interval) for each in self._shown(pooling)]
            lines.append(f"{title:<12}" + "".join(f"{cell:>24}" for cell in cells))
        gains = [next(gain for gain in self.gains if gain.metric == metric) for metric in (BALANCED_ACCURACY, AUROC)]
        lines.append(f"{'gain':<12}" + "".join(f"{_bounded(gain.difference, gain.interval):>24}" for gain in gains))
        return "\n".join([*lines, "balanced accuracy and AUROC in percent", *self.notes])

    def to_json(self) -> bytes:
        """The report, with how it was made."""
        protocol = {ABMIL: Abmil().protocol, MEAN: f"mean of all tiles; {Linear().protocol}"}
        return json.dumps({"format": 1, **asdict(self), "protocol": protocol}, indent=1).encode()

    def _shown(self, pooling: str) -> list[SlideFigure]:
        return [self.figure(pooling, metric) for metric in (BALANCED_ACCURACY, AUROC)]


def probe_slides(store: Store, labels: SlideLabels, plan: ProbePlan, device: torch.device, tell: Tell) -> SlideReport:
    """Fit and measure both ways to pool; the report, the attention and the pictures go below `PROBES` of the folder.

    Args:
        store: The folder of the embeddings.
        labels: Of slides with a file.
        plan: What is asked.
        device: Where attention is fitted.
        tell: Takes how far it is.

    Raises:
        DatasetError: The slides cannot be divided so that every class stands on both sides.
        EmbeddingError: The folder is damaged.
        StorageError: It cannot be read or written.
    """
    folder = read_folder(store)
    splits = splits_of(labels.labels, labels.classes, plan.seeds, labels.groups, labels.parts)
    slides = len(labels.slide_ids)
    bags = load_bags(store, labels.slide_ids, plan.max_tiles, tell)
    told: dict[str, list[Told]] = {ABMIL: [], MEAN: []}
    written: set[int] = set()
    for seed, split in enumerate(splits):
        fitted = Abmil().fit(bags.bags, labels.labels, split.fit, split.val, seed, device)
        scores = [_tell_slide(store, labels, bags, row, fitted, plan, seed, written) for row in split.test]
        told[ABMIL].append(Told(split.test, np.stack(scores)))
        told[MEAN].append(Told(split.test, Linear().scores(bags.means, labels.labels, split, seed)))
        tell("splits fitted", seed + 1, len(splits))
        if seed == len(splits) - 1:  # slides that no split tests have their weights from one that learnt from them
            for row in sorted(set(range(slides)) - written - {int(n) for each in splits for n in each.test}):
                _tell_slide(store, labels, bags, row, fitted, plan, seed, written, is_held_out=False)
    report = _report(folder.fingerprint, labels, plan, splits, told)
    store.put(f"{PROBES}/{plan.name}/report.json", report.to_json())
    return report


def _tell_slide(
    store: Store,
    labels: SlideLabels,
    bags: Bags,
    row: int,
    fitted: FittedAbmil,
    plan: ProbePlan,
    seed: int,
    written: set[int],
    *,
    is_held_out: bool = True,
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Probabilities of the classes of a slide, from all of its tiles; its attention is kept the first time."""
    name = labels.slide_ids[row]
    if row in written and len(bags.bags[row]) == bags.tiles[row]:
        return fitted.tell(bags.bags[row])[0]
    slide = read_embedding(store, name)
    scores_C, weights_N = fitted.tell(slide.features)
    if row not in written:
        written.add(row)
        place = f"{PROBES}/{plan.name}"
        write_attention(store, f"{place}/attention/{name}.h5", slide, weights_N, seed, is_held_out=is_held_out)
        if plan.heatmaps:
            write_heatmap(store, f"{place}/heatmaps/{name}.png", slide, weights_N)
    return scores_C


def _report(
    fingerprint: str, labels: SlideLabels, plan: ProbePlan, splits: Sequence[Split], told: dict[str, list[Told]]
) -> SlideReport:
    units = units_of(labels.groups, len(labels.labels))
    values = {pooling: values_of(labels.labels, parts) for pooling, parts in told.items()}
    samples: dict[str, Samples] = {pooling: bootstrap(labels.labels, units, parts) for pooling, parts in told.items()}
    figures = tuple(
        SlideFigure(
            pooling,
            metric,
            values[pooling][metric],
            float(np.mean(values[pooling][metric])),
            interval(samples[pooling][metric]),
        )
        for pooling in told
        for metric in METRICS
    )
    p_values = permutation_p(labels.labels, units, told[ABMIL], told[MEAN])
    gains = tuple(
        SlideGain(
            metric,
            float(np.mean(values[ABMIL][metric]) - np.mean(values[MEAN][metric])),
            interval(samples[ABMIL][metric] - samples[MEAN][metric]),
            p_values.get(metric),
        )
        for metric in METRICS
    )
    tested = len(np.unique(units[np.concatenate([split.test for split in splits])]))
    notes = []
    if labels.without_file:
        notes.append(f"{labels.without_file} labelled slides have no embeddings")
    if labels.groups is None:
        notes.append("slides of one patient may stand on both sides: give a column group, or an index with patients")
    if tested < FEW_GROUPS:
        notes.append(f"intervals over {tested} tested groups are too narrow: {FEW_GROUPS} or more would be needed")
    counts = {name: int((labels.labels == number).sum()) for number, name in enumerate(labels.classes)}
    groups = None if labels.groups is None else len(np.unique(labels.groups))
    return SlideReport(plan.name, fingerprint, counts, groups, len(splits), figures, gains, tuple(notes))


def _bounded(value: float, bounds: Interval) -> str:
    return f"{100 * value:.1f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"
