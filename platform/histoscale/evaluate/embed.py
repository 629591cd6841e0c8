"""The embedding of a tile: class token, followed by the mean of the patch tokens (as Virchow2's model card has it).

One forward pass gives both; either of them alone is a part of the embedding.

Shape suffixes: B tiles, T tokens, D width of the backbone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from histoscale.augment.colour import normalise
from histoscale.evaluate.datasets import Tile
from histoscale.evaluate.features import FloatArray
from histoscale.models import VisionTransformer

CLS = "cls"
PATCH_MEAN = "patch_mean"
BOTH = "both"
EMBEDDINGS = (CLS, PATCH_MEAN, BOTH)


def of_kind(embeddings: FloatArray, kind: str) -> FloatArray:
    """The class tokens, the means of the patch tokens, or both: float32 [B, D] or [B, 2D].

    Args:
        embeddings: Both, float32 [B, 2D], as an `Embedder` gives them.
        kind: One of `EMBEDDINGS`.
    """
    width = embeddings.shape[1] // 2
    return {CLS: embeddings[:, :width], PATCH_MEAN: embeddings[:, width:], BOTH: embeddings}[kind]


class Embedder:
    """Turns tiles into embeddings, at the scale that they come in, resized to the side the model was trained at.

    Args:
        backbone: In evaluation mode; moved to `device`.
        image_px: Side of the images that the backbone sees.
        device: Where it runs.
    """

    def __init__(self, backbone: VisionTransformer, image_px: int, device: torch.device) -> None:
        self._backbone = backbone.to(device)
        self._image_px = image_px
        self._device = device

    @torch.inference_mode()
    def __call__(self, tiles: Sequence[Tile]) -> FloatArray:
        """Embeddings float32 [B, 2D]."""
        pixels = np.stack([_resize(tile, self._image_px) for tile in tiles])
        embeddings: FloatArray = embed_pixels(self._backbone, torch.from_numpy(pixels).to(self._device)).cpu().numpy()
        return embeddings


def embed_pixels(backbone: VisionTransformer, pixels_BHW3: Tensor) -> Tensor:
    """Both kinds of embedding of tiles as they are: class token and mean of the patch tokens, [B, 2D].

    Args:
        backbone: In evaluation mode.
        pixels_BHW3: uint8, RGB, on the backbone's device; sides are multiples of its patch.
    """
    images_B3HW = pixels_BHW3.permute(0, 3, 1, 2).float() / 255.0
    tokens_BTD = backbone(normalise(images_B3HW))
    return torch.cat([tokens_BTD[:, 0], tokens_BTD[:, backbone.prefix_tokens :].mean(dim=1)], dim=1)


def _resize(tile: Tile, side_px: int) -> Tile:
    """A square of `side_px`; what a tile that is not square has too much is cut off evenly at both ends."""
    # Pillow's resize filters over the whole footprint of an output pixel: no aliasing when it shrinks.
    return np.asarray(ImageOps.fit(Image.fromarray(tile), (side_px, side_px), Image.Resampling.BICUBIC))
