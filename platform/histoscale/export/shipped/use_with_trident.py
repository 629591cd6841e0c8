"""The model of this folder as a patch encoder of TRIDENT (github.com/mahmoodlab/TRIDENT).

    from use_with_trident import encoder
    processor.run_patch_feature_extraction_job(coords_dir=..., patch_encoder=encoder(), device="cuda:0", saveas="h5")

Embeddings are class token ++ mean of the patch tokens. Patches must lie at a scale that the model was trained at:
README.md names them.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from trident.patch_encoder_models import CustomInferenceEncoder

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))
from vit import Vit, preprocess  # noqa: E402 - lies beside this file, wherever that is


class Embedding(nn.Module):
    """The model with its embedding as output."""

    def __init__(self, model: Vit) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings [B, 2 D]."""
        embeddings: Tensor = self.model.embed(images)
        return embeddings


class Transform:
    """From a Pillow image to the model's input; can be pickled for TRIDENT's loaders."""

    def __init__(self, model: Vit) -> None:
        self.image_px = model.image_px

    def __call__(self, image: object) -> Tensor:
        """[3, S, S]."""
        prepared: Tensor = preprocess(self, image)
        return prepared


def encoder(name: str = "histoscale", precision: torch.dtype = torch.float32) -> nn.Module:
    """The encoder; `name` becomes part of the names of TRIDENT's output folders."""
    model = Vit(FOLDER)
    made: nn.Module = CustomInferenceEncoder(
        enc_name=name, model=Embedding(model), transforms=Transform(model), precision=precision
    )
    return made
