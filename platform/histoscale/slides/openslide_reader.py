"""Reads slides through OpenSlide, at an exact scale.

A pyramid holds a few scales; a read takes the coarsest level that is fine enough and brings it to the wanted
scale in one antialiased resampling whose window is placed in fractions of a pixel, so that neither the scale nor
the position is rounded. Names of files appear in no error: OpenSlide's own texts may hold them, so they
are matched against known causes and then dropped.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from histoscale.errors import SlideError
from histoscale.slides.slide import MppOrigin, Slide, SlideInfo

PLAUSIBLE_MPP = (0.05, 10.0)
"""um/px at level 0 that an optical scanner can have; 72 dpi as a default tag is 353."""

_SQUARE_TOLERANCE = 0.02
_SAME_SCALE = 1e-3
"""A level this near to the wanted scale (0.4 px over 392) is handed through as it is: resampling only blurs."""

_FILTER = Image.Resampling.BICUBIC
_FILTER_REACH = 2.0  # half-width of the bicubic kernel in px of the coarser side
_BLOCK_PX = 3840  # side of the largest read; with its margins below 4096, where OpenSlide cuts reads and rounds
_CACHE = openslide.OpenSlideCache(32 * 2**20)  # one for all slides: random reads hardly ever hit it

_UM_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}
_NO_MPP_REMEDY = "give its um/px in the sidecar CSV (columns slide,mpp)"
_KNOWN_CAUSES = {
    "not a jpeg": "a JPEG tile holds no JPEG data",
    "soc marker": "a JPEG 2000 tile holds no JPEG 2000 data",
    "unsupported or missing": "the file is cut short, or its format is not known",
    "directory": "a TIFF directory is missing or damaged",
    "short read": "the file ends too early",
    "eof": "the file ends too early",
    "premature end": "the file ends too early",
    "decompress": "a tile cannot be decompressed",
}


def open_slide(path: Path, *, mpp: float | None = None) -> Slide:
    """Open a slide of any format that OpenSlide knows (of a DICOM or MIRAX set, any one of its main files).

    Args:
        path: The slide on a local disk.
        mpp: um/px of level 0 from the sidecar; wins over what the file says.

    Returns:
        The open slide.

    Raises:
        SlideError: The file is missing, damaged or of an unknown format, or its um/px cannot be told. The text
            never holds the path.
    """
    return OpenSlideReader(path, mpp)


class OpenSlideReader:
    """A slide behind an OpenSlide handle that is opened anew after a failed read, since failures are sticky."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self._path = path
        self._closed = False
        self._handle: openslide.OpenSlide | None = None
        handle = self._open_handle()
        try:
            self._info = _info(handle, mpp)
        except BaseException:  # cleaned up and raised again
            self.close()
            raise

    @property
    def info(self) -> SlideInfo:
        """Geometry and optics."""
        return self._info

    def read(self, x_px0: float, y_px0: float, side_px: int, mpp: float) -> NDArray[np.uint8]:
        """Read a square of `side_px` at exactly `mpp`; see `Slide.read`."""
        if not (math.isfinite(x_px0) and math.isfinite(y_px0)):
            raise SlideError("region has no place", value=(x_px0, y_px0), expected="finite level-0 px")
        if side_px < 1:
            raise SlideError("region has no size", value=side_px, expected="a side of 1 px or more")
        _check_scale(mpp)
        return self._render(x_px0, y_px0, (side_px, side_px), mpp)

    def thumbnail(self, um_per_px: float) -> NDArray[np.uint8]:
        """Read the whole slide at exactly `um_per_px`; see `Slide.thumbnail`."""
        _check_scale(um_per_px)
        scale = self._info.mpp / um_per_px
        # A sliver of rounding error must not add a white row.
        width = max(1, math.ceil(self._info.width_px0 * scale - 1e-3))
        height = max(1, math.ceil(self._info.height_px0 * scale - 1e-3))
        return self._render(0.0, 0.0, (width, height), um_per_px)

    def verify(self) -> None:
        """Decode a 3 x 3 grid of tiles, corners included, at every level; see `Slide.verify`."""
        handle = self._open_handle()
        for level, (width, height) in enumerate(handle.level_dimensions):
            downsample = handle.level_downsamples[level]
            for x, y in {(x, y) for x in (0, width // 2, width - 1) for y in (0, height // 2, height - 1)}:
                self._read_region((math.floor(x * downsample), math.floor(y * downsample)), level, (1, 1))

    def close(self) -> None:
        """Free the handle; closing twice is allowed."""
        self._closed = True
        self._drop_handle()

    def _render(self, x_px0: float, y_px0: float, size: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Compose [h, w, 3] at `mpp` out of blocks that need at most `_BLOCK_PX` squared source px each."""
        level = self._level_for(mpp)
        downsample = self._info.level_downsamples[level]
        ratio = mpp / (self._info.mpp * downsample)
        x, y = x_px0 / downsample, y_px0 / downsample
        if abs(ratio - 1) <= _SAME_SCALE:
            ratio, x, y = 1.0, float(round(x)), float(round(y))
        width, height = size
        out = np.empty((height, width, 3), np.uint8)
        step = max(1, math.floor(_BLOCK_PX / ratio))
        for top, bottom in _spans(height, step):
            for left, right in _spans(width, step):
                out[top:bottom, left:right] = self._resampled(
                    level, (x + left * ratio, y + top * ratio), (right - left, bottom - top), ratio
                )
        return out

    def _level_for(self, mpp: float) -> int:
        """The coarsest level that is at least as fine as `mpp`; level 0 where none is."""
        finest = mpp * (1 + _SAME_SCALE) / self._info.mpp
        fine = [i for i, downsample in enumerate(self._info.level_downsamples) if downsample <= finest]
        return max(fine, key=lambda i: self._info.level_downsamples[i], default=0)

    def _resampled(
        self, level: int, corner: tuple[float, float], size: tuple[int, int], ratio: float
    ) -> NDArray[np.uint8]:
        """Read `size` output px from `corner` (px of the level), `ratio` level px per output px, [h, w, 3]."""
        left, top = math.floor(corner[0]), math.floor(corner[1])
        if ratio == 1.0:
            return np.asarray(self._read_level(level, (left, top), size)[0])
        margin = math.ceil(_FILTER_REACH * max(ratio, 1.0)) + 1
        source_size = (
            math.ceil(size[0] * ratio) + 1 + 2 * margin,
            math.ceil(size[1] * ratio) + 1 + 2 * margin,
        )
        source, place = self._read_level(level, (left - margin, top - margin), source_size)
        x, y = corner[0] - place[0], corner[1] - place[1]
        box = (x, y, x + size[0] * ratio, y + size[1] * ratio)
        return np.asarray(source.resize(size, _FILTER, box=box))

    def _read_level(
        self, level: int, corner: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Image.Image, tuple[float, float]]:
        """Read level px on white, and where (in level px, to a fraction) they really start.

        OpenSlide takes places in level-0 px over its own estimate of the downsample, so a place is hit to half a
        level-0 px. It rounds places left of or above the slide to whole level px, so these are never asked for.
        """
        handle = self._open_handle()
        estimate = handle.level_downsamples[level]
        canvas = Image.new("RGB", size, "white")
        first = [max(start, 0) for start in corner]
        last = [
            min(start + length, end)
            for start, length, end in zip(corner, size, handle.level_dimensions[level], strict=True)
        ]
        if first[0] >= last[0] or first[1] >= last[1]:
            return canvas, corner
        at_px0 = (round(first[0] * estimate), round(first[1] * estimate))
        rgba = self._read_region(at_px0, level, (last[0] - first[0], last[1] - first[1]))
        canvas.paste(rgba, (first[0] - corner[0], first[1] - corner[1]), mask=rgba.getchannel("A"))
        shift = (at_px0[0] / estimate - first[0], at_px0[1] / estimate - first[1])
        return canvas, (corner[0] + shift[0], corner[1] + shift[1])

    def _read_region(self, at_px0: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """OpenSlide's own read, RGBA; a failure gives the handle up."""
        try:
            return self._open_handle().read_region(at_px0, level, size)
        except openslide.OpenSlideError as error:
            self._drop_handle()
            raise SlideError(
                "slide has damaged data",
                value=_cause(error),
                expected="tiles that can be decoded",
                remedy="copy the slide again from the scanner's archive, or take it out",
            ) from None

    def _open_handle(self) -> openslide.OpenSlide:
        if self._closed:
            raise SlideError("slide is closed", remedy="open it again before reading")
        if self._handle is None:
            if not self._path.is_file():
                raise SlideError("slide file is missing", expected="a readable file")
            try:
                self._handle = openslide.OpenSlide(self._path)
            except openslide.OpenSlideError as error:
                raise SlideError(
                    "slide cannot be opened", value=_cause(error), expected="a whole slide that OpenSlide can read"
                ) from None
            self._handle.set_cache(_CACHE)
        return self._handle

    def _drop_handle(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def _check_scale(mpp: float) -> None:
    if not (math.isfinite(mpp) and mpp > 0):
        raise SlideError("scale is not valid", value=mpp, expected="um/px above zero")


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _cause(error: openslide.OpenSlideError) -> str:
    """Why OpenSlide failed, in fixed words: its own text may hold the names of files."""
    text = str(error).lower()
    return next((cause for mark, cause in _KNOWN_CAUSES.items() if mark in text), "OpenSlide reports an error")


def _info(handle: openslide.OpenSlide, override: float | None) -> SlideInfo:
    mpp, origin = _mpp(handle.properties, override)
    width, height = handle.dimensions
    return SlideInfo(
        width_px0=width,
        height_px0=height,
        mpp=mpp,
        mpp_origin=origin,
        vendor=handle.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
        level_downsamples=tuple(
            _downsample((width, height), size, estimate)
            for size, estimate in zip(handle.level_dimensions, handle.level_downsamples, strict=True)
        ),
    )


def _downsample(size0: tuple[int, int], size: tuple[int, int], estimate: float) -> float:
    """The downsample of a level: the power of two or whole number that explains its size, else the estimate.

    Scanners halve and drop the odd pixel, so that 2967 / 185 gives 16.04 for a level that was made with 16.
    """
    for whole in (2 ** round(math.log2(estimate)), round(estimate)):
        if all(abs(length * whole - length0) < whole for length0, length in zip(size0, size, strict=True)):
            return float(whole)
    return float(estimate)


def _mpp(properties: Mapping[str, str], override: float | None) -> tuple[float, MppOrigin]:
    """um/px of level 0 and where it was found: sidecar, the format's field, or the TIFF resolution."""
    low, high = PLAUSIBLE_MPP
    if override is not None:
        if not low <= override <= high:
            raise SlideError(
                "microns per pixel of the sidecar are not plausible",
                value=override,
                expected=f"{low} to {high} um/px",
                remedy="correct the sidecar CSV",
            )
        return override, "sidecar"
    vendor_xy = _pair(properties, openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
    unit_um = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    per_unit = _pair(properties, "tiff.XResolution", "tiff.YResolution")
    tiff_xy = (unit_um / per_unit[0], unit_um / per_unit[1]) if unit_um and per_unit else None
    # For plain TIFF, OpenSlide's field is its own reading of the resolution tags.
    plain = properties.get(openslide.PROPERTY_NAME_VENDOR) == "generic-tiff"
    found: list[tuple[tuple[float, float] | None, MppOrigin]] = [
        (vendor_xy, "tiff" if plain else "vendor"),
        (tiff_xy, "tiff"),
    ]
    for pair, origin in found:
        if pair is None or not all(low <= value <= high for value in pair):
            continue
        mean = sum(pair) / 2
        if abs(pair[0] - pair[1]) > _SQUARE_TOLERANCE * mean:
            raise SlideError(
                "slide has pixels that are not square",
                value=f"{pair[0]:.4g} x {pair[1]:.4g} um",
                expected=f"x and y within {_SQUARE_TOLERANCE:.0%}",
                remedy=_NO_MPP_REMEDY,
            )
        return mean, origin
    raise SlideError(
        "slide has no microns per pixel", expected=f"{low} to {high} um/px in its metadata", remedy=_NO_MPP_REMEDY
    )


def _pair(properties: Mapping[str, str], x_name: str, y_name: str) -> tuple[float, float] | None:
    try:
        x, y = float(properties[x_name]), float(properties[y_name])
    except (KeyError, ValueError):
        return None
    return (x, y) if x > 0 and y > 0 else None
