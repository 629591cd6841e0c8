"""What the index says of one slide, and the table rows that hold it.

A slide is known by its `slide_id`. Where it lies is in `SlideLocation`, which goes only into the protected
part of the index; neither its `repr` nor any other text of this module shows a location.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from histoscale.slides.slide import MppOrigin
from histoscale.storage import ObjectInfo

SLIDES_SCHEMA = pa.schema(
    [
        ("slide_id", pa.string()),
        ("vendor", pa.string()),
        ("width_px0", pa.int64()),
        ("height_px0", pa.int64()),
        ("mpp", pa.float64()),
        ("mpp_origin", pa.string()),
        ("size_bytes", pa.int64()),
        ("level_downsamples", pa.list_(pa.float64())),
        # 64-bit offsets: the masks of an archive pass 2 GB.
        ("mask", pa.large_binary()),
        ("mask_rows", pa.int64()),
        ("mask_columns", pa.int64()),
        ("mask_px0", pa.float64()),
    ]
)
REFUSALS_SCHEMA = pa.schema([("slide_id", pa.string()), ("reason", pa.string())])
LOCATIONS_SCHEMA = pa.schema(
    [
        ("slide_id", pa.string()),
        ("root_uri", pa.string()),
        ("keys", pa.list_(pa.string())),
        ("sizes_bytes", pa.list_(pa.int64())),
        ("etags", pa.list_(pa.string())),
        ("mpp_override", pa.float64()),
    ]
)


@dataclass(frozen=True, eq=False)
class SlideRecord:
    """Geometry, optics and tissue of one slide.

    Attributes:
        slide_id: 32 hexadecimal digits, see `identity.slide_id`.
        vendor: The format's vendor as OpenSlide names it.
        width_px0: Width in level-0 px.
        height_px0: Height in level-0 px.
        mpp: Microns per level-0 px.
        mpp_origin: "vendor", "tiff" or "sidecar".
        size_bytes: Bytes of all objects of the slide.
        level_downsamples: Downsample of each pyramid level, first 1.
        mask: Tissue, bool [h, w].
        mask_px0: Level-0 px per mask px, both axes.
    """

    slide_id: str
    vendor: str
    width_px0: int
    height_px0: int
    mpp: float
    mpp_origin: MppOrigin
    size_bytes: int
    level_downsamples: tuple[float, ...]
    mask: NDArray[np.bool_] = field(repr=False)
    mask_px0: float

    @property
    def tissue_mm2(self) -> float:
        """Area of the tissue in mm2."""
        return int(self.mask.sum()) * (self.mask_px0 * self.mpp / 1000) ** 2


@dataclass(frozen=True)
class Refusal:
    """A slide that the index does not take, and why; the reason holds no name of an object."""

    slide_id: str
    reason: str


@dataclass(frozen=True)
class SlideLocation:
    """Where a slide lies: protected. Object keys are relative to `root_uri`; the first opens the slide."""

    root_uri: str = field(repr=False)
    objects: tuple[ObjectInfo, ...] = field(repr=False)
    mpp_override: float | None


@dataclass(frozen=True)
class SlideIndex:
    """All slides of an index, sorted by slide id, and what was refused.

    `snapshot_id` is a hash of the records alone: a training run depends on nothing else, so that the copies
    of one archive in a folder and in a bucket have the same snapshot under the same id key.
    """

    snapshot_id: str
    records: tuple[SlideRecord, ...] = field(repr=False)
    refusals: tuple[Refusal, ...] = field(repr=False)


def record_to_row(record: SlideRecord) -> dict[str, Any]:
    """The row of `SLIDES_SCHEMA` that holds a record; the mask as packed bits, row by row."""
    rows, columns = record.mask.shape
    scalars = {name: getattr(record, name) for name in SLIDES_SCHEMA.names if not name.startswith("mask")}
    return scalars | {
        "level_downsamples": list(record.level_downsamples),
        "mask": np.packbits(record.mask).tobytes(),
        "mask_rows": rows,
        "mask_columns": columns,
        "mask_px0": record.mask_px0,
    }


def record_from_row(row: dict[str, Any]) -> SlideRecord:
    """Inverse of `record_to_row`."""
    shape = (row["mask_rows"], row["mask_columns"])
    bits = np.unpackbits(np.frombuffer(row["mask"], np.uint8), count=shape[0] * shape[1])
    scalars = {name: row[name] for name in SLIDES_SCHEMA.names if not name.startswith("mask")}
    return SlideRecord(
        **scalars | {"level_downsamples": tuple(row["level_downsamples"])},
        mask=bits.view(np.bool_).reshape(shape),
        mask_px0=row["mask_px0"],
    )


def location_to_row(slide_id: str, location: SlideLocation) -> dict[str, Any]:
    """The row of `LOCATIONS_SCHEMA` that holds a location."""
    return {
        "slide_id": slide_id,
        "root_uri": location.root_uri,
        "keys": [info.key for info in location.objects],
        "sizes_bytes": [info.size_bytes for info in location.objects],
        "etags": [info.etag for info in location.objects],
        "mpp_override": location.mpp_override,
    }


def location_from_row(row: dict[str, Any]) -> SlideLocation:
    """Inverse of `location_to_row`, without the slide id."""
    objects = zip(row["keys"], row["sizes_bytes"], row["etags"], strict=True)
    return SlideLocation(
        root_uri=row["root_uri"],
        objects=tuple(ObjectInfo(key, size_bytes, etag) for key, size_bytes, etag in objects),
        mpp_override=row["mpp_override"],
    )
