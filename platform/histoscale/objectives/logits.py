"""Logits of a chunk of rows, in memory that is used again for the next chunk.

Shape suffixes: m rows of a chunk, K prototypes, E bottleneck.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # 64 MiB in fp32


class Workspace:
    """Room for the logits of one chunk. On a CPU, touching fresh memory costs as much as the products in it.

    Attributes:
        logits_mK: In fp32 or finer, of the largest chunk.
    """

    def __init__(self, rows: int, prototypes_KE: Tensor) -> None:
        dtype = torch.promote_types(prototypes_KE.dtype, torch.float32)
        self.logits_mK = prototypes_KE.new_empty(rows, len(prototypes_KE), dtype=dtype)
        narrow = prototypes_KE.dtype != dtype
        self._products_mK = torch.empty_like(self.logits_mK, dtype=prototypes_KE.dtype) if narrow else self.logits_mK

    def logits(self, features_mE: Tensor, prototypes_KE: Tensor, temperature: float) -> Tensor:
        """Cosines over the temperature, [m, K]: products in the features' dtype, then fp32 or finer.

        They are the caller's to overwrite, until the next call.
        """
        products_mK = self._products_mK[: len(features_mE)]
        products_mK.addmm_(features_mE, prototypes_KE.T, beta=0, alpha=1 / temperature)
        narrow = self._products_mK is not self.logits_mK
        return self.logits_mK[: len(products_mK)].copy_(products_mK) if narrow else products_mK

    def narrowed(self, values_mK: Tensor) -> Tensor:
        """Values that lie where `logits` put its result, in the prototypes' dtype."""
        narrow = self._products_mK is not self.logits_mK
        return self._products_mK[: len(values_mK)].copy_(values_mK) if narrow else values_mK


def chunks(rows: int, elements_per_row: int, chunk_elements: int) -> list[slice]:
    """Consecutive slices of rows, each of at most `chunk_elements` elements, or of one row where that has more."""
    size = max(1, chunk_elements // elements_per_row)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
