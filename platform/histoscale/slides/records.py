"""What the index says of one slide, and the table rows that hold it.

A slide is known by its `slide_id`. Where it lies is in `SlideLocation`, which goes only into the protected
part of the index; neither its `repr` nor any other text of this module shows a location.
"""

import hashlib
import json
import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from histoscale.slides.slide import MppOrigin
from histoscale.storage import ObjectInfo

EXAMINED_SCHEMA = pa.schema(
    [
        ("slide_id", pa.string()),
        ("vendor", pa.string()),
        ("width_px0", pa.int64()),
        ("height_px0", pa.int64()),
        ("mpp", pa.float64()),
        ("mpp_origin", pa.string()),
        ("mpp_conflict", pa.float64()),
        ("size_bytes", pa.int64()),
        ("level_downsamples", pa.list_(pa.float64())),
        ("mask", pa.binary()),
        ("mask_sha256", pa.string()),
        ("mask_rows", pa.int64()),
        ("mask_columns", pa.int64()),
        ("mask_px0", pa.float64()),
        ("tissue_px", pa.int64()),
        ("layout", pa.binary()),
        ("look", pa.uint64()),
        ("picture", pa.binary()),
        ("fingerprint", pa.binary()),
    ]
)
"""What the examination of a slide finds: a function of its bytes and the scale given for it.

`mask` holds zlib-packed bits, `mask_sha256` the hash of the bits, `fingerprint` a keyed hash of what was examined:
object names, ETags, sizes and the scale that the user gives.
"""

SLIDES_SCHEMA = (
    EXAMINED_SCHEMA.append(pa.field("patient", pa.string()))
    .append(pa.field("strata", pa.list_(pa.string())))
    .append(pa.field("duplicate_of", pa.string()))
)
REFUSALS_SCHEMA = pa.schema(
    [("slide_id", pa.string()), ("reason", pa.string()), ("fingerprint", pa.binary()), ("version", pa.int64())]
)
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
_MET = re.compile(r" ?\(got (?:'[^']*'|\"[^\"]*\"|[^;()]*)(?:\)|(; ))")
_PACKED = (
    "fingerprint",
    "mask",
    "mask_sha256",
    "mask_rows",
    "mask_columns",
    "tissue_px",
    "level_downsamples",
    "strata",
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
        mpp_conflict: Microns per level-0 px of another origin that differs from `mpp`, if there is one.
        layout: Where the slide's tiles lie in its objects (`SlideLayout.to_bytes()`); empty where it is read from
            a copy.
        look: Perceptual hash of its thumbnail, see `likeness.look`.
        picture: A small JPEG of the whole slide, for a sample of the slides.
        patient: Keyed id of the patient, where the user gives one: 32 hexadecimal digits.
        strata: Values of the snapshot's strata columns, in their order.
        duplicate_of: Id of a slide that this one is probably a copy or a rescan of.
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
    mpp_conflict: float | None = None
    layout: bytes = field(default=b"", repr=False)
    look: int = 0
    picture: bytes | None = field(default=None, repr=False)
    patient: str | None = None
    strata: tuple[str, ...] = ()
    duplicate_of: str | None = None

    @property
    def tissue_mm2(self) -> float:
        """Area of the tissue in mm2."""
        return int(self.mask.sum()) * (self.mask_px0 * self.mpp / 1000) ** 2


@dataclass(frozen=True)
class Refusal:
    """A slide that the index does not take, and why; the reason holds no name of an object."""

    slide_id: str
    reason: str


def kind_of(reason: str) -> str:
    """A reason without the value that was met, so that the reasons of many slides can be counted."""
    return _MET.sub(lambda match: " (" if match[1] else "", reason)


@dataclass(frozen=True)
class SlideLocation:
    """Where a slide lies: protected. Object keys are relative to `root_uri`; the first opens the slide."""

    root_uri: str = field(repr=False)
    objects: tuple[ObjectInfo, ...] = field(repr=False)
    mpp_override: float | None

    def to_bytes(self) -> bytes:
        """Compact form for the blob of locations."""
        objects = [[info.key, info.size_bytes, info.etag] for info in self.objects]
        return zlib.compress(json.dumps([self.root_uri, objects, self.mpp_override], separators=(",", ":")).encode())

    @classmethod
    def from_bytes(cls, data: bytes) -> "SlideLocation":
        """Inverse of `to_bytes`.

        Raises:
            ValueError: Not a location.
        """
        try:
            root_uri, objects, mpp_override = json.loads(zlib.decompress(data))
            return cls(root_uri, tuple(ObjectInfo(*entry) for entry in objects), mpp_override)
        except (zlib.error, TypeError) as error:
            raise ValueError("not a location") from error


@dataclass(frozen=True)
class SlideIndex:
    """All slides of a snapshot, sorted by slide id, and what was refused: for archives that fit into memory.

    `snapshot_id` is a hash of the records alone: a training run depends on nothing else, so that the copies
    of one archive in a folder and in a bucket have the same snapshot under the same id key.
    """

    snapshot_id: str
    records: tuple[SlideRecord, ...] = field(repr=False)
    refusals: tuple[Refusal, ...] = field(repr=False)
    columns: tuple[str, ...] = ()


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """A mask as zlib-packed bits, row by row."""
    return zlib.compress(np.packbits(mask).tobytes())


def unpack_mask(data: bytes, rows: int, columns: int) -> NDArray[np.bool_]:
    """Inverse of `pack_mask`, bool [rows, columns].

    Raises:
        ValueError: Not a mask of this size.
    """
    length = (rows * columns + 7) // 8
    unpacker = zlib.decompressobj()
    try:
        # Bounded: a damaged blob must not fill the memory.
        packed = unpacker.decompress(data, length)
    except zlib.error as error:
        raise ValueError("not a mask") from error
    if len(packed) != length or unpacker.unconsumed_tail:
        raise ValueError("not a mask of this size")
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=rows * columns).view(np.bool_).reshape(rows, columns)


def record_to_row(record: SlideRecord) -> dict[str, Any]:
    """The row of `SLIDES_SCHEMA` that holds a record, with no fingerprint."""
    rows, columns = record.mask.shape
    scalars = {name: getattr(record, name) for name in SLIDES_SCHEMA.names if name not in _PACKED}
    return scalars | {
        "fingerprint": None,
        "level_downsamples": list(record.level_downsamples),
        "mask": pack_mask(record.mask),
        # Of the bits, for another version of zlib packs them otherwise.
        "mask_sha256": hashlib.sha256(np.packbits(record.mask).tobytes()).hexdigest(),
        "mask_rows": rows,
        "mask_columns": columns,
        "tissue_px": int(record.mask.sum()),
        "strata": list(record.strata),
    }


def record_from_row(row: dict[str, Any]) -> SlideRecord:
    """Inverse of `record_to_row`.

    Raises:
        ValueError: The mask is damaged.
    """
    scalars = {name: row[name] for name in SLIDES_SCHEMA.names if name not in _PACKED}
    return SlideRecord(
        **scalars,
        level_downsamples=tuple(row["level_downsamples"]),
        mask=unpack_mask(row["mask"], row["mask_rows"], row["mask_columns"]),
        strata=tuple(row["strata"]),
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
