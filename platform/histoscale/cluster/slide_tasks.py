"""Learning from the embeddings of slides, as a task on a node of the cluster that says how far it is."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from histoscale.cluster.on_a_node import run_on_a_node
from histoscale.embeddings.clusters import CLUSTERS, cluster_slides
from histoscale.embeddings.folder import files_of, read_folder
from histoscale.embeddings.labels import read_labels
from histoscale.embeddings.names import SlideNames, read_names, resolver
from histoscale.embeddings.progress import CountedSteps, Tell
from histoscale.embeddings.slide_probe import PROBES, ProbePlan, probe_slides
from histoscale.slides.archive import read_csv
from histoscale.storage import join, open_store


@dataclass(frozen=True)
class SlideTask:
    """What is learnt.

    Attributes:
        embeddings_uri: The folder.
        labels_uri: CSV of labels, to probe; None to cluster.
        index_uri: The index that knows the slides' names and patients, where one is given.
        plan: Of the probe.
        clusters: How many.
        sample: Tiles that clusters are made of.
        seed: Of the clusters.
    """

    embeddings_uri: str
    labels_uri: str | None
    index_uri: str | None
    plan: ProbePlan
    clusters: int
    sample: int
    seed: int


def run_task(task: SlideTask, device: str, say: Callable[[str], None]) -> list[str]:
    """Do a task on a node; gives what it found, in lines.

    Args:
        task: What to do.
        device: `cpu`, `cuda`, or `auto`, which takes a GPU for what is learnt from labels alone.
        say: Takes lines on how far it is.

    Raises:
        HistoscaleError: What the task says, the node is lost, or there is no GPU.
    """
    if device == "auto" and task.labels_uri is None:
        device = "cpu"
    return run_on_a_node(partial(_on_a_node, task), 1, say, device)


def _on_a_node(task: SlideTask, device: str, say: Callable[[str], None]) -> list[str]:
    torch.set_num_threads(1)
    return do_task(task, torch.device(device), CountedSteps(say, time.monotonic).tell)


def do_task(task: SlideTask, device: torch.device, tell: Tell) -> list[str]:
    """Do a task here; errors as those of `probe_slides`, `read_labels` and `cluster_slides`."""
    store = open_store(task.embeddings_uri)
    if task.labels_uri is None:
        found = cluster_slides(store, task.clusters, task.sample, task.seed, tell)
        key = f"{CLUSTERS}/{task.clusters}/clusters.csv"
        used = len(set(found.names()))
        return [
            f"clustered {found.sampled} tiles of {len(found.slide_ids)} slides, which are mostly of {used} clusters",
            f"strata: {join(store.uri, key)}",
        ]
    read_folder(store)
    embedded = files_of(store)
    names = SlideNames() if task.index_uri is None else read_names(open_store(task.index_uri))
    indexed = {name for ids in names.ids.values() for name in ids}
    resolve = resolver(names, lambda text: text in embedded or text in indexed)
    labels = read_labels(read_csv(task.labels_uri, "the CSV of labels"), resolve, embedded, dict(names.patients))
    report = probe_slides(store, labels, task.plan, device, tell)
    return [*report.table().splitlines(), f"report: {join(store.uri, PROBES, task.plan.name, 'report.json')}"]
