"""Initial weights: each parameter is drawn from a generator keyed by its own name."""

import torch
from torch import nn

from histoscale.models.vit import LayerScale
from histoscale.seeding import key

EMBEDDING_STD = 0.02  # DINOv2's and timm's truncated normal
TOKEN_STD = 1e-6  # class and register tokens, DINOv2's and timm's


@torch.no_grad()
def initialise(net: nn.Module, seed: int, matrix_std: float | None = 0.02) -> None:
    """Give every parameter of `net` its initial value, whatever it held; the default generator is left alone.

    Matrices and convolutions: truncated normal of `matrix_std`, or of one over the square root of their fan-in where
    that is None. Position embeddings and prototypes: truncated normal of 0.02. Class and register tokens: normal of
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
            elif isinstance(module, nn.Linear | nn.Conv2d):
                std = parameter[0].numel() ** -0.5 if matrix_std is None else matrix_std
                nn.init.trunc_normal_(parameter, std=std, generator=draws)
            else:
                nn.init.trunc_normal_(parameter, std=EMBEDDING_STD, generator=draws)
