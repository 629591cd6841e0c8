"""One open slide to one record of the index: verify it, find its tissue. Knows neither Ray nor storage."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histoscale.errors import SlideError
from histoscale.slides.likeness import look
from histoscale.slides.records import SlideRecord
from histoscale.slides.slide import Slide
from histoscale.slides.tissue import MASK_UM_PER_PX, tissue_mask

EXAMINATION_VERSION = 1
"""Higher whenever this library takes slides that it refused before: refused slides are then tried again."""

NO_TISSUE = "no tissue found"
_PICTURE_PX = 192
_PICTURE_QUALITY = 80


def examine(slide_id: str, slide: Slide, *, size_bytes: int, layout: bytes = b"", picture: bool = False) -> SlideRecord:
    """Examine an open slide: a few tiles of each level, and a thumbnail from the coarsest level that is fine enough.

    Args:
        slide_id: What the record calls it.
        slide: The slide.
        size_bytes: Bytes of its objects.
        layout: Where its tiles lie.
        picture: Whether the record gets a small picture of it.

    Raises:
        SlideError: The slide cannot be used; the reason holds no name of a file.
        StorageError: Its bytes cannot be read.
    """
    slide.verify()
    thumbnail = slide.thumbnail(MASK_UM_PER_PX)
    mask = tissue_mask(thumbnail, MASK_UM_PER_PX)
    if not mask.any():
        raise SlideError(NO_TISSUE)
    info = slide.info
    return SlideRecord(
        slide_id=slide_id,
        vendor=info.vendor,
        width_px0=info.width_px0,
        height_px0=info.height_px0,
        mpp=info.mpp,
        mpp_origin=info.mpp_origin,
        size_bytes=size_bytes,
        level_downsamples=info.level_downsamples,
        mask=mask,
        mask_px0=MASK_UM_PER_PX / info.mpp,
        mpp_conflict=info.mpp_conflict,
        layout=layout,
        look=look(thumbnail),
        picture=_picture(thumbnail) if picture else None,
    )


def _picture(thumbnail: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(thumbnail)
    image.thumbnail((_PICTURE_PX, _PICTURE_PX))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=_PICTURE_QUALITY)
    return data.getvalue()
