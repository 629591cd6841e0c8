"""The processes that embed slides: readers on CPUs, embedders on GPUs or CPUs. Pixels go from one to the other.

What they need is opened in `ready` and not in `__init__`: there, an error would reach the driver as the death of an
actor, without its type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from histoscale.embeddings.files import SlideTiles, write_embedding
from histoscale.embeddings.network import NetworkRef, TileEmbedder
from histoscale.embeddings.reading import Batch, Source, TileReader
from histoscale.embeddings.tiling import Coords
from histoscale.storage import open_store


@dataclass(frozen=True)
class Done:
    """What became of a batch, without its pixels and numbers; fields as of `Batch`."""

    kept: NDArray[np.int64]
    refused: Mapping[str, int]
    whole_slide: str | None


class ReaderActor:
    """Reads batches of tiles, and writes the files of slides.

    Args:
        source: What is read.
        out_uri: The folder of the embeddings.
    """

    def __init__(self, source: Source, out_uri: str) -> None:
        self._source = source
        self._reader = TileReader(source)
        self._out = open_store(out_uri)

    def ready(self) -> None:
        """Open the index."""
        self._reader.prepare()

    def read(self, row: int, coords: Coords) -> Batch:
        """See `TileReader.read`."""
        return self._reader.read(row, coords)

    def write(self, tiles: SlideTiles, refused: int, order: NDArray[np.int64], *features: NDArray[Any]) -> int:
        """Write a slide's file; gives how many tiles it holds.

        Args:
            tiles: The tiles that were embedded, row by row.
            refused: How many more could not be read.
            order: int64 [n], where each row of the features belongs.
            features: Of all batches, one after the other.
        """
        read = np.concatenate(features)
        rows = np.empty_like(read)
        rows[order] = read
        write_embedding(self._out, self._source.spec, self._source.snapshot_id, tiles, rows, refused)
        return len(rows)


class EmbedderActor:
    """Embeds batches.

    Args:
        network: The weights.
        source: What is read; says how it is embedded.
        device: `cuda` or `cpu`.
    """

    def __init__(self, network: NetworkRef, source: Source, device: str) -> None:
        self._network = network
        self._spec = source.spec
        self._device = torch.device(device)

    @cached_property
    def _embed(self) -> TileEmbedder:
        if self._device.type == "cpu":
            torch.set_num_threads(1)  # as many of these processes as there are cores, rather than threads in one
        spec = self._spec
        return TileEmbedder(self._network.load(), self._device, spec.embedding, spec.precision, spec.dtype)

    def ready(self) -> None:
        """Load the weights."""
        _ = self._embed

    def embed(self, batch: Batch) -> tuple[NDArray[Any], Done]:
        """The embeddings of a batch, and what became of it."""
        return self._embed(batch.tiles), Done(batch.kept, batch.refused, batch.whole_slide)
