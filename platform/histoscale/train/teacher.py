"""The average of the student's weights, sharded in fp32; as a teacher, also replicated in the forward pass's precision.

Each rank averages only the fragments whose fp32 master weights it owns, so the average costs no communication and is
the same at every world size and ZeRO stage. One all-reduce then spreads it: fragments partition the parameters, all
else is zero, and a sum with zeros is exact.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from histoscale.checkpoint.fragments import EMA, MASTER, Fragment

# Parameters start at multiples of this in the flat buffer: kernels want 16-byte alignment.
_ALIGN_ELEMENTS = 64


class Average:
    """An exponential moving average of the student's fp32 master weights: what a run commits.

    Args:
        masters: This rank's fragments of the student; the average starts equal to them.

    Attributes:
        masters: Name -> this rank's share of the student.
        fragments: Name -> this rank's share of the average, under the kind `EMA`.
    """

    def __init__(self, masters: dict[str, Fragment]) -> None:
        self.masters = masters
        self.fragments = {
            name: Fragment(part.offset, part.numel, part.shape, {EMA: part.tensors[MASTER].clone()})
            for name, part in masters.items()
        }

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the average towards the student: `ema = momentum * ema + (1 - momentum) * student`."""
        for name, part in self.fragments.items():
            part.tensors[EMA].lerp_(self.masters[name].tensors[MASTER], 1.0 - momentum)
        self.publish()

    def publish(self) -> None:
        """Tell whoever computes with the average that it has changed (collective); here nobody does."""


class EMATeacher(Average):
    """The average as a network that looks at images.

    Args:
        network: A network of the student's class; its parameters become views of one flat buffer.
        masters: This rank's fragments of the student; the average starts equal to them.
        device: Where the teacher runs.
        dtype: What it computes in.

    Attributes:
        network: The teacher, ready to run.
    """

    def __init__(
        self, network: nn.Module, masters: dict[str, Fragment], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(masters)
        self.network = network.to(device, dtype).requires_grad_(False).eval()
        self._starts, numel = _layout(self.network)
        self._flat = torch.zeros(numel, device=device, dtype=dtype)
        for name, parameter in self.network.named_parameters():
            parameter.data = self._flat.narrow(0, self._starts[name], parameter.numel()).view(parameter.shape)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Give every rank the whole average (collective)."""
        self._flat.zero_()
        for name, part in self.fragments.items():
            self._flat.narrow(0, self._starts[name] + part.offset, part.numel).copy_(part.tensors[EMA])
        dist.all_reduce(self._flat)

    @torch.no_grad()
    def __call__(self, global_crops: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The teacher's outputs for whole, unmasked global crops; `mask` says which patches to project."""
        outputs: dict[str, Tensor] = self.network(global_crops, None, mask, hide_masked=False)
        return outputs


def _layout(network: nn.Module) -> tuple[dict[str, int], int]:
    """Where each parameter starts in the flat buffer, and the length of that."""
    starts, position = {}, 0
    for name, parameter in network.named_parameters():
        starts[name] = position
        position += math.ceil(parameter.numel() / _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
    return starts, position
