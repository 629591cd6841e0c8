"""A network beside others: everything that is measured of them on one dataset, or on one task of expression."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from histoscale.checkpoint.run_record import find_index
from histoscale.config.recipe import Recipe
from histoscale.errors import DatasetError, RunError, SlideIndexError, StorageError
from histoscale.evaluate.assess import EvaluationPlan, Truth, assess
from histoscale.evaluate.backbone import initial_backbone, trained_backbone
from histoscale.evaluate.baselines import colour_statistics
from histoscale.evaluate.datasets import LabelledTiles, open_dataset
from histoscale.evaluate.embed import Embedder
from histoscale.evaluate.features import Extractor, extract
from histoscale.evaluate.figures import COLOUR, PRETRAINED, UNTRAINED
from histoscale.evaluate.networks import Network, require_names, untrained_like
from histoscale.evaluate.overlap import TrainingNames, find_overlap, training_names
from histoscale.evaluate.progress import Tell, silent
from histoscale.evaluate.report import EvaluationReport, encode, note_best
from histoscale.models import VisionTransformer
from histoscale.storage import Store, open_store


@dataclass(frozen=True)
class Comparison:
    """A network, and what it is set beside.

    Attributes:
        network: What is judged.
        untrained: The same network before it has learnt anything.
        beside: Others, of other shapes perhaps.
        device: Where they look at tiles.
        tell: Takes a line for people on how far it is.
    """

    network: Network
    untrained: VisionTransformer
    beside: tuple[Network, ...]
    device: torch.device
    tell: Tell = silent

    @classmethod
    def of_run(
        cls,
        run_store: Store,
        recipe: Recipe,
        device: torch.device,
        beside: Sequence[Network] = (),
        tell: Tell = silent,
    ) -> "Comparison":
        """The newest checkpoint of a run, beside what the run began with.

        Raises:
            CheckpointError: The run has no usable checkpoint.
            ModelError: Two of those beside it have one name.
        """
        require_names(beside)
        trained, commit = trained_backbone(run_store, recipe)
        network = Network.of_commit(PRETRAINED, trained, recipe, commit)
        return cls(network, initial_backbone(recipe), tuple(beside), device, tell)

    @classmethod
    def of_network(
        cls, network: Network, device: torch.device, beside: Sequence[Network] = (), tell: Tell = silent
    ) -> "Comparison":
        """Any network, beside the same shape with weights that are drawn.

        Raises:
            ModelError: Two of those beside it have one name.
        """
        require_names(beside)
        return cls(network, untrained_like(network), tuple(beside), device, tell)

    def extractors(self) -> dict[str, Extractor]:
        """Name of each kind of feature -> how it is taken from tiles."""
        image_px = self.network.image_px
        return {
            PRETRAINED: Embedder(self.network.backbone, image_px, self.device),
            UNTRAINED: Embedder(self.untrained, image_px, self.device),
            **{other.name: Embedder(other.backbone, other.image_px, self.device) for other in self.beside},
            COLOUR: colour_statistics,
        }

    def evaluate(self, dataset: LabelledTiles, plan: EvaluationPlan, notes: Sequence[str] = ()) -> EvaluationReport:
        """Probe all of them on labelled tiles.

        Args:
            dataset: The tiles.
            plan: What is measured.
            notes: What else a reader of the report must know.

        Raises:
            DatasetError: The dataset cannot be divided, or holds tiles that cannot be read.
        """
        features = extract(dataset, self.extractors(), tell=self.tell)
        truth = Truth(dataset.classes, dataset.labels, dataset.groups, dataset.centers, dataset.parts)
        found = assess(features.by_name, truth, plan)
        return EvaluationReport(
            dataset=dataset.name,
            dataset_hash=features.content_hash,
            fingerprint=self.network.fingerprint,
            step=self.network.step,
            images_seen=self.network.images_seen,
            counts=dataset.counts(),
            division=found.division,
            figures=found.figures,
            gains=found.gains,
            robustness=found.robustness,
            notes=(*notes, *found.notes),
        )


def evaluate_run(
    run_store: Store, recipe: Recipe, dataset_uri: str, device: torch.device, plan: EvaluationPlan
) -> EvaluationReport:
    """Probe the newest checkpoint of a run on a labelled dataset; see `evaluate_into`.

    Args:
        run_store: The run folder.
        recipe: Of the run.
        dataset_uri: The dataset.
        device: Where the networks look at it.
        plan: What is measured.

    Raises:
        DatasetError: The dataset is incomplete, cannot be divided, or holds tiles that cannot be read.
        CheckpointError: The run has no usable checkpoint.
    """
    dataset = open_dataset(dataset_uri)
    return evaluate_into(run_store, Comparison.of_run(run_store, recipe, device), dataset, plan)


def evaluate_into(
    store: Store, comparison: Comparison, dataset: LabelledTiles, plan: EvaluationPlan
) -> EvaluationReport:
    """Measure, and write the report into a run folder, or into another.

    Where it is the best so far on its dataset, its checkpoint stays; see `note_best`.

    Raises:
        DatasetError: The dataset cannot be divided, or holds tiles that cannot be read.
        CheckpointError: The note of the best step is damaged.
        StorageError: The report cannot be written.
    """
    report = comparison.evaluate(dataset, plan, overlap_notes(store, dataset))
    store.put(report.key, encode(report))
    note_best(store, report)
    return report


def overlap_notes(run_store: Store, dataset: LabelledTiles) -> tuple[str, ...]:
    """A note where a run may have seen tiles of a dataset in training, or where that could not be told.

    Nothing is noted of datasets that tell no groups and of folders that name no index: there nothing can be looked up.
    """
    if dataset.groups is None:
        return ()
    try:
        index = find_index(run_store)
        if index is None:
            return ()
        uri, snapshot_id = index
        overlap = find_overlap(_names_of(uri, snapshot_id), dataset)
    except (RunError, StorageError, SlideIndexError, DatasetError) as error:
        return (f"whether training has seen slides of this dataset could not be told: {error}",)
    if not overlap.shared:
        return ()
    return (f"training has seen slides of this dataset, so its figures flatter the network: {overlap}",)


@lru_cache(maxsize=1)
def _names_of(index_uri: str, snapshot_id: str) -> TrainingNames:
    """Of a snapshot, which never changes; a suite asks for them once for each task, and they may be millions."""
    return training_names(open_store(index_uri), snapshot_id)
