"""The tiles of labelled slides in memory: all of a slide's for its mean, a drawn part of them to learn from."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoscale.embeddings.abmil import Bag
from histoscale.embeddings.files import read_embedding
from histoscale.embeddings.progress import Tell
from histoscale.errors import EmbeddingError
from histoscale.seeding import key, uniforms
from histoscale.storage import Store

_READS_AT_ONCE = 4


@dataclass(frozen=True)
class Bags:
    """Slides in the order in which they were asked for.

    Attributes:
        bags: Tiles of each that are learnt from, [n, D].
        means: float32 [N, D], mean over all tiles of each.
        tiles: int64 [N], how many tiles each has.
    """

    bags: tuple[Bag, ...]
    means: NDArray[np.float32]
    tiles: NDArray[np.int64]


def drawn_rows(slide_id: str, tiles: int, most: int) -> NDArray[np.int64]:
    """Ascending numbers of at most so many of a slide's tiles: the same ones each time, whatever the other slides."""
    if tiles <= most:
        return np.arange(tiles, dtype=np.int64)
    draws = uniforms(key(0, "tiles of a slide", slide_id), np.arange(tiles, dtype=np.int64), 1)[:, 0]
    return np.sort(np.argsort(draws, kind="stable")[:most]).astype(np.int64)


def load_bags(store: Store, slide_ids: Sequence[str], most: int, tell: Tell) -> Bags:
    """Read slides.

    Args:
        store: The folder of the embeddings.
        slide_ids: The slides.
        most: Tiles of a slide that are kept.
        tell: Takes how far it is.

    Raises:
        EmbeddingError: A file is damaged, or of another width than the first.
        StorageError: One cannot be read.
    """

    def read(slide_id: str) -> tuple[Bag, NDArray[np.float32], int]:
        features = read_embedding(store, slide_id).features
        mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        return features[drawn_rows(slide_id, len(features), most)], mean, len(features)

    found: list[tuple[Bag, NDArray[np.float32], int]] = []
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for number, one in enumerate(pool.map(read, slide_ids), 1):
            if found and one[0].shape[1] != found[0][0].shape[1]:
                raise EmbeddingError(
                    f"the embeddings of slide {slide_ids[number - 1]} are of another width than those before",
                    value=one[0].shape[1],
                    expected=str(found[0][0].shape[1]),
                    remedy="remove this file and run jobs/embed.py again",
                )
            found.append(one)
            tell("slides read", number, len(slide_ids))
    bags, means, tiles = zip(*found, strict=True)
    return Bags(tuple(bags), np.stack(means), np.array(tiles, np.int64))
