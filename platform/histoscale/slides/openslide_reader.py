"""Reads slides through OpenSlide, at an exact scale.

Names of files appear in no error: OpenSlide's own texts may hold them, so they are matched against known causes
and then dropped.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image

from histoscale.errors import SlideError
from histoscale.slides.resample import Window, region_windows, resample, thumbnail_windows
from histoscale.slides.scale import Scale, level_downsample, resolve_scale
from histoscale.slides.slide import Slide, SlideInfo

_CACHE = openslide.OpenSlideCache(32 * 2**20)  # one for all slides: random reads hardly ever hit it

_UM_PER_UNIT = {"inch": 25_400.0, "centimeter": 10_000.0}
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
        return self._render((side_px, side_px), region_windows(self._info, x_px0, y_px0, side_px, mpp))

    def thumbnail(self, um_per_px: float) -> NDArray[np.uint8]:
        """Read the whole slide at exactly `um_per_px`; see `Slide.thumbnail`."""
        return self._render(*thumbnail_windows(self._info, um_per_px))

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

    def _render(self, shape: tuple[int, int], windows: list[Window]) -> NDArray[np.uint8]:
        """Compose [h, w, 3] of its blocks."""
        out = np.empty((*shape, 3), np.uint8)
        for window in windows:
            block = out[window.row : window.row + window.rows, window.column : window.column + window.columns]
            block[...] = resample(*self._read_window(window))
        return out

    def _read_window(self, window: Window) -> tuple[Image.Image, Window, tuple[float, float]]:
        """The px of a window on white, and by how many level px (a fraction) they really start elsewhere.

        OpenSlide takes places in level-0 px over its own estimate of the downsample, so a place is hit to half a
        level-0 px. It rounds places left of or above the slide to whole level px, so these are never asked for.
        """
        handle = self._open_handle()
        estimate = handle.level_downsamples[window.level]
        width, height = handle.level_dimensions[window.level]
        canvas = Image.new("RGB", (window.width, window.height), "white")
        left, top = max(window.left, 0), max(window.top, 0)
        right, bottom = min(window.left + window.width, width), min(window.top + window.height, height)
        if left >= right or top >= bottom:
            return canvas, window, (0.0, 0.0)
        at_px0 = (round(left * estimate), round(top * estimate))
        rgba = self._read_region(at_px0, window.level, (right - left, bottom - top))
        canvas.paste(rgba, (left - window.left, top - window.top), mask=rgba.getchannel("A"))
        return canvas, window, (at_px0[0] / estimate - left, at_px0[1] / estimate - top)

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


def _cause(error: openslide.OpenSlideError) -> str:
    """Why OpenSlide failed, in fixed words: its own text may hold the names of files."""
    text = str(error).lower()
    return next((cause for mark, cause in _KNOWN_CAUSES.items() if mark in text), "OpenSlide reports an error")


def _info(handle: openslide.OpenSlide, override: float | None) -> SlideInfo:
    scale = _scale(handle.properties, override)
    width, height = handle.dimensions
    return SlideInfo(
        width_px0=width,
        height_px0=height,
        mpp=scale.mpp,
        mpp_origin=scale.origin,
        vendor=handle.properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown"),
        level_downsamples=tuple(
            level_downsample((width, height), size, estimate)
            for size, estimate in zip(handle.level_dimensions, handle.level_downsamples, strict=True)
        ),
        mpp_conflict=scale.conflict,
    )


def _scale(properties: Mapping[str, str], override: float | None) -> Scale:
    """The scale out of the format's own field and the TIFF resolution."""
    vendor_xy = _pair(properties, openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
    unit_um = _UM_PER_UNIT.get(properties.get("tiff.ResolutionUnit", ""))
    per_unit = _pair(properties, "tiff.XResolution", "tiff.YResolution")
    tiff_xy = (unit_um / per_unit[0], unit_um / per_unit[1]) if unit_um and per_unit else None
    # For plain TIFF, OpenSlide's field is its own reading of the resolution tags.
    plain = properties.get(openslide.PROPERTY_NAME_VENDOR) == "generic-tiff"
    return resolve_scale([(vendor_xy, "tiff" if plain else "vendor"), (tiff_xy, "tiff")], override)


def _pair(properties: Mapping[str, str], x_name: str, y_name: str) -> tuple[float, float] | None:
    try:
        x, y = float(properties[x_name]), float(properties[y_name])
    except (KeyError, ValueError):
        return None
    return (x, y) if x > 0 and y > 0 else None
