"""What the plan needs to know of a slide: one fixed-width row, as the catalogue of an index holds it."""

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROW_DTYPE = np.dtype(
    [
        ("slide_id", "S16"),
        ("mpp", "<f8"),
        ("width_px0", "<u4"),
        ("height_px0", "<u4"),
        ("mask_rows", "<u2"),
        ("mask_columns", "<u2"),
        ("mask_um", "<f4"),
        ("patient", "<u4"),
        ("strata", "<u4", (8,)),
        ("record_at", "<u8"),
        ("record_bytes", "<u4"),
        ("location_at", "<u8"),
        ("location_bytes", "<u4"),
        ("flags", "<u4"),
        ("size_bytes", "<u8"),
        ("record_check", "<u4"),
        ("check", "<u4"),
    ]
)
"""`slide_id`: the 16 bytes of its 32 hexadecimal digits; rows are sorted by it. `mask_um`: um per mask px. `patient`:
code of the patient; a slide of an unknown one has a code of its own. `strata[c]`: place of the slide's value in the
values of column c. `record_at` and `location_at`: bytes from the start of records.bin and locations.bin.
`record_check`: checksum of the record. `check`: checksum of the row, see `sealed`."""

COPIED = 4
"""Bit of `flags`: the slide is read through a copy."""


def sealed(rows: NDArray[Any]) -> NDArray[np.uint32]:
    """Checksum of each row without its own field: uint32 [rows]."""
    length = ROW_DTYPE.itemsize - 4
    return np.array([zlib.crc32(row.tobytes()[:length]) for row in rows], np.uint32)
