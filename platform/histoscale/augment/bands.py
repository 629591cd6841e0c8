"""Banded linear maps along the rows and the columns of images, which is what resampling and blurring are.

A pixel of the result is a weighted sum of a few neighbouring pixels of the source, row weights times column weights.
Results that lie together need pixels that lie together, so each short run of them is one small dense product: all
images and runs are multiplied at once, at a fraction of a full matrix's cost and with the same numbers.

Shape suffixes: b results, p source images, c channels, S pixels along an axis of the result, n runs of T pixels
(S = n * T), K source pixels that a run may need.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LONGEST_RUN_PX = 16  # longer runs multiply more zeros, shorter ones are slower to multiply


@dataclass(frozen=True)
class Bands:
    """One axis of the map.

    Attributes:
        first: int64 [b, n]; the source pixel at which each run begins to read.
        weights: float32 [b, n, T, K]; each row sums to one.
        span_px: Source pixels from the first to the last that any result reads, at most.
    """

    first: NDArray[np.int64]
    weights: Tensor
    span_px: int


def make_bands(
    centres_bS: NDArray[np.float64],
    reach_b: NDArray[np.float64],
    kernel: Callable[[Tensor], Tensor],
    *,
    length_px: int,
    max_step: float,
    max_reach_px: float,
    device: torch.device,
) -> Bands:
    """Weights of source pixels by their distance; what lies beyond the image's edge has none.

    Args:
        centres_bS: Where the results lie in the source, in pixels from its edge, evenly spaced in either direction.
        reach_b: Distance from which on the kernel is zero, or may be taken for it.
        kernel: float32 distances [b, n, T, K] -> weights of any sum.
        length_px: Of the source.
        max_step: Upper bound of the distance of neighbouring results, over all batches: it sets the sizes, which
            must not depend on who else is in the batch.
        max_reach_px: Likewise of `reach_b`.
        device: Of the weights.
    """
    images, side_px = centres_bS.shape
    run_px = next(size for size in range(_LONGEST_RUN_PX, 0, -1) if side_px % size == 0)
    taps = min(length_px, math.ceil((run_px - 1) * max_step + 2 * max_reach_px + 1.5))
    span_px = min(length_px, taps + math.ceil((side_px - run_px) * max_step) + 1)
    runs_bnT = centres_bS.reshape(images, -1, run_px)
    first_bn = np.floor(runs_bnT.min(axis=2) - reach_b[:, None]).clip(0, length_px - taps).astype(np.int64)
    offsets = torch.from_numpy(runs_bnT - first_bn[:, :, None]).to(device, torch.float32)
    weights = kernel((torch.arange(taps, device=device) + 0.5 - offsets[..., None]).abs_())
    return Bands(first_bn, weights.div_(weights.sum(dim=-1, keepdim=True)), span_px)


def apply_bands(images: Tensor, source: NDArray[np.int64], rows: Bands, columns: Bands) -> Tensor:
    """Map an image for each result.

    Args:
        images: [p, c, H, W], of any dtype.
        source: [b]; which image each result is made of.
        rows: Of the axis of length H.
        columns: Of the axis of length W.

    Returns:
        float32 [b, c, S, S'].
    """
    device, channels = images.device, images.shape[1]
    results, row_runs, row_run_px, row_taps = rows.weights.shape
    _, column_runs, column_run_px, column_taps = columns.weights.shape
    left = columns.first.min(axis=1, keepdims=True).clip(max=images.shape[3] - columns.span_px)

    def index(values: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(values).to(device)

    windows = images.unfold(2, row_taps, 1).unfold(3, columns.span_px, 1)
    strips = windows[index(source[:, None]), :, index(rows.first), index(left)].to(torch.float32)
    lines = (rows.weights[:, :, None] @ strips).view(results, -1, columns.span_px)
    number = torch.arange(results, device=device)[:, None]
    pieces = lines.unfold(2, column_taps, 1)[number, :, index(columns.first - left)] @ columns.weights.mT
    pieces = pieces.view(results, column_runs, row_runs, channels, row_run_px, column_run_px)
    return pieces.permute(0, 3, 2, 4, 1, 5).reshape(results, channels, row_runs * row_run_px, -1)
