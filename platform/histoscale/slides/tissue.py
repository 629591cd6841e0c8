"""Where a slide holds tissue: a mask from a thumbnail, by optical density relative to the slide's own glass.

Tissue is what absorbs light with a stain's colour, or absorbs much of it; pen is told from stain by the ratios
of the optical densities of red, green and blue, since ink absorbs channels that no histological stain does.
The thresholds come from the labelled thumbnails and tiles that the tests name.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histoscale.errors import SlideError

MASK_UM_PER_PX = 8.0
"""The scale of the thumbnail that a mask is made from: a nucleus is one pixel, a 392 px field at 0.5 is 24."""

_SMOOTH_UM = 6.0
_SMOOTH_MIN_PX = 0.6  # noise of single pixels, at coarse scales
_CLOSE_UM = 56.0  # half the width of a large fat cell: fat is a net of membranes around glass
_OPEN_UM = 20.0  # half the width of the coverslip edges and fibres that are to go
_MIN_AREA_UM2 = 20_000.0
_PEN_HALF_WIDTH_UM = 8.0  # a stroke is wider; single stained pixels of an ink colour are not ink
_PEN_HALO_UM = 32.0  # ink bleeds, and its blurred edge has no pure colour

_GLASS_FLOOR = 190  # darker than this in any channel is never glass
_GLASS_DEFAULT = 243.0  # the glass of most scanners, for a field without any
_GLASS_SHARE = 0.005  # fewer bright pixels than this are lumina, not glass

Density = NDArray[np.float32]
Mask = NDArray[np.bool_]


def tissue_mask(rgb: NDArray[np.uint8], um_per_px: float) -> Mask:
    """Find the tissue of a thumbnail.

    Args:
        rgb: Thumbnail, [H, W, 3].
        um_per_px: Scale of the thumbnail; every length and area inside is in micrometres.

    Returns:
        True where there is tissue, [H, W]; glass, pen, coloured background, dust and coverslip edges are False.

    Raises:
        SlideError: The array is not an RGB image, or the scale is not a positive number.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or rgb.size == 0:
        raise SlideError(
            "thumbnail is not an RGB image",
            value=f"{rgb.dtype} {list(rgb.shape)}",
            expected="uint8 [H, W, 3] with at least one pixel",
        )
    if not (math.isfinite(um_per_px) and um_per_px > 0):
        raise SlideError("thumbnail has no scale", value=um_per_px, expected="um/px above zero")
    density = _optical_density(rgb, um_per_px)
    pen = _dilate(_pen(density, um_per_px), _PEN_HALO_UM / um_per_px)
    stained = _stained(density) & ~pen
    closed = _erode(_dilate(stained, _CLOSE_UM / um_per_px), _CLOSE_UM / um_per_px)
    return _without_specks(_opened(closed, _OPEN_UM / um_per_px) & ~pen, _MIN_AREA_UM2 / um_per_px**2)


def _optical_density(rgb: NDArray[np.uint8], um_per_px: float) -> Density:
    """Optical density of [H, W, 3] pixels: natural logarithm, relative to the image's glass, smoothed, [3, H, W]."""
    sigma_px = max(_SMOOTH_UM / um_per_px, _SMOOTH_MIN_PX)
    planes = np.empty((3, *rgb.shape[:2]), np.float32)  # channels first: sums over channels are then fast
    for channel, plane in enumerate(planes):
        plane[:] = rgb[..., channel]
        ndimage.gaussian_filter(plane, sigma_px, output=plane)
    glass = _glass(planes)[:, None, None]
    density: Density = np.maximum(np.log((glass + 1.0) / (planes + 1.0)), 0.0)
    return density


def _glass(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colour of the glass, [3]: near the brightest of the bright pixels, pure white (no light path) left out."""
    darkest = planes.min(axis=0)
    bright = planes[:, (darkest >= _GLASS_FLOOR) & (darkest < 254.5)]
    if bright.shape[1] < _GLASS_SHARE * darkest.size:
        return np.full(3, _GLASS_DEFAULT, np.float32)
    glass: NDArray[np.float32] = np.percentile(bright, 75, axis=1).astype(np.float32)
    return glass


def _stained(density: Density) -> Mask:
    """Where light is absorbed as tissue does, [H, W]: in colour, or strongly."""
    strength = density.mean(axis=0)
    chroma = density.max(axis=0) - density.min(axis=0)
    stained: Mask = ((chroma > 0.06) & (density.max(axis=0) > 0.10)) | (strength > 0.22)
    return stained


def _pen(density: Density, um_per_px: float) -> Mask:
    """Where there is ink, [H, W]: pixels of a sure ink colour and what is joined to them by a likely one."""
    red, green, blue = density
    strength = density.mean(axis=0)
    chroma = density.max(axis=0) - density.min(axis=0)
    # Haematoxylin and the blue counterstain of IHC reach 1.4 x green in red, but then absorb little blue.
    cold = ((red > 1.5 * green) | ((red > 1.35 * green) & (blue > 0.65 * green))) & (chroma > 0.3)
    cold_edge = ((red > 1.35 * green) & (red > 0.08)) | ((red > 1.05 * green) & (blue > 0.7 * green) & (strength > 0.9))
    # Eosin absorbs blue less than 0.7 x green, DAB absorbs red more than 0.35 x green. Translucent red ink has the
    # ratios of eosin and passes as tissue.
    warm = (red < 0.3 * green) & (blue > 0.75 * green) & (blue < 1.3 * green) & (green > 1.1)
    warm_edge = (blue > 0.7 * green) & (blue < 1.3 * green) & (red < 0.48 * green) & (green > 0.12)
    # Grey counterstain and dense nuclei stay paler or more coloured than this; melanin does not and is lost.
    black = ((strength > 1.35) & (chroma < 0.42 * strength) & (blue < 1.05 * green)) | (strength > 2.2)
    black_edge = (chroma < 0.42 * strength) & (strength > 0.3)
    radius_px = max(_PEN_HALF_WIDTH_UM / um_per_px, 1.0)
    return (
        _joined(_opened(cold, radius_px), cold | cold_edge)
        | _joined(_opened(warm, radius_px), warm | warm_edge)
        | _joined(_opened(black, radius_px), black | black_edge)
    )


def _joined(core: Mask, candidates: Mask) -> Mask:
    """The connected parts of `candidates` that hold a pixel of `core`."""
    labels, count = ndimage.label(candidates)
    held = np.zeros(count + 1, np.bool_)
    held[labels[core]] = True
    held[0] = False
    joined: Mask = held[labels]
    return joined


def _opened(mask: Mask, radius_px: float) -> Mask:
    return _dilate(_erode(mask, radius_px), radius_px)


def _dilate(mask: Mask, radius_px: float) -> Mask:
    """Grow by a square of the given half side; separable, so its cost does not depend on the radius."""
    return ndimage.maximum_filter(mask, size=2 * round(radius_px) + 1)  # type: ignore[no-any-return]


def _erode(mask: Mask, radius_px: float) -> Mask:
    """Shrink by a square of the given half side; the border mirrors, so that no frame is lost."""
    return ndimage.minimum_filter(mask, size=2 * round(radius_px) + 1)  # type: ignore[no-any-return]


def _without_specks(mask: Mask, min_area_px: float) -> Mask:
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    keep = np.bincount(labels.ravel()) >= min_area_px
    keep[0] = False
    return keep[labels]  # type: ignore[no-any-return]
