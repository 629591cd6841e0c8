"""From features and labels to figures: every probe on every split, with intervals and gains over the baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoscale.errors import DatasetError, RecipeError
from histoscale.evaluate.embed import BOTH, EMBEDDINGS, of_kind
from histoscale.evaluate.features import FloatArray
from histoscale.evaluate.figures import COLOUR, NO_EMBEDDING, PRETRAINED, Figure, Gain, Robustness
from histoscale.evaluate.intervals import Told, bootstrap, interval, permutation_p, values_of
from histoscale.evaluate.metrics import METRICS, Samples
from histoscale.evaluate.probes import DEFAULT_PROBES, PROBES, probe_features, require_known
from histoscale.evaluate.robustness import assess_robustness, center_design
from histoscale.evaluate.splits import Labels, Units, splits_of, units_of

MAX_SEEDS = 100
MIN_UNITS = 10  # below, an interval over groups is too narrow by far


@dataclass(frozen=True)
class EvaluationPlan:
    """What an evaluation measures.

    Attributes:
        probes: Names from `PROBES`.
        embeddings: Names from `EMBEDDINGS`; the first one leads in tables.
        seeds: Splits that are drawn where a dataset has none of its own.
    """

    probes: tuple[str, ...] = DEFAULT_PROBES
    embeddings: tuple[str, ...] = (BOTH,)
    seeds: int = 3

    @classmethod
    def parse(cls, probes: str, embeddings: str, seeds: int) -> "EvaluationPlan":
        """From lists with commas between.

        Raises:
            RecipeError: A name is unknown or doubled, or the number of splits is out of range.
        """
        plan = cls(tuple(probes.split(",")), tuple(embeddings.split(",")), seeds)
        require_known("probe", plan.probes, tuple(PROBES))
        require_known("embedding", plan.embeddings, EMBEDDINGS)
        if not 1 <= seeds <= MAX_SEEDS:
            raise RecipeError(
                "the number of splits is out of range",
                value=seeds,
                expected=f"1 to {MAX_SEEDS}",
                remedy="correct --seeds; 3 is usual",
            )
        return plan


@dataclass(frozen=True)
class Truth:
    """What is known of the tiles of a dataset, as of `LabelledTiles`."""

    classes: Sequence[str]
    labels: Labels
    groups: NDArray[np.str_] | None = None
    centers: NDArray[np.str_] | None = None
    parts: NDArray[np.str_] | None = None


@dataclass(frozen=True)
class Findings:
    """All that was found; see `EvaluationReport`."""

    figures: tuple[Figure, ...]
    gains: tuple[Gain, ...]
    robustness: tuple[Robustness, ...]
    division: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Answers:
    """What one probe tells of the test parts on one kind of feature, with its resamples."""

    told: tuple[Told, ...]
    values: dict[str, tuple[float, ...]]
    samples: Samples


def assess(features: Mapping[str, FloatArray], truth: Truth, plan: EvaluationPlan) -> Findings:
    """Measure what each kind of feature tells about the classes, and about the centers where these are known.

    Args:
        features: Features of the tiles by name, float32 [N, D]: of `PRETRAINED`, of what it is set beside, and of
            `COLOUR`; of networks class token ++ mean of patches.
        truth: Of the tiles.
        plan: What to measure.

    Raises:
        DatasetError: The tiles cannot be divided, or the dataset's own parts share groups.
    """
    splits = splits_of(truth.labels, truth.classes, plan.seeds, truth.groups, truth.parts)
    units = units_of(truth.groups, len(truth.labels))
    kinds = {
        (name, embedding): rows if embedding == NO_EMBEDDING else of_kind(rows, embedding)
        for name, rows in features.items()
        for embedding in ((NO_EMBEDDING,) if name == COLOUR else plan.embeddings)
    }
    figures: list[Figure] = []
    gains: list[Gain] = []
    for probe in plan.probes:
        answers = {}
        for kind, rows in kinds.items():
            told = probe_features(PROBES[probe], rows, truth.labels, splits)
            samples = bootstrap(truth.labels, units, told, draws=PROBES[probe].draws)
            answers[kind] = _Answers(told, values_of(truth.labels, told), samples)
            figures += _figures(*kind, probe, answers[kind])
        for embedding in plan.embeddings:
            gains += _gains(probe, embedding, answers, truth.labels, units)
    robustness, notes = _robustness(kinds, truth, plan.seeds)
    tested = len(np.unique(units[np.concatenate([split.test for split in splits])]))
    if tested < MIN_UNITS:
        notes += (f"intervals over {tested} tested groups are too narrow: {MIN_UNITS} or more would be needed",)
    return Findings(tuple(figures), tuple(gains), robustness, _division(truth, len(splits)), notes)


def _figures(name: str, embedding: str, probe: str, answers: _Answers) -> list[Figure]:
    return [
        Figure(name, embedding, probe, metric, answers.values[metric], interval(answers.samples[metric]))
        for metric in METRICS
    ]


def _gains(
    probe: str, embedding: str, answers: Mapping[tuple[str, str], _Answers], labels: Labels, units: Units
) -> list[Gain]:
    ours = answers[PRETRAINED, embedding]
    gains = []
    for baseline in dict.fromkeys(name for name, _ in answers if name != PRETRAINED):
        theirs = answers[baseline, NO_EMBEDDING if baseline == COLOUR else embedding]
        p_values = permutation_p(labels, units, ours.told, theirs.told)
        for metric in METRICS:
            difference = float(np.mean(ours.values[metric]) - np.mean(theirs.values[metric]))
            between = interval(ours.samples[metric] - theirs.samples[metric])
            gains.append(Gain(baseline, embedding, probe, metric, difference, between, p_values.get(metric)))
    return gains


def _robustness(
    kinds: Mapping[tuple[str, str], FloatArray], truth: Truth, seeds: int
) -> tuple[tuple[Robustness, ...], tuple[str, ...]]:
    """What the features tell of the centers; where that cannot be said, why not: it is no reason to lose the rest."""
    if truth.centers is None:
        return (), ()
    try:
        design = center_design(truth.labels, truth.centers, truth.groups, seeds)
        return tuple(assess_robustness(*kind, rows, design) for kind, rows in kinds.items()), ()
    except DatasetError as error:
        return (), (f"robustness was not measured: {error}",)


def _division(truth: Truth, splits: int) -> str:
    over = "tiles, whose patients are not known" if truth.groups is None else f"{len(np.unique(truth.groups))} groups"
    if truth.parts is not None:
        return f"the dataset's own split of {over}"
    return f"{splits} stratified split{'s' if splits > 1 else ''} of {over}"
