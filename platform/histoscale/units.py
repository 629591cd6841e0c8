"""Units: microns per pixel (mpp), the magnification that pathologists call it by, and times for people."""

MPP_AT_1X = 10.0  # 10 um/px is the field's convention for "1x": 40x = 0.25, 20x = 0.5, 10x = 1, 5x = 2 um/px


def magnification(mpp: float) -> float:
    """Objective magnification that a scale of `mpp` um/px stands for (0.5 -> 20.0)."""
    return MPP_AT_1X / mpp


def describe_mpp(mpp: float | tuple[float, float]) -> str:
    """A scale, or a range of scales, as people say it: `0.5 um/px (20x)`, `0.25 to 0.5 um/px (40x to 20x)`."""
    if isinstance(mpp, tuple):
        finest, coarsest = mpp
        return f"{finest:.3g} to {coarsest:.3g} um/px ({magnification(finest):.3g}x to {magnification(coarsest):.3g}x)"
    return f"{mpp:g} um/px ({magnification(mpp):g}x)"


def describe_duration(seconds: float) -> str:
    """A time as people say it: `8.5 s`, `12 min`, `3:05 h`."""
    if seconds < 100.0:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60.0)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60}:{minutes % 60:02d} h"
