"""What two or more runs differ in: recipes, code, evaluations; pure but for reading the run folders."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.run_record import find_index
from histoscale.config.decode import OUTSIDE_THE_FINGERPRINT, flat_fields
from histoscale.config.recipe import Recipe
from histoscale.evaluate.figures import Figure
from histoscale.evaluate.intervals import Interval
from histoscale.evaluate.report import EvaluationReport
from histoscale.observe.code_record import code_line, read_provenance
from histoscale.observe.goodput import Goodput, StepTimes, account, worker_s
from histoscale.observe.metrics import read_metrics
from histoscale.observe.report_sections import read_reports
from histoscale.observe.timeline import Event, Kind, read_events
from histoscale.storage import Store

TILES = "progress/images_seen"
SHAPES_THE_LOSS = (
    "loss.",
    "heads.",
    "distill",
    "crops.",
    "augment.",
    "model.",
    "batch.",
    "optim.ema_momentum",
    "data.",
)
"""Recipes that differ in one of these have losses on other scales, or of other tasks."""
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class RunRecord:
    """What a run folder tells of a run.

    Attributes:
        uri: The run folder.
        committed: Steps of the newest commit.
        events: Its timeline.
        goodput: What became of its time.
        metrics: Of the committed steps.
        reports: Name of the dataset -> evaluations, steps ascending.
        provenance: A record for each different code.
        index: URI and snapshot of the index.
    """

    uri: str
    recipe: Recipe
    committed: int
    events: tuple[Event, ...]
    goodput: Goodput
    metrics: tuple[Mapping[str, float], ...]
    reports: Mapping[str, Sequence[EvaluationReport]]
    provenance: tuple[Mapping[str, Any], ...]
    index: tuple[str, str]

    @property
    def tiles(self) -> int:
        """Tiles that entered committed steps."""
        return self.committed * self.recipe.batch.tiles

    def curve(self, name: str) -> list[tuple[float, float]]:
        """A metric over tiles seen."""
        return [(line[TILES], line[name]) for line in self.metrics if name in line and TILES in line]


@dataclass(frozen=True)
class Difference:
    """By how much a run is above another one on the same tiles, as far as their reports alone can tell.

    Attributes:
        value: Of the balanced accuracies.
        interval: Which holds the difference however the two depend on each other: from the lower end of the one to the
            upper end of the other.
    """

    value: float
    interval: Interval

    @property
    def established(self) -> bool:
        """Whether the two intervals do not meet."""
        return self.interval[0] > 0.0 or self.interval[1] < 0.0


def read_record(store: Store, recipe: Recipe, commit: Commit | None) -> RunRecord:
    """Read what a comparison needs of a run.

    Raises:
        HistoscaleError: The timeline or another file of the run cannot be read.
    """
    committed = commit.step if commit else 0
    events, metrics = read_events(store), tuple(read_metrics(store, committed))
    return RunRecord(
        uri=store.uri,
        recipe=recipe,
        committed=committed,
        events=tuple(events),
        goodput=account(events, StepTimes.of(metrics)),
        metrics=metrics,
        reports=read_reports(store),
        provenance=tuple(read_provenance(store)),
        index=find_index(store) or (NOT_RECORDED, NOT_RECORDED),
    )


def names_of(uris: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell the runs apart."""
    parts = [PurePosixPath(uri.replace("://", "/")).parts for uri in uris]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(uris)


def recipe_rows(recipes: Sequence[Recipe]) -> list[tuple[str, ...]]:
    """Each field in which recipes differ, with its value in each."""
    flat = [flat_fields(recipe) for recipe in recipes]
    names = sorted({name for fields in flat for name in fields})
    rows = [(name, *(_shown(fields.get(name)) for fields in flat)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def of_the_experiment(field: str) -> bool:
    """Whether a field is part of what is trained, and not of how it is looked at and what it runs on."""
    return field.partition(".")[0] not in OUTSIDE_THE_FINGERPRINT


def difference(ours: Figure, theirs: Figure) -> Difference:
    """How far apart two runs are on the same test tiles.

    The reports hold no answers tile by tile, so the two cannot be paired. Each interval misses its own truth in at most
    5 of 100 cases, so both hold in 90 at least, whatever ties them; where they are about normal, the standard error of
    a difference is at most the sum of the two, and this interval holds in 95.
    """
    low, high = ours.interval[0] - theirs.interval[1], ours.interval[1] - theirs.interval[0]
    return Difference(ours.mean - theirs.mean, (low, high))


def same_test(ours: EvaluationReport, theirs: EvaluationReport) -> bool:
    """Whether two reports are on the same tiles and labels, divided in the same way."""
    return (ours.dataset_hash, ours.division) == (theirs.dataset_hash, theirs.division)


def provenance_rows(records: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Index, code and packages of each run; of packages those alone that differ."""
    rows = [
        ("index", *(record.index[0] for record in records)),
        ("snapshot of the index", *(record.index[1] for record in records)),
        ("code", *(_joined(map(code_line, record.provenance)) for record in records)),
        ("Python", *(_joined(each["python"] for each in record.provenance) for record in records)),
        ("platform", *(_joined(each["platform"] for each in record.provenance) for record in records)),
    ]
    packages = sorted({name for record in records for each in record.provenance for name in each["packages"]})
    for name in packages:
        row = (name, *(_joined(each["packages"].get(name, "none") for each in r.provenance) for r in records))
        if len(set(row[1:])) > 1:
            rows.append(row)
    return rows


def alarms_of(record: RunRecord) -> int:
    """How often an alarm rang."""
    return sum(event.kind is Kind.ALARM for event in record.events)


def tiles_per_s(record: RunRecord) -> float | None:
    """Median over the committed steps; None without any."""
    paces = [line["time/tiles_per_s"] for line in record.metrics if "time/tiles_per_s" in line]
    return statistics.median(paces) if paces else None


def worker_hours(record: RunRecord) -> float:
    """What a price per hour of a worker is to be multiplied with."""
    return worker_s(record.events) / 3600.0


def _joined(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values)) or NOT_RECORDED


def _shown(value: object) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
