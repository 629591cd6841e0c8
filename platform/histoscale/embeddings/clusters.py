"""Groups of tiles that look alike to the network, and which of them each slide is mostly made of.

A run that balances its strata over such clusters sees rare kinds of tissue as often as common ones.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from histoscale.embeddings.bags import drawn_rows
from histoscale.embeddings.files import count_tiles, read_embedding
from histoscale.embeddings.folder import files_of, read_folder
from histoscale.embeddings.progress import Tell
from histoscale.errors import EmbeddingError
from histoscale.storage import Store

CLUSTERS = "clusters"
_BATCH_TILES = 4096
_STARTS = 5
_MAX_CLUSTERS = 1000


@dataclass(frozen=True)
class Clusters:
    """What was found.

    Attributes:
        slide_ids: The slides, sorted.
        counts: int64 [N, K], tiles of each slide in each cluster.
        sampled: Tiles that the clusters were made of.
    """

    slide_ids: tuple[str, ...]
    counts: NDArray[np.int64]
    sampled: int

    def names(self) -> list[str]:
        """Name of the cluster that most tiles of each slide are in, the first of equals."""
        digits = len(str(self.counts.shape[1] - 1))
        return [f"c{int(each.argmax()):0{digits}d}" for each in self.counts]

    def to_csv(self) -> bytes:
        """Columns `slide` (its id) and `cluster`, as jobs/index.py --strata takes them."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["slide", "cluster"])
        writer.writerows(zip(self.slide_ids, self.names(), strict=True))
        return text.getvalue().encode()


def cluster_slides(store: Store, count: int, sample: int, seed: int, tell: Tell) -> Clusters:
    """Cluster the tiles of a folder of embeddings, by direction, and write which cluster each slide is mostly in.

    Writes `clusters/K/clusters.csv` and `report.json`, with the tiles of each slide in each cluster.

    Args:
        store: The folder.
        count: K.
        sample: Tiles that the clusters are made of; as many of each slide.
        seed: Of the start.
        tell: Takes how far it is.

    Raises:
        EmbeddingError: Too few tiles or slides for so many clusters, or a damaged file.
        StorageError: The folder cannot be read or written.
    """
    folder, names = read_folder(store), tuple(sorted(files_of(store)))
    if not 2 <= count <= _MAX_CLUSTERS:
        raise EmbeddingError("no such number of clusters", value=count, expected=f"2 to {_MAX_CLUSTERS}")
    if len(names) < 2:
        raise EmbeddingError("too few slides to tell apart", value=len(names), expected="two slides with embeddings")
    rows = _sample(store, names, max(1, sample // len(names)), tell)
    if len(rows) < count:
        raise EmbeddingError(
            "too few tiles for so many clusters",
            value=f"{len(rows)} tiles",
            expected=f"{count} or more",
            remedy="raise --sample, or lower --clusters",
        )
    means = MiniBatchKMeans(count, batch_size=_BATCH_TILES, n_init=_STARTS, random_state=seed).fit(rows)
    counts = []
    for number, name in enumerate(names, 1):
        told = means.predict(_directions(read_embedding(store, name).features))
        counts.append(np.bincount(told, minlength=count))
        tell("slides clustered", number, len(names))
    found = Clusters(names, np.stack(counts).astype(np.int64), len(rows))
    report = {
        "format": 1,
        "embeddings": folder.fingerprint,
        "clusters": count,
        "sampled_tiles": len(rows),
        "seed": seed,
        "slides_by_cluster": _counted(found.names()),
        "tiles": {name: each.tolist() for name, each in zip(names, found.counts, strict=True)},
    }
    store.put(f"{CLUSTERS}/{count}/clusters.csv", found.to_csv())
    store.put(f"{CLUSTERS}/{count}/report.json", json.dumps(report, indent=1).encode())
    return found


def _sample(store: Store, names: Sequence[str], of_each: int, tell: Tell) -> NDArray[np.float32]:
    parts = []
    for number, name in enumerate(names, 1):
        rows = drawn_rows(name, count_tiles(store, name), of_each)
        parts.append(_directions(read_embedding(store, name, rows).features))
        tell("slides sampled", number, len(names))
    return np.concatenate(parts)


def _directions(features: NDArray[Any]) -> NDArray[np.float32]:
    """Embeddings of length one: kNN and DINO compare by direction, too."""
    rows = features.astype(np.float32)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    directions: NDArray[np.float32] = rows / np.maximum(lengths, 1e-12)
    return directions


def _counted(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}
