"""A slide as the library sees it: geometry, optics, and reads at an exact scale."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

MppOrigin = Literal["vendor", "tiff", "sidecar"]


@dataclass(frozen=True)
class SlideInfo:
    """What is kept of a slide's own metadata: geometry, optics and vendor, nothing else.

    Attributes:
        width_px0: Width in level-0 px.
        height_px0: Height in level-0 px.
        mpp: Microns per level-0 px.
        mpp_origin: "vendor" (the format's own field), "tiff" (resolution tags) or "sidecar" (given by the user).
        vendor: The format's vendor as OpenSlide names it.
        level_downsamples: Downsample of each pyramid level, first 1.
        mpp_conflict: Microns per px of another origin of the file that is plausible too and differs by more than 2 %.
    """

    width_px0: int
    height_px0: int
    mpp: float
    mpp_origin: MppOrigin
    vendor: str
    level_downsamples: tuple[float, ...]
    mpp_conflict: float | None = None


class Slide(Protocol):
    """An open slide; one thread at a time uses it."""

    @property
    def info(self) -> SlideInfo:
        """Geometry and optics."""

    def read(self, x_px0: float, y_px0: float, side_px: int, mpp: float) -> NDArray[np.uint8]:
        """Read a square at exactly `mpp` um/px.

        Args:
            x_px0: Left edge in level-0 px; may lie outside the slide.
            y_px0: Top edge in level-0 px; may lie outside the slide.
            side_px: Side of the result in px of `mpp`.
            mpp: um/px of the result.

        Returns:
            RGB, uint8 [side_px, side_px, 3]; white beyond the border.

        Raises:
            SlideError: The request is not valid, or the slide's data is damaged there.
        """

    def thumbnail(self, um_per_px: float) -> NDArray[np.uint8]:
        """Read the whole slide at exactly `um_per_px`, from pyramid levels only.

        Args:
            um_per_px: um/px of the result.

        Returns:
            RGB, uint8 [h, w, 3]; the last row and column are partly white where the slide ends inside them.

        Raises:
            SlideError: The scale is not valid, or the slide's data is damaged.
        """

    def verify(self) -> None:
        """Decode a 3 x 3 grid of tiles, corners included, at every level, so that a cut file is found.

        Raises:
            SlideError: One of them cannot be decoded.
        """

    def close(self) -> None:
        """Free the handle; closing twice is allowed."""
