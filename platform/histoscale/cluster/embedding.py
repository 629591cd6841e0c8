"""Embeds the slides of an index with a network: what is left to do, the workforce, the folder, and what to tell."""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray

from histoscale.cluster.embedding_pipeline import Embedded, EmbeddingPipeline, Workforce
from histoscale.embeddings.files import key_of
from histoscale.embeddings.folder import (
    MANIFEST,
    Folder,
    LeftOut,
    begin,
    files_of,
    require_name,
    unchanged,
    write_left_out,
)
from histoscale.embeddings.network import BF16, FP32, NetworkRef
from histoscale.embeddings.progress import EmbeddingProgress
from histoscale.embeddings.reading import Source
from histoscale.embeddings.selection import Selection
from histoscale.embeddings.spec import EmbeddingSpec
from histoscale.embeddings.tiling import Tiling
from histoscale.errors import ClusterError, EmbeddingError, SlideIndexError
from histoscale.slides.catalogue import Catalogue, open_catalogue
from histoscale.slides.exclusions import read_exclusions
from histoscale.storage import Store, join, open_store
from histoscale.stream.faults import allowed_bad_slides

DEFAULT_CACHE_BYTES = 50 * 10**9
_CPUS_OF_A_READER = 8  # of a cluster without GPUs: embedding takes far longer than reading
_LOGICAL_CPUS = 2  # of a core
_SHOWN = 5


@dataclass(frozen=True)
class EmbeddingPlan:
    """What is embedded, how, and to where.

    Attributes:
        index_uri: The index.
        out_uri: Below it lie the folders of tilings, and in these the folders of models.
        network: The weights.
        tiling: Which tiles.
        embedding: One of `spec.KINDS`.
        dtype: One of `spec.DTYPES`.
        selection: Which slides.
        name: Of the folder of the model; by default the network's.
        max_bad_slides: How many slides may be unreadable, and `max_bad_share` of all, whichever is less.
        max_bad_share: See above.
        cache_bytes: Disk of a node for copies of slides that cannot be read in place.
    """

    index_uri: str
    out_uri: str
    network: NetworkRef
    tiling: Tiling
    embedding: str
    dtype: str
    selection: Selection = field(default_factory=Selection)
    name: str | None = None
    max_bad_slides: int = 1000
    max_bad_share: float = 0.05
    cache_bytes: int = DEFAULT_CACHE_BYTES

    def __post_init__(self) -> None:
        if self.name is not None:
            require_name(self.name)

    @property
    def folder_uri(self) -> str:
        """Where the files go."""
        return join(self.out_uri, self.tiling.folder, f"features_{self.name or self.network.name}")


@dataclass(frozen=True)
class EmbeddingSummary:
    """What a job did.

    Attributes:
        progress: How far it came.
        refused_tiles: Tiles that could not be read, of slides that could.
        left_out: Slides without a file.
        withdrawn: Slides with a file that are withdrawn from the index by now.
        folder_uri: Where the files are.
    """

    progress: EmbeddingProgress
    refused_tiles: int
    left_out: tuple[LeftOut, ...]
    withdrawn: tuple[str, ...]
    folder_uri: str

    def lines(self) -> list[str]:
        """All of it for people."""
        progress = self.progress
        lines = [f"embedded: {progress.done} slides with {progress.tiles} tiles, and {progress.before} before"]
        if self.refused_tiles:
            lines.append(f"unreadable: {self.refused_tiles} tiles of these slides, left out of their files")
        if self.left_out:
            reasons = Counter(each.reason for each in self.left_out)
            counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
            lines.append(f"left out: {len(self.left_out)} slides, by id in left_out.jsonl: {counts}")
        if self.withdrawn:
            named = ", ".join(self.withdrawn[:_SHOWN]) + (" ..." if len(self.withdrawn) > _SHOWN else "")
            lines.append(
                f"warning: {len(self.withdrawn)} files are of withdrawn slides and are yours to remove: {named}"
            )
        return [*lines, f"embeddings: {self.folder_uri}"]


def workforce(device: str, readers: int | None, embedders: int | None) -> Workforce:
    """How many processes of the cluster work, where nobody says it: one embedder for each GPU, readers on the CPUs.

    Args:
        device: `auto`, `cuda` or `cpu`.
        readers: Wanted number.
        embedders: Wanted number.

    Raises:
        ClusterError: The cluster has no such device, or too little for so many.
    """
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return workforce_of(there.get("CPU", 0.0), there.get("GPU", 0.0), device, readers, embedders)


def workforce_of(cpus: float, gpus: float, device: str, readers: int | None, embedders: int | None) -> Workforce:
    """The same of a cluster with so many CPUs and GPUs."""
    for name, wanted in (("--readers", readers), ("--embedders", embedders)):
        if wanted is not None and wanted < 1:
            raise ClusterError(f"{name} leaves nobody to work", value=wanted, expected="1 or more")
    device = device if device != "auto" else "cuda" if gpus >= 1 else "cpu"
    if device == "cuda":
        embedders = embedders or max(1, int(gpus))
        readers = readers or max(1, int(cpus) - embedders)
    else:
        readers = readers or max(1, int(cpus) // _CPUS_OF_A_READER)
        embedders = embedders or max(1, (int(cpus) - readers) // _LOGICAL_CPUS)
    needs_gpus = embedders if device == "cuda" else 0
    if readers + embedders > cpus or needs_gpus > gpus:
        raise ClusterError(
            "the cluster is too small for these processes",
            value=f"{cpus:g} CPU and {gpus:g} GPU",
            expected=f"{readers + embedders} CPU and {needs_gpus} GPU for {readers} readers and {embedders} embedders",
            remedy="add nodes, or lower --readers and --embedders",
        )
    return Workforce(readers, embedders, device)


def embed_slides(plan: EmbeddingPlan, force: Workforce, tell: Callable[[EmbeddingProgress], None]) -> EmbeddingSummary:
    """Embed the slides that have no file yet. The cluster must be connected.

    Args:
        plan: What, how, and to where.
        force: How many processes.
        tell: Takes how far it is, after each slide and now and then.

    Raises:
        EmbeddingError: The folder holds other embeddings, no slide is wanted, or more are bad than is borne.
        HistoscaleError: The index, the weights or the storage cannot be read.
    """
    plan.network.require_tile(plan.tiling.tile_px)
    precision = BF16 if force.device == "cuda" else FP32
    network = plan.network
    spec = EmbeddingSpec(plan.tiling, network.fingerprint, network.arch, plan.embedding, plan.dtype, precision)
    catalogue = open_catalogue(plan.index_uri)
    withdrawn = {name for each in read_exclusions(open_store(plan.index_uri)) for name in each.slide_ids}
    rows = plan.selection.rows(catalogue, withdrawn)
    store = open_store(plan.folder_uri)
    folder, files = begin(store, spec, catalogue.snapshot_id)
    valid = _still_valid(catalogue, folder, files)
    left = [row for row in rows if catalogue.slide_id(row) not in valid]
    for name in {catalogue.slide_id(row) for row in left} & files:
        store.delete(key_of(name))  # of the slide as it was: should it be left out now, nothing may stay
    cache = Path(tempfile.gettempdir()) / f"histoscale-slides-{os.getuid()}"
    source = Source(plan.index_uri, catalogue.snapshot_id, spec, cache, plan.cache_bytes)
    work = _Work(plan, store, len(rows), len(rows) - len(left), tell)
    pipeline = EmbeddingPipeline(catalogue, source, network, plan.folder_uri, force)
    for outcome in pipeline.run(left) if left else ():
        work.take(outcome, pipeline.began_s)
    write_left_out(store, work.left_out)
    is_all = plan.selection == Selection()
    snapshots = folder.snapshots[-1:] if is_all else folder.snapshots
    slides = len(files_of(store))
    done = replace(folder, snapshots=snapshots, is_complete=True, slides=slides, left_out=len(work.left_out))
    store.put(MANIFEST, done.to_json())
    return EmbeddingSummary(
        work.progress, work.refused_tiles, tuple(work.left_out), tuple(sorted(files & withdrawn)), store.uri
    )


class _Work:
    """Counts outcomes, tells of them, and ends the job with too many bad slides."""

    def __init__(
        self, plan: EmbeddingPlan, store: Store, total: int, before: int, tell: Callable[[EmbeddingProgress], None]
    ) -> None:
        self._store = store
        self._tell = tell
        self._allowed = allowed_bad_slides(total, plan.max_bad_slides, plan.max_bad_share)
        self.progress = EmbeddingProgress(total, before, 0, 0, 0, 0.0)
        self.refused_tiles = 0
        self.left_out: list[LeftOut] = []
        tell(self.progress)

    def take(self, outcome: Embedded | LeftOut | None, began_s: float | None) -> None:
        """Count an outcome of work that began at a time, or has not yet.

        Raises:
            EmbeddingError: More slides are bad than is borne.
        """
        progress = self.progress
        if isinstance(outcome, Embedded):
            progress = replace(progress, done=progress.done + 1, tiles=progress.tiles + outcome.tiles)
            self.refused_tiles += outcome.refused
        elif outcome is not None:
            self.left_out.append(outcome)
            progress = replace(progress, left_out=progress.left_out + 1)
        self.progress = replace(progress, seconds=0.0 if began_s is None else time.monotonic() - began_s)
        if isinstance(outcome, LeftOut) and outcome.is_bad:
            self._require_few()
        self._tell(self.progress)

    def _require_few(self) -> None:
        bad = [each for each in self.left_out if each.is_bad]
        if len(bad) <= self._allowed:
            return
        write_left_out(self._store, self.left_out)
        named = "; ".join(f"{each.slide_id}: {each.reason}" for each in bad[:_SHOWN])
        raise EmbeddingError(
            f"{len(bad)} of {self.progress.total} slides cannot be embedded: {named}",
            expected=f"at most {self._allowed}, the lower of --max-bad-slides and a twentieth of the slides",
            remedy="repair and index them again, or leave them out with --slides or --where; the same command goes on",
        )


def _still_valid(catalogue: Catalogue, folder: Folder, files: set[str]) -> set[str]:
    """Slides whose files were made of what the index holds now."""
    before = []
    for snapshot_id in folder.snapshots[:-1]:
        try:
            before.append(open_catalogue(catalogue.index_uri, snapshot_id).rows)
        except SlideIndexError as error:
            raise EmbeddingError(
                "the embeddings were begun with another index",
                value=f"snapshot {catalogue.snapshot_id}",
                expected=f"the index that has snapshot {snapshot_id}, or a later one of it",
                remedy="give that index, or another --out or --name",
            ) from error
    return unchanged(files, catalogue.rows, before)
