"""Parameter groups: which parameters decay, how fast each learns, and which stand still at first.

The rules are DINOv2's: no decay for biases, norms and LayerScale; a rate that falls from block to block towards the
input; a factor of its own for the patch embedding; prototypes that are frozen at the start.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from histoscale.config.recipe import OptimSection

_NO_DECAY_MAX_NDIM = 1
_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
_INPUTS = ("mask_token", "backbone.cls_token", "backbone.reg_token", "backbone.pos_embed", "backbone.patch_embed.")


@dataclass(frozen=True, order=True)
class _Kind:
    lr_factor: float
    decays: bool
    last_layer: bool


def parameter_groups(network: nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Groups for AdamW, each with `lr_factor`, `decays` and `last_layer` beside its parameters.

    A parameter of block i of L learns at `layer_decay` ** (L - i) of the rate, what lies below the blocks at
    ** (L + 1), all else at the whole rate.
    """
    named = dict(network.named_parameters())
    depth = 1 + max((int(match[1]) for match in map(_BLOCK.match, named) if match), default=-1)
    kinds: dict[_Kind, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        factor = optim.layer_decay ** (depth + 1 - _layer(name, depth))
        if name.startswith("backbone.patch_embed."):
            factor *= optim.patch_embed_lr
        kind = _Kind(factor, parameter.ndim > _NO_DECAY_MAX_NDIM, ".prototypes." in name)
        kinds.setdefault(kind, []).append(parameter)
    return [{"params": kinds[kind], **vars(kind)} for kind in sorted(kinds)]


def _layer(name: str, depth: int) -> int:
    """0 below the blocks, i + 1 for block i, depth + 1 above them."""
    if name.startswith(_INPUTS):
        return 0
    block = _BLOCK.match(name)
    return int(block[1]) + 1 if block else depth + 1
