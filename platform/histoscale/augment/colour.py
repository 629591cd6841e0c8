"""Colour, blur and solarisation of batched crops, each image with its own draws.

Formulas and ranges are torchvision's `ColorJitter`, `RandomGrayscale` and `RandomSolarize` as DINOv2 uses them; the
four parts of the jitter come in one fixed order instead of a random one. Images are float32 [b, 3, S, S] in [0, 1].
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histoscale.config.recipe import AugmentSection

COLOUR_DRAWS = 9  # jitter, brightness, contrast, saturation, hue, grayscale, blur, its sigma, solarise

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision has it
_BLUR_SIGMA_PX = (0.1, 2.0)  # DINOv2
_SOLARIZE_FROM = 128.0 / 255.0  # DINOv2


@dataclass(frozen=True)
class Colour:
    """How each image of a batch is changed; every field is float32 [b, 1, 1, 1].

    Attributes:
        brightness: Factor, 1 for no change; likewise `contrast` and `saturation`.
        hue: Turn of the hue circle, in [-0.5, 0.5].
        gray: 1 to drop the colour, else 0.
        blur_sigma_px: Standard deviation of the blur, 0 for none; None when no image of any batch is blurred.
        solarize: 1 to invert bright values, else 0.
    """

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    gray: Tensor
    blur_sigma_px: Tensor | None
    solarize: Tensor


def draw_colour(
    draws: NDArray[np.float64], strengths: AugmentSection, blur_p: float, solarize_p: float, device: torch.device
) -> Colour:
    """Turn uniform draws [b, COLOUR_DRAWS] into the changes of one crop of each tile."""
    jitter, brightness, contrast, saturation, hue, gray, blur, sigma, solarize = draws.T
    jittered = jitter < strengths.jitter_p

    def factor(draw: NDArray[np.float64], strength: float) -> Tensor:
        low = max(0.0, 1.0 - strength)
        return on_device(np.where(jittered, low + draw * (1.0 + strength - low), 1.0))

    def on_device(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).to(device, torch.float32).view(-1, 1, 1, 1)

    low_px, high_px = _BLUR_SIGMA_PX
    sigma_px = on_device(np.where(blur < blur_p, low_px + sigma * (high_px - low_px), 0.0))
    return Colour(
        brightness=factor(brightness, strengths.brightness),
        contrast=factor(contrast, strengths.contrast),
        saturation=factor(saturation, strengths.saturation),
        hue=on_device(np.where(jittered, strengths.hue * (2.0 * hue - 1.0), 0.0)),
        gray=on_device((gray < strengths.grayscale_p).astype(np.float64)),
        blur_sigma_px=sigma_px if blur_p > 0.0 else None,
        solarize=on_device((solarize < solarize_p).astype(np.float64)),
    )


def apply_colour(images: Tensor, colour: Colour) -> Tensor:
    """Jitter (brightness, contrast, saturation, hue), grayscale, blur, solarise: DINOv2's order."""
    images = (images * colour.brightness).clamp_(0.0, 1.0)
    images = _blend(images, _luma(images).mean(dim=(2, 3), keepdim=True), colour.contrast)
    images = _blend(images, _luma(images), colour.saturation)
    images = _turn_hue(images, colour.hue)
    images = torch.where(colour.gray > 0, _luma(images), images)
    if colour.blur_sigma_px is not None:
        images = _blur(images, colour.blur_sigma_px)
    return torch.where((colour.solarize > 0) & (images >= _SOLARIZE_FROM), 1.0 - images, images)


def normalise(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation: [b, 3, S, S] in [0, 1] -> about [-2.1, 2.7]."""
    mean = images.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = images.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return (images - mean) / std


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.chunk(3, dim=1)
    luma: Tensor = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
    return luma


def _blend(images: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(images), images, share.expand_as(images)).clamp_(0.0, 1.0)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of HSV and keep its value and saturation."""
    red, green, blue = images.chunk(3, dim=1)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2.0, (red - green) / divisor + 4.0),
    )
    # Each channel is the value less a share of the chroma that depends on its distance along the hue circle.
    offset = images.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    along = (offset + sextant + 6.0 * turn) % 6.0
    return value - chroma * torch.minimum(along, 4.0 - along).clamp_(0.0, 1.0)


def _blur(images: Tensor, sigma_px: Tensor) -> Tensor:
    """Gaussian blur as two products with a banded matrix per image; at the border the kernel is renormalised."""
    position = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
    distance_SS = position[:, None] - position[None, :]
    kernel_b1SS = torch.exp(-0.5 * (distance_SS / sigma_px.clamp(min=_BLUR_SIGMA_PX[0])) ** 2)
    kernel_b1SS = kernel_b1SS / kernel_b1SS.sum(dim=-1, keepdim=True)
    blurred = kernel_b1SS @ images @ kernel_b1SS.transpose(-2, -1)
    return torch.where(sigma_px > 0, blurred, images)
