"""Faults that no shared image shows, made of real pixels, and stains and pigments that none shows either.

Defocus is a Gaussian, ink and pigment add optical densities, a bubble is a dark neutral ring: what is derived here is
a stand-in for the real fault, and every figure about it says so.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.uint8]

INKS = {
    "red": (0.10, 1.00, 0.76),
    "pink": (0.08, 1.00, 0.69),
    "green": (1.00, 0.45, 0.62),
    "blue": (1.00, 0.55, 0.15),
    "black": (0.90, 1.00, 0.95),
}
"""Optical densities of inks in red, green and blue, as shares of the largest: as measured on the shared thumbnails,
but for black, which is that of soot."""

_MELANIN = (0.50, 0.68, 1.00)
_HAEMATOXYLIN_IN_IHC = (0.60, 0.45, 0.18)
_DAB = (0.42, 0.70, 1.00)
_WHITE = 245.0


def defocused(pixels: Pixels, sigma_px: float) -> Pixels:
    """A tile [H, W, 3] out of focus, with a sensor's noise upon it, as a JPEG of quality 80 keeps it."""
    soft = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma_px)))
    noise = np.random.default_rng(0).normal(0.0, 1.5, soft.shape)
    stored = io.BytesIO()
    Image.fromarray((soft + noise).clip(0, 255).round().astype(np.uint8)).save(stored, "JPEG", quality=80)
    return np.asarray(Image.open(stored))


def inked(pixels: Pixels, ink: str, density: float) -> Pixels:
    """Pixels [H, W, 3] under ink of `INKS`, `density` being the optical density of its strongest channel."""
    return _absorbed(pixels, density * np.array(INKS[ink]))


def pigmented(pixels: Pixels, density: float) -> Pixels:
    """Tissue [H, W, 3] with melanin in grains: where the tissue itself is darker there is more of it."""
    darkness = 255.0 - pixels[..., 1:2].astype(np.float64)
    grains = np.random.default_rng(0).uniform(0.5, 1.5, darkness.shape)
    amount = density * grains * darkness / max(darkness.mean(), 1.0)
    return _absorbed(pixels, amount * np.array(_MELANIN))


def immunostained(pixels: Pixels, dab: float) -> Pixels:
    """H&E [H, W, 3] as if it were IHC: pale blue everywhere, and brown in a wavy half of it, `dab` strong."""
    density = np.log((_WHITE + 1.0) / (pixels[..., 1:2].astype(np.float64).clip(0.0, _WHITE) + 1.0))
    y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]] / 60.0
    brown = dab * (np.sin(y + np.sin(x)) + np.cos(x) > 0.0)[..., None]
    white = np.full(pixels.shape, _WHITE, np.uint8)
    return _absorbed(white, density * (0.8 * np.array(_HAEMATOXYLIN_IN_IHC) + brown * np.array(_DAB)))


def bubble(pixels: Pixels, centre: tuple[float, float], radius_px: float, rim_px: float) -> Pixels:
    """Glass or tissue [H, W, 3] under an air bubble: a neutral rim, darkest in its middle; centre is (y, x) in px."""
    y, x = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
    distance = np.hypot(y - centre[0], x - centre[1])
    rim = np.exp(-(((distance - radius_px) / (rim_px / 2)) ** 2))[..., None]
    return _absorbed(pixels, 1.1 * rim * np.ones(3))


def _absorbed(pixels: Pixels, density: NDArray[np.float64]) -> Pixels:
    return (pixels * np.exp(-density)).round().astype(np.uint8)
