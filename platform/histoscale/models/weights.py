"""Initial weights: each parameter is drawn from a generator keyed by its own name."""

import torch
from torch import nn

from histoscale.models.vit import LayerScale
from histoscale.seeding import key

WEIGHT_STD = 0.02  # DINOv2's and timm's truncated normal
TOKEN_STD = 1e-6  # class and register tokens, DINOv2's and timm's


@torch.no_grad()
def initialise(net: nn.Module, seed: int) -> None:
    """Give every parameter of `net` its initial value, whatever it held; the default generator is left alone.

    Matrices, convolutions and position embeddings: truncated normal of 0.02. Class and register tokens: normal of
    1e-6. Mask token and biases: 0. Norms: 1. LayerScale: its own initial value.
    """
    for module_name, module in net.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            draws = torch.Generator().manual_seed(key(seed, "weights", f"{module_name}.{leaf}"))
            if isinstance(module, LayerScale):
                parameter.fill_(module.initial)
            elif isinstance(module, nn.LayerNorm) and leaf == "weight":
                parameter.fill_(1.0)
            elif leaf in ("bias", "mask_token"):
                parameter.zero_()
            elif leaf in ("cls_token", "reg_token"):
                parameter.normal_(std=TOKEN_STD, generator=draws)
            else:
                nn.init.trunc_normal_(parameter, std=WEIGHT_STD, generator=draws)
