"""Which scale a slide has: microns per pixel out of several origins, and the downsamples of its levels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from histoscale.errors import SlideError
from histoscale.slides.slide import MppOrigin

PLAUSIBLE_MPP = (0.05, 10.0)
"""um/px at level 0 that an optical scanner can have; 72 dpi as a default tag is 353."""

_SQUARE_TOLERANCE = 0.02
_CONFLICT_TOLERANCE = 0.02  # rounding of the same scale in two fields stays below
_NO_MPP_REMEDY = "give its um/px in the sidecar CSV (columns slide,mpp)"


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of level 0.

    Attributes:
        mpp: Microns per px, the mean of x and y.
        origin: Where it was found.
        conflict: Microns per px of another origin that is plausible too and differs by more than 2 %, if any.
    """

    mpp: float
    origin: MppOrigin
    conflict: float | None


def resolve_scale(
    found: Sequence[tuple[tuple[float, float] | None, MppOrigin]], override: float | None = None
) -> Scale:
    """Choose among what a file says of its scale; the first plausible origin wins, the sidecar over all.

    Args:
        found: (x, y) in um/px, or None, and its origin; the most trusted first.
        override: um/px of the sidecar.

    Raises:
        SlideError: No origin is plausible, the sidecar is not, or the pixels of the winner are not square.
    """
    low, high = PLAUSIBLE_MPP
    plausible = [(pair, origin) for pair, origin in found if pair and all(low <= value <= high for value in pair)]
    if override is not None:
        if not low <= override <= high:
            raise SlideError(
                "microns per pixel of the sidecar are not plausible",
                value=override,
                expected=f"{low} to {high} um/px",
                remedy="correct the sidecar CSV",
            )
        return Scale(override, "sidecar", _conflict(override, [_mean(pair) for pair, _ in plausible]))
    if not plausible:
        raise SlideError(
            "slide has no microns per pixel", expected=f"{low} to {high} um/px in its metadata", remedy=_NO_MPP_REMEDY
        )
    pair, origin = plausible[0]
    mpp = _mean(pair)
    if abs(pair[0] - pair[1]) > _SQUARE_TOLERANCE * mpp:
        raise SlideError(
            "slide has pixels that are not square",
            value=f"{pair[0]:.4g} x {pair[1]:.4g} um",
            expected=f"x and y within {_SQUARE_TOLERANCE:.0%}",
            remedy=_NO_MPP_REMEDY,
        )
    return Scale(mpp, origin, _conflict(mpp, [_mean(other) for other, _ in plausible[1:]]))


def level_downsample(size0: tuple[int, int], size: tuple[int, int], estimate: float) -> float:
    """The downsample of a level: the power of two or whole number that explains its size, else the estimate.

    Scanners halve and drop the odd pixel, so that 2967 / 185 gives 16.04 for a level that was made with 16.

    Args:
        size0: Width and height of level 0 in px.
        size: Width and height of the level in px.
        estimate: The quotient of the sizes.
    """
    for whole in (2 ** round(math.log2(estimate)), round(estimate)):
        if all(abs(length * whole - length0) < whole for length0, length in zip(size0, size, strict=True)):
            return float(whole)
    return float(estimate)


def _mean(pair: tuple[float, float]) -> float:
    return sum(pair) / 2


def _conflict(mpp: float, others: Sequence[float]) -> float | None:
    return next((other for other in others if abs(other - mpp) > _CONFLICT_TOLERANCE * mpp), None)
