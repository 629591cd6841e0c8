"""Learning from the embeddings of slides, as a task on a node of the cluster that says how far it is."""

import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
import torch

from histoscale.cluster.failures import diagnosis_in
from histoscale.embeddings.clusters import CLUSTERS, cluster_slides
from histoscale.embeddings.folder import files_of, read_folder
from histoscale.embeddings.labels import read_labels
from histoscale.embeddings.names import SlideNames, read_names, resolver
from histoscale.embeddings.progress import CountedSteps, Tell
from histoscale.embeddings.slide_probe import PROBES, ProbePlan, probe_slides
from histoscale.errors import ClusterError
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
        device: `auto`, `cpu` or `cuda`.
        say: Takes lines on how far it is.

    Raises:
        HistoscaleError: What the task says, or there is no GPU.
    """
    has_gpu = ray.cluster_resources().get("GPU", 0.0) >= 1.0  # type: ignore[no-untyped-call]
    if device == "cuda" and not has_gpu:
        raise ClusterError("the cluster has no GPU", value="--device cuda", remedy="give --device cpu")
    is_cuda = has_gpu and device != "cpu" and task.labels_uri is not None
    remote: Any = ray.remote(_lines).options(num_cpus=1, num_gpus=1 if is_cuda else 0, num_returns="streaming")
    found: list[str] = []
    try:
        for ref in remote.remote(task, "cuda" if is_cuda else "cpu"):
            is_finding, line = ray.get(ref)
            (found.append if is_finding else say)(line)
    except ray.exceptions.RayTaskError as error:
        raise diagnosis_in(error) or error from None
    return found


def _lines(task: SlideTask, device: str) -> Iterator[tuple[bool, str]]:
    """On the node: lines on how far it is, as they come, then those on what was found."""
    told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    torch.set_num_threads(1)
    steps = CountedSteps(told.put, time.monotonic)
    with ThreadPoolExecutor(1) as pool:
        finding = pool.submit(do_task, task, torch.device(device), steps.tell)
        finding.add_done_callback(lambda _: told.put(None))
        while (line := told.get()) is not None:
            yield False, line
    for line in finding.result():
        yield True, line


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
