"""The marker of an export: `export.json`, written last, which says whose weights a folder holds.

A folder without it is no export, or one that was interrupted; `export.pending.json` says whose it will be, so that the
same command may finish it, and no other.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from histoscale.errors import ExportError
from histoscale.storage import Store

FORMAT_VERSION = 2
MARKER, PENDING = "export.json", "export.pending.json"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_NAMES = (
    WEIGHTS,
    CONFIG,
    CARD,
    "LICENSE",
    "parity.json",
    "preprocessor_config.json",
    "vit.py",
    "use_with_trident.py",
    "use_with_eva.py",
    "eva.yaml",
)


@dataclass(frozen=True)
class Marker:
    """What an export says of itself.

    Attributes:
        layout: One of `FORMATS`.
        arch: Name of the backbone's shape.
        image_px: Side of the images that it was trained at.
        qk_norm: Whether it normalises queries and keys.
        recipe: Fingerprint of the run's recipe.
        snapshot: Of the slide index; "" where the run records none.
        step: Optimiser steps of the checkpoint.
        images_seen: Tiles that entered them.
        teacher: Fingerprint of the frozen teacher, where there is one.
        licence: Under which the weights are given away, as whoever exported them says; None where nobody said it.
        origins: Lines on the weights that the run learnt from, without paths.
        sha256: Of each file beside it.
    """

    layout: str
    arch: str
    image_px: int
    qk_norm: bool
    recipe: str
    snapshot: str
    step: int
    images_seen: int
    teacher: str | None
    licence: str | None
    origins: tuple[str, ...]
    sha256: dict[str, str]

    @property
    def model(self) -> tuple[object, ...]:
        """What an export that takes the place of this one must have in common with it."""
        return self.layout, self.recipe, self.snapshot, self.teacher

    @property
    def version(self) -> str:
        """Names the weights among all exports: recipe, step and the start of their SHA-256."""
        return f"{self.recipe}@{self.step}-{self.sha256.get(WEIGHTS, '')[:12]}"


def publish(out: Store, folder: Path, marker: Marker) -> Marker:
    """Move the files of a local folder to where the export goes, its marker last; gives it with their checksums.

    Raises:
        ExportError: The place holds something else, or the export of another model.
        StorageError: It cannot be written.
    """
    require_own_place(out, marker)
    names = sorted(path.name for path in folder.iterdir())
    finished = replace(marker, sha256={name: sha256_of(folder / name) for name in names})
    out.put(PENDING, _encode(marker))
    out.delete(MARKER)
    for name in names:
        out.upload(folder / name, name)
    for info in list(out.list()):
        if info.key not in (*names, PENDING):  # of the export that this one replaces: see `require_own_place`
            out.delete(info.key)
    out.put(MARKER, _encode(finished))
    out.delete(PENDING)
    return finished


def require_own_place(out: Store, marker: Marker) -> None:
    """Refuse a place that holds anything but an earlier export of the same model, finished or not.

    Raises:
        ExportError: It does.
    """
    keys = [info.key for info in out.list()]
    if not keys:
        return
    found = next((_decode(out.get(name)) for name in (MARKER, PENDING) if name in keys), None)
    known = {*(found.sha256 if found else ()), *_NAMES, MARKER, PENDING}
    stranger = next((key for key in keys if key not in known), None)
    if found is None or stranger is not None:
        raise ExportError(
            f"{out.uri} holds something else than an export",
            value=stranger or keys[0],
            expected="an empty folder or an earlier export of the same run, which is overwritten",
            remedy="give another place with --out",
        )
    if found.model != marker.model:
        raise ExportError(
            f"{out.uri} holds the export of another model",
            value=f"recipe {found.recipe}, {found.layout}, index {found.snapshot or 'unknown'}",
            expected=f"an export of recipe {marker.recipe}, {marker.layout}, index {marker.snapshot or 'unknown'}",
            remedy="give another place with --out",
        )


def read_marker(store: Store) -> Marker | None:
    """The marker of a finished export; None where there is none, or one that is damaged or of another version."""
    return _decode(store.get(MARKER)) if store.exists(MARKER) else None


def version_of(store: Store) -> object:
    """The format that a marker names, whatever else is in it; None where there is no marker."""
    if not store.exists(MARKER):
        return None
    try:
        values = json.loads(store.get(MARKER))
    except ValueError:
        return None
    return values.get("format") if isinstance(values, dict) else None


def _encode(marker: Marker) -> bytes:
    return (json.dumps({"format": FORMAT_VERSION, **asdict(marker)}, indent=1) + "\n").encode()


def _decode(data: bytes) -> Marker | None:
    try:
        values: dict[str, Any] = json.loads(data)
        if values.pop("format") != FORMAT_VERSION:
            return None
        origins, sha256 = (str(line) for line in values.pop("origins")), dict(values.pop("sha256"))
        return Marker(**values, origins=tuple(origins), sha256=sha256)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def sha256_of(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
