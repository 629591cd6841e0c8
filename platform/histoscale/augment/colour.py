"""Colour, blur and solarisation of batched crops, each image with its own draws.

Formulas and ranges are torchvision's `ColorJitter`, `RandomGrayscale` and `RandomSolarize` as DINOv2 uses them; the
four parts of the jitter come in one fixed order instead of a random one. Images are float32 [b, 3, S, S] in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histoscale.augment.bands import apply_bands, make_bands
from histoscale.augment.stain import restain
from histoscale.config.recipe import AugmentSection

COLOUR_DRAWS = 9  # jitter, brightness, contrast, saturation, hue, grayscale, blur, its sigma, solarise

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision has it
_BLUR_SIGMA_PX = (0.1, 2.0)  # DINOv2
_BLUR_REACH = 4.0  # standard deviations, beyond which 0.006 % of the kernel lies
_SOLARIZE_FROM = 128.0 / 255.0  # DINOv2
_TINY = 1e-20  # in place of a chroma of zero, whose hue is none


@dataclass(frozen=True)
class Colour:
    """How each of b images is changed.

    Attributes:
        stains: float64 [b, 3, 4], maps of `draw_stains`; None where the recipe leaves stains alone.
        jittered: bool [b]; whether the next four apply.
        brightness: float64 [b], a factor, 1 for no change; likewise `contrast` and `saturation`.
        hue: float64 [b], turn of the hue circle, in [-0.5, 0.5].
        gray: bool [b]; whether the colour is dropped.
        blur_sigma_px: float64 [b], standard deviation of the blur, 0 for none.
        solarize: bool [b]; whether bright values are inverted.
    """

    stains: NDArray[np.float64] | None
    jittered: NDArray[np.bool_]
    brightness: NDArray[np.float64]
    contrast: NDArray[np.float64]
    saturation: NDArray[np.float64]
    hue: NDArray[np.float64]
    gray: NDArray[np.bool_]
    blur_sigma_px: NDArray[np.float64]
    solarize: NDArray[np.bool_]

    def part(self, rows: slice) -> Self:
        """Those of some images."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        some: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
        return type(self)(**some)


def draw_colour(
    draws: NDArray[np.float64],
    strengths: AugmentSection,
    blur_p: NDArray[np.float64],
    solarize_p: NDArray[np.float64],
    stains: NDArray[np.float64] | None = None,
) -> Colour:
    """Turn uniform draws [b, COLOUR_DRAWS] into changes; blur and solarisation have a probability for each image, [b].

    Args:
        draws: Uniform in [0, 1).
        strengths: The recipe's.
        blur_p: Probability of a blur, whose sigma is uniform from 0.1 to 2 px.
        solarize_p: Probability of solarisation.
        stains: Handed on.
    """
    jitter, brightness, contrast, saturation, hue, gray, blur, sigma, solarize = draws.T

    def factor(draw: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
        low = max(0.0, 1.0 - strength)
        return low + draw * (1.0 + strength - low)

    low_px, high_px = _BLUR_SIGMA_PX
    return Colour(
        stains=stains,
        jittered=jitter < strengths.jitter_p,
        brightness=factor(brightness, strengths.brightness),
        contrast=factor(contrast, strengths.contrast),
        saturation=factor(saturation, strengths.saturation),
        hue=strengths.hue * (2.0 * hue - 1.0),
        gray=gray < strengths.grayscale_p,
        blur_sigma_px=np.where(blur < blur_p, low_px + sigma * (high_px - low_px), 0.0),
        solarize=solarize < solarize_p,
    )


def apply_colour(images: Tensor, colour: Colour) -> Tensor:
    """Stains, jitter (brightness, contrast, saturation, hue), grayscale, blur, solarise: DINOv2's order.

    Each image goes only through what it was drawn for. `images` is overwritten.
    """
    if (stains := colour.stains) is not None:
        restained = (stains != 0.0).any(axis=(1, 2))
        images = _on_rows(images, np.asarray(restained), lambda some, rows: restain(some, stains[rows]))
    images = _on_rows(images, colour.jittered, lambda some, rows: _jitter(some, colour, rows))
    images = _on_rows(images, colour.gray, lambda some, _: _luma(some).expand_as(some))
    images = _on_rows(images, colour.blur_sigma_px > 0.0, lambda some, rows: _blur(some, colour.blur_sigma_px[rows]))
    return _on_rows(images, colour.solarize, lambda some, _: torch.where(some >= _SOLARIZE_FROM, 1.0 - some, some))


def normalise(images: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation: [b, 3, S, S] in [0, 1] -> about [-2.1, 2.7]."""
    mean = images.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = images.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return (images - mean).div_(std)


def _on_rows(
    images: Tensor, chosen: NDArray[np.bool_], change: Callable[[Tensor, NDArray[np.int64]], Tensor]
) -> Tensor:
    """Change the chosen images only; may overwrite `images`."""
    rows = np.flatnonzero(chosen)
    if len(rows) == len(images):
        return change(images, rows)
    if len(rows):
        index = torch.from_numpy(rows).to(images.device)
        images[index] = change(images[index], rows)
    return images


def _jitter(images: Tensor, colour: Colour, rows: NDArray[np.int64]) -> Tensor:
    def of_rows(values: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values[rows]).to(images.device, torch.float32).view(-1, 1, 1, 1)

    images.mul_(of_rows(colour.brightness)).clamp_(max=1.0)
    _blend_(images, _luma(images.mean(dim=(2, 3), keepdim=True)), of_rows(colour.contrast))
    _blend_(images, _luma(images), of_rows(colour.saturation))
    return _turn_hue_(images, of_rows(colour.hue)) if colour.hue[rows].any() else images


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.chunk(3, dim=1)
    return (_LUMA[0] * red).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _blend_(images: Tensor, other: Tensor, share: Tensor) -> None:
    images.mul_(share).add_(other.mul_(1.0 - share)).clamp_(0.0, 1.0)


def _turn_hue_(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of HSV and keep its value and saturation.

    With the hue in sixths of its circle, a channel has the largest value where the hue lies within 1 of its own (red
    0, green 2, blue 4), the smallest from 2 on, and a straight line between. Both hues are counted from their
    circles' middles, so that their sum lies within one turn of zero and its distance on the circle needs no modulo.
    """
    red, green, blue = images.chunk(3, dim=1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest - smallest
    of_red = (green - blue).sub_(chroma, alpha=2.0)
    of_blue = (red - green).add_(chroma, alpha=2.0)
    hue = torch.where(largest == green, blue - red, torch.where(largest == red, of_red, of_blue))
    hue.div_(chroma.clamp(min=_TINY))
    channels = images.new_tensor([2.0, 0.0, -2.0]).view(1, 3, 1, 1)
    turned = torch.remainder(channels + 6.0 * turn + 3.0, 6.0).sub_(3.0)
    torch.add(hue, turned, out=images)
    images.abs_().sub_(3.0).abs_().sub_(1.0).clamp_(0.0, 1.0)
    return images.mul_(chroma).add_(smallest)


def _blur(images: Tensor, sigma_px: NDArray[np.float64]) -> Tensor:
    """Gaussian blur; at the border the kernel is renormalised."""
    count, _, _, side_px = images.shape
    sigmas = torch.from_numpy(sigma_px).to(images.device, torch.float32).view(-1, 1, 1, 1)
    bands = make_bands(
        np.tile(np.arange(side_px) + 0.5, (count, 1)),
        _BLUR_REACH * sigma_px,
        lambda distances: torch.exp(-0.5 * (distances / sigmas) ** 2),
        length_px=side_px,
        max_step=1.0,
        max_reach_px=_BLUR_REACH * _BLUR_SIGMA_PX[1],
        device=images.device,
    )
    return apply_bands(images, np.arange(count), bands, bands)
