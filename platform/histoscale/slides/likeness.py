"""Slides that are probably the same glass: copies of one object, and rescans that look alike. Pure.

Pairs are found by bucketing: slides of one geometry and scale whose perceptual hashes differ in at most three bits
agree in one of the hash's four 16-bit bands, so that only slides of one (geometry, band) bucket are compared.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LIKENESS_DTYPE = np.dtype(
    [
        ("slide_id", "S32"),
        ("width_px0", "<i8"),
        ("height_px0", "<i8"),
        ("mpp", "<f8"),
        ("look", "<u8"),
        ("tissue_px", "<i8"),
        ("content", "S16"),
    ]
)
"""What is compared of a slide; `content`: a digest of its objects' sizes and ETags."""

_GRID = (8, 8)
_BANDS = 4
_BAND_BITS = 16
_MAX_DISTANCE = _BANDS - 1
_PLAIN_BITS = 6  # fewer ones or zeros than this: hardly anything to see, so that looks alike says nothing
_SAME_TISSUE = 0.02
_MOST_COMPARED = 64  # of a bucket, with each of its slides: bounds the cost of an archive of look-alikes


def look(rgb: NDArray[np.uint8]) -> int:
    """Perceptual hash of a thumbnail [h, w, 3]: a bit for each of 8 x 8 steps to the right that gets brighter."""
    grey = Image.fromarray(rgb).convert("L").resize((_GRID[0] + 1, _GRID[1]), Image.Resampling.BOX)
    brightness = np.asarray(grey, np.int16)
    bits = np.packbits(brightness[:, 1:] > brightness[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def duplicates(slides: NDArray[np.void]) -> dict[str, str]:
    """Slides that are probably copies or rescans of another one.

    Args:
        slides: `LIKENESS_DTYPE`, [n].

    Returns:
        Slide id -> the smallest id among the slides that it resembles, where that is smaller than its own.
    """
    ordered = slides[np.argsort(slides["slide_id"])]
    twin = np.arange(len(ordered))
    for run in _runs(ordered[["content"]]):
        twin[run] = np.minimum(twin[run], run[0])
    geometry = ["width_px0", "height_px0", "mpp"]
    for band in range(_BANDS):
        keys = np.empty(len(ordered), [*((name, ordered.dtype[name]) for name in geometry), ("band", "<u2")])
        for name in geometry:
            keys[name] = ordered[name]
        keys["band"] = (ordered["look"] >> np.uint64(band * _BAND_BITS)) & np.uint64(0xFFFF)
        for run in _runs(keys):
            for position, place in enumerate(run[1:], 1):
                earlier = run[: min(position, _MOST_COMPARED)]
                alike = earlier[_alike(ordered[earlier], ordered[place])]
                twin[place] = min([twin[place], *alike[:1]])
    found = np.flatnonzero(twin != np.arange(len(ordered)))
    names = ordered["slide_id"]
    return {names[place].decode(): names[twin[place]].decode() for place in found}


def _runs(keys: NDArray[np.void]) -> Iterator[NDArray[np.int64]]:
    """Places of equal keys, ascending, for each key that occurs more than once."""
    if not len(keys):
        return
    names = keys.dtype.names or ()
    order = np.lexsort([keys[name] for name in names])
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
        if end - start > 1:
            yield order[start:end]


def _alike(slides: NDArray[np.void], slide: np.void) -> NDArray[np.bool_]:
    distance = np.bitwise_count(slides["look"] ^ slide["look"])
    ones = int(np.bitwise_count(slide["look"]))
    telling = _PLAIN_BITS <= ones <= 64 - _PLAIN_BITS
    same_tissue = np.abs(slides["tissue_px"] - slide["tissue_px"]) <= _SAME_TISSUE * slide["tissue_px"]
    alike: NDArray[np.bool_] = telling & (distance <= _MAX_DISTANCE) & same_tissue
    return alike
