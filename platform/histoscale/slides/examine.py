"""One slide to one record of the index: open it, verify it, find its tissue. Knows neither Ray nor storage."""

from collections.abc import Sequence
from pathlib import Path

import pydicom

from histoscale.errors import SlideError
from histoscale.slides.locate import DICOM_SUFFIX
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.records import SlideRecord
from histoscale.slides.tissue import MASK_UM_PER_PX, tissue_mask

NO_TISSUE = "no tissue found"


def examine(slide_id: str, files: Sequence[Path], *, mpp: float | None = None) -> SlideRecord:
    """Examine a slide that lies on a local disk.

    Args:
        slide_id: What the record calls it.
        files: Its files; the first opens it.
        mpp: Microns per level-0 px where the sidecar gives them.

    Raises:
        SlideError: The slide cannot be used; the reason holds no name of a file.
    """
    if files[0].suffix.lower() == DICOM_SUFFIX:
        _check_one_series(files)
    slide = open_slide(files[0], mpp=mpp)
    try:
        slide.verify()
        mask = tissue_mask(slide.thumbnail(MASK_UM_PER_PX), MASK_UM_PER_PX)
        info = slide.info
    finally:
        slide.close()
    if not mask.any():
        raise SlideError(NO_TISSUE)
    return SlideRecord(
        slide_id=slide_id,
        vendor=info.vendor,
        width_px0=info.width_px0,
        height_px0=info.height_px0,
        mpp=info.mpp,
        mpp_origin=info.mpp_origin,
        size_bytes=sum(file.stat().st_size for file in files),
        level_downsamples=info.level_downsamples,
        mask=mask,
        mask_px0=MASK_UM_PER_PX / info.mpp,
    )


def _check_one_series(files: Sequence[Path]) -> None:
    series = set()
    for file in files:
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
            series.add(str(header.SeriesInstanceUID))
        except (pydicom.errors.InvalidDicomError, AttributeError, OSError, ValueError):
            # The cause names the file, so it goes no further.
            raise SlideError("a file of its DICOM folder is not DICOM or names no series") from None
    if len(series) > 1:
        raise SlideError(
            f"its DICOM folder holds {len(series)} series",
            expected="one series per folder",
            remedy="put each series into a folder of its own",
        )
