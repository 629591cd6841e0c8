"""What decides the numbers of an embedding, and its fingerprint."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from histoscale.embeddings.tiling import Tiling
from histoscale.errors import EmbeddingError

KINDS = ("cls", "cls_mean")
"""The class token alone, or followed by the mean of the patch tokens, as Virchow2's model card has it."""
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class EmbeddingSpec:
    """How slides are embedded.

    Attributes:
        tiling: Which tiles.
        model: Fingerprint of the weights.
        arch: Shape of the network.
        embedding: One of `KINDS`.
        dtype: One of `DTYPES`: how the numbers are kept.
        precision: `bf16` or `fp32`: how the network computes.
    """

    tiling: Tiling
    model: str
    arch: str
    embedding: str
    dtype: str
    precision: str

    def __post_init__(self) -> None:
        for what, value, known in (("embedding", self.embedding, KINDS), ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise EmbeddingError(f"there is no such {what}", value=value, expected=" or ".join(known))

    def facts(self) -> dict[str, Any]:
        """All of it, by names for people."""
        return {
            "model": self.model,
            "arch": self.arch,
            "embedding": self.embedding,
            "dtype": self.dtype,
            "precision": self.precision,
            "mpp": self.tiling.mpp,
            "tile_px": self.tiling.tile_px,
            "stride_px": self.tiling.stride_px,
            "min_tissue": self.tiling.min_tissue,
        }

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ where any number could."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()[:16]
