"""The model of this folder as a backbone of eva (kaiko-ai/eva); importing this file registers it.

`embedding` is what a configuration of eva names: see eva.yaml. The registered name is `histoscale/export`, for
`eva.vision.models.ModelFromRegistry`.
"""

import sys
from pathlib import Path

from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))
from vit import Vit  # noqa: E402 - lies beside this file, wherever that is


class Embedding(nn.Module):
    """The model with the class token, or class token ++ mean of the patch tokens, as output."""

    def __init__(self, model: Vit, with_patch_mean: bool) -> None:
        super().__init__()
        self.model = model
        self.with_patch_mean = with_patch_mean

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, D], or [B, 2 D] with the mean."""
        embeddings: Tensor = self.model.embed(images)
        return embeddings if self.with_patch_mean else embeddings[:, : self.model.width]


def embedding(with_patch_mean: bool = True, out_indices: object = None) -> nn.Module:
    """The backbone.

    Raises:
        ValueError: Feature maps are asked for, which this file does not give.
    """
    if out_indices is not None:
        raise ValueError(f"feature maps of blocks are not given, got out_indices={out_indices!r}: leave it out")
    return Embedding(Vit(FOLDER), with_patch_mean)


def register(name: str = "histoscale/export") -> None:
    """Make the backbone known to eva by a name, where eva is installed."""
    from eva.vision.models.networks.backbones.registry import backbone_registry

    backbone_registry.register(name)(embedding)
