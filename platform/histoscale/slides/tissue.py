"""Where a slide holds tissue: a mask from a thumbnail, by optical density relative to the slide's own glass.

Tissue is what absorbs light with a stain's colour, or absorbs much of it; pen is told from stain by the ratios
of the optical densities of red, green and blue, since ink absorbs channels that no histological stain does.
The thresholds come from the labelled thumbnails and tiles that the tests name.
"""

import math
from typing import Any, NamedTuple

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
_STROKE_UM = 8.0  # half the width of the finest stroke; single stained pixels of an ink colour are not ink
_BLACK_STROKE_UM = 24.0  # the same for black ink, since dense nuclei under pigment scatter into its colour
_PINK_STROKE_UM = 40.0  # the same for ink that is as pale as eosin, whose colour scatters into that of ink
_PEN_HALO_UM = 32.0  # ink bleeds, and its blurred edge has no pure colour

_FOCUS_WINDOW_UM = 200.0
_FOCUS_MIN = 0.085  # sharp tissue has 0.15 and more, a Gaussian of 1.5 px leaves less than this
_FILM_MAX = 10.0  # mean squared difference over `FAR_PX`; the most even real tissue has ten, at three times the density
_FILM_MAX_DENSITY = 0.2
_FOCUS_MAX_UM_PER_PX = 32.0  # on coarser thumbnails structure is too small to tell

FAR_PX = 4
"""Focus is told from differences between neighbours and between pixels this far apart."""
SENSOR_NOISE = 6
"""Mean squared difference, in levels of 8 bits, that a sensor makes of nothing."""
FLAT = 50
"""Mean squared difference over `FAR_PX` below which nothing can be said of focus."""

_MIN_CHROMA = 0.04  # of a membrane of fat, thinner than a pixel
_GLASS_FLOOR = 190  # darker than this in any channel is never glass
_GLASS_DEFAULT = 243.0  # the glass of most scanners, for a field without any
_GLASS_SHARE = 0.005  # fewer bright pixels than this are lumina, not glass

Densities = NDArray[np.floating[Any]]
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
    tissue = stained(density, _MIN_CHROMA) & ~pen
    closed = _erode(_dilate(tissue, _CLOSE_UM / um_per_px), _CLOSE_UM / um_per_px)
    seen = _opened(closed, _OPEN_UM / um_per_px) & ~pen
    if um_per_px <= _FOCUS_MAX_UM_PER_PX:
        seen &= ~_without_structure(rgb[..., 1], density, um_per_px)
    return _without_specks(seen, _MIN_AREA_UM2 / um_per_px**2)


def _optical_density(rgb: NDArray[np.uint8], um_per_px: float) -> Densities:
    """Optical density of [H, W, 3] pixels: natural logarithm, relative to the image's glass, smoothed, [3, H, W]."""
    sigma_px = max(_SMOOTH_UM / um_per_px, _SMOOTH_MIN_PX)
    planes = np.empty((3, *rgb.shape[:2]), np.float32)  # channels first: sums over channels are then fast
    for channel, plane in enumerate(planes):
        plane[:] = rgb[..., channel]
        ndimage.gaussian_filter(plane, sigma_px, output=plane)
    glass = _glass(planes)[:, None, None]
    density: Densities = np.maximum(np.log((glass + 1.0) / (planes + 1.0)), 0.0)
    return density


def _glass(planes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colour of the glass, [3]: near the brightest of the bright pixels, pure white (no light path) left out."""
    darkest = planes.min(axis=0)
    bright = planes[:, (darkest >= _GLASS_FLOOR) & (darkest < 254.5)]
    if bright.shape[1] < _GLASS_SHARE * darkest.size:
        return np.full(3, _GLASS_DEFAULT, np.float32)
    glass: NDArray[np.float32] = np.percentile(bright, 75, axis=1).astype(np.float32)
    return glass


def stained(density: Densities, min_chroma: float) -> Mask:
    """Where light is absorbed as tissue does, in colour or strongly: [...] from optical densities [3, ...].

    Args:
        density: Optical densities of red, green and blue, natural logarithm, [3, ...].
        min_chroma: How much two channels must differ at least; single pixels need more than smoothed ones.
    """
    strength = density.mean(axis=0)
    chroma = density.max(axis=0) - density.min(axis=0)
    absorbing = ((chroma > min_chroma) & (density.max(axis=0) > 1.7 * min_chroma)) | (strength > 0.22)
    # Shadows are neutral: the rims of air bubbles, edges of coverslips and of the slide itself. DAB over a blue
    # counterstain comes near to that.
    tissue: Mask = absorbing & (chroma > 0.1 * strength)
    return tissue


def ink(density: Densities) -> Mask:
    """Where the colour is one of ink and of no stain: [...] from optical densities [3, ...]."""
    cores = [kind.core for kind in _inks(density)]
    return np.logical_or.reduce(cores)  # type: ignore[no-any-return]


class _Ink(NamedTuple):
    core: Mask  # the colour is surely one of ink, where a square of twice the half width is filled with it
    edge: Mask  # the colour may be one of ink, beside sure ink
    half_width_um: float


def _inks(density: Densities) -> list[_Ink]:
    """Where each kind of ink can be, by ratios of optical densities [3, ...]."""
    red, green, blue = density
    strength = density.mean(axis=0)
    chroma = density.max(axis=0) - density.min(axis=0)
    # The blue counterstain of IHC reaches 1.4 x green in red, but is pale then and absorbs little blue.
    cold = (
        (red > 1.5 * green) | ((red > 1.35 * green) & (blue > 0.65 * green)) | ((red > 1.1 * green) & (strength > 1.2))
    )
    cold &= chroma > 0.3
    cold_edge = ((red > 1.35 * green) & (red > 0.08)) | ((red > 1.05 * green) & (blue > 0.7 * green) & (strength > 0.9))
    # Eosin has 0.1 to 0.35 x green in red and 0.55 to 0.65 x green in blue, scattered up to 0.75 x; DAB has more red.
    warm = (green > 0.3) & (red < 0.3 * green) & (blue > 0.76 * green) & (blue < 1.3 * green)
    warm |= (green > 1.8) & (red < 0.3 * green) & (blue > 0.55 * green)
    warm_edge = (green > 0.12) & (red < 0.48 * green) & (blue > 0.7 * green) & (blue < 1.3 * green)
    pink = ((red < 0.13 * green) & (blue > 0.65 * green)) | ((red < 0.2 * green) & (blue > 0.68 * green))
    pink &= (green > 0.3) & (blue < 1.3 * green)
    pink_edge = (green > 0.12) & (red < 0.22 * green) & (blue > 0.63 * green) & (blue < 1.3 * green)
    # Dense nuclei absorb blue less than 0.6 x green; melanin absorbs blue much more than red, and black ink does not.
    grey = (blue > 0.66 * green) & (blue < 1.07 * green) & (blue - red < 0.3 * green)
    black = (strength > 1.2) & (red > 0.5 * green) & grey
    black_edge = (strength > 0.3) & (chroma < 0.5 * strength) & grey
    return [
        _Ink(cold, cold | cold_edge, _STROKE_UM),
        _Ink(warm, warm | warm_edge, _STROKE_UM),
        _Ink(pink, pink | pink_edge, _PINK_STROKE_UM),
        _Ink(black, black | black_edge, _BLACK_STROKE_UM),
    ]


def _pen(density: Densities, um_per_px: float) -> Mask:
    """Where there is ink, [H, W]: strokes of a sure ink colour and what is joined to them by a likely one."""
    pen = np.zeros(density.shape[1:], np.bool_)
    for core, edge, half_width_um in _inks(density):
        pen |= _joined(_opened(core, max(half_width_um / um_per_px, 1.0)), edge)
    return pen


def _without_structure(green: NDArray[np.uint8], density: Densities, um_per_px: float) -> Mask:
    """Where nothing is sharp, [H, W]: defocus leaves contrast but none between neighbours, a film of stain none."""
    near, far = np.zeros((2, *green.shape), np.float32)
    for lines, near_lines, far_lines in ((green, near, far), (green.T, near.T, far.T)):
        values = lines.astype(np.float32)
        steps = (values[:, 1:] - values[:, :-1]) ** 2
        # The steps between the two ends of each long one: a single edge then has the same ratio wherever a window cuts.
        near_lines[:, :-FAR_PX] += sum(steps[:, k : k - FAR_PX + 1 or None] for k in range(FAR_PX)) / (2 * FAR_PX)
        far_lines[:, :-FAR_PX] += (values[:, FAR_PX:] - values[:, :-FAR_PX]) ** 2 / 2
    window_px = max(round(_FOCUS_WINDOW_UM / um_per_px), 9)
    near, far = (ndimage.uniform_filter(squares, window_px) for squares in (near, far))
    unsharp = (far > FLAT) & (near - SENSOR_NOISE < _FOCUS_MIN * (far + FLAT))
    film = (far < _FILM_MAX) & (density.max(axis=0) < _FILM_MAX_DENSITY)
    nothing: Mask = unsharp | film
    return nothing


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
