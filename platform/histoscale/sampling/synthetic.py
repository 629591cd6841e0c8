"""Synthetic catalogues of any size: geometry, strata and masks that are functions of the row number alone.

They have what makes real archives hard: a few large sites and many small ones, scanners that only some sites have,
scales that differ between scanners, patients with one slide and patients with many.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoscale.sampling.rows import ROW_DTYPE
from histoscale.seeding import key, uniforms

_SITES, _TISSUES = 40, 17
_SCAN_MPP = np.array([0.2525, 0.25, 0.2428, 0.499, 0.4654])
_WIDTH_UM, _HEIGHT_UM = (6_000.0, 24_000.0), (5_000.0, 20_000.0)
_MASK_UM = 32.0
_SLIDES_PER_PATIENT = 3.0
_BLOBS = 3


@dataclass(frozen=True)
class SyntheticArchive:
    """A synthetic archive, of which only the masks are made when asked for.

    Attributes:
        rows: Structured array of `ROW_DTYPE`.
        seed: What tells one archive from another.
    """

    rows: NDArray[Any]
    seed: int = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the strata columns."""
        return "site", "scanner", "stain", "tissue"

    @cached_property
    def values(self) -> tuple[tuple[str, ...], ...]:
        """What the codes of each strata column stand for."""
        return (
            tuple(f"site-{number}" for number in range(_SITES)),
            tuple(f"scanner-{number}" for number in range(len(_SCAN_MPP))),
            ("H&E", "IHC"),
            tuple(f"tissue-{number}" for number in range(_TISSUES)),
        )

    def mask(self, row: int) -> NDArray[np.bool_]:
        """Tissue mask of a row: a few ellipses, bool [mask_rows, mask_columns]."""
        height, width = int(self.rows["mask_rows"][row]), int(self.rows["mask_columns"][row])
        y_H1 = (np.arange(height)[:, None] + 0.5) / height
        x_1W = (np.arange(width)[None, :] + 0.5) / width
        mask = np.zeros((height, width), bool)
        for y, x, high, wide in uniforms(key(self.seed, "archive", "mask", row), np.arange(_BLOBS), 4):
            radii = 0.08 + 0.25 * high, 0.08 + 0.25 * wide
            mask |= ((y_H1 - 0.2 - 0.6 * y) / radii[0]) ** 2 + ((x_1W - 0.2 - 0.6 * x) / radii[1]) ** 2 < 1.0
        return mask


def make_archive(slides: int, seed: int = 0) -> SyntheticArchive:
    """An archive of N slides, made in seconds for millions of them."""
    rows = np.zeros(slides, ROW_DTYPE)
    numbers = np.arange(slides, dtype=np.int64)
    patient_count = max(1, int(slides / _SLIDES_PER_PATIENT))

    def draw(what: str) -> NDArray[np.float64]:
        return uniforms(key(seed, "archive", what), numbers, 1)[:, 0]

    # Squares make some values far more frequent than others.
    patients = (draw("patient") ** 2 * patient_count).astype(np.uint32)
    sites = (uniforms(key(seed, "archive", "site"), patients.astype(np.int64), 1)[:, 0] ** 3 * _SITES).astype(np.uint32)
    scanners = (sites + (draw("scanner") < 0.1)) % len(_SCAN_MPP)
    rows["patient"] = patients
    for column, codes in enumerate((sites, scanners, draw("stain") < 0.2, draw("tissue") ** 2 * _TISSUES)):
        rows["strata"][:, column] = codes
    mpp = rows["mpp"] = _SCAN_MPP[scanners]
    for name, mask_name, (least_um, most_um) in (
        ("width_px0", "mask_columns", _WIDTH_UM),
        ("height_px0", "mask_rows", _HEIGHT_UM),
    ):
        side_um = least_um + draw(name) * (most_um - least_um)
        rows[name] = side_um / mpp
        rows[mask_name] = np.ceil(rows[name] * mpp / _MASK_UM)
    rows["mask_um"] = _MASK_UM
    rows["slide_id"] = (numbers + 1).astype(">u8").view("S8") if slides else np.zeros(0, "S8")
    rows["size_bytes"] = rows["width_px0"].astype(np.uint64) * rows["height_px0"] // 10
    return SyntheticArchive(rows, seed)
