"""Precision of the objectives."""

import torch
from torch import Tensor


def fp32_or_finer(x: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 where it is fp64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
