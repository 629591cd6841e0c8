"""The folder of the embeddings of many slides: one model, one tiling; what is done, what was left out and why.

embeddings.json   what decides the numbers, its fingerprint, the snapshots of the index, counts; written first
<slide id>.h5     see `files`
left_out.jsonl    slide id and reason of every slide without a file
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histoscale.embeddings.files import FORMAT, SUFFIX, VERSION
from histoscale.embeddings.spec import EmbeddingSpec
from histoscale.errors import EmbeddingError
from histoscale.storage import Store
from histoscale.storage.json_object import count_of, read_json, text_of

MANIFEST, LEFT_OUT = "embeddings.json", "left_out.jsonl"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_SAME = ("mpp", "width_px0", "height_px0", "mask_um", "size_bytes", "record_check")
"""Columns of the catalogue that decide which tiles a slide has, and that change where its file does."""


@dataclass(frozen=True)
class LeftOut:
    """A slide without embeddings; `is_bad`: it should have had some."""

    slide_id: str
    reason: str
    is_bad: bool


@dataclass(frozen=True)
class Folder:
    """What the manifest of a folder says.

    Attributes:
        fingerprint: Of what decides the numbers.
        facts: All of that, by name.
        snapshots: Snapshots of the index that its files were made from, the newest last.
        is_complete: Whether the last job came to its end.
        slides: Files, when it did.
        left_out: Slides without a file.
    """

    fingerprint: str
    facts: dict[str, Any]
    snapshots: tuple[str, ...]
    is_complete: bool = False
    slides: int = 0
    left_out: int = 0

    def to_json(self) -> bytes:
        """The content of the manifest."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            **self.facts,
            "snapshots": self.snapshots,
            "complete": self.is_complete,
            "slides": self.slides,
            "left_out": self.left_out,
        }
        return json.dumps(content, indent=1).encode()


def read_folder(store: Store) -> Folder:
    """The manifest of a folder of embeddings.

    Raises:
        EmbeddingError: There is none, or it is damaged or of another version.
        StorageError: It cannot be read.
    """
    if not store.exists(MANIFEST):
        raise EmbeddingError(
            f"{store.uri} holds no embeddings",
            expected=f"a folder with {MANIFEST}, as jobs/embed.py names it at its end",
            remedy="run jobs/embed.py first, or give the features_... folder below its --out",
        )
    return read_json(
        store,
        MANIFEST,
        _decode,
        kind=EmbeddingError,
        what=f"{MANIFEST} of {store.uri} is damaged or of another version",
        expected=f"format {FORMAT}, version {VERSION}",
        remedy="embed the slides into another place",
    )


def require_name(name: str) -> None:
    """Refuse a name that cannot be a part of a key.

    Raises:
        EmbeddingError: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise EmbeddingError("--name is no name", value=name, expected="letters, digits, '-', '_' and '.'")


def files_of(store: Store) -> set[str]:
    """Ids of the slides that have a file."""
    return {info.key.removesuffix(SUFFIX) for info in store.list() if info.key.endswith(SUFFIX) and "/" not in info.key}


def begin(store: Store, spec: EmbeddingSpec, snapshot_id: str) -> tuple[Folder, set[str]]:
    """Make a folder, or go on with one that was begun; gives its manifest and the ids of the slides that have a file.

    Raises:
        EmbeddingError: It holds other embeddings, or something else.
        StorageError: It cannot be read or written.
    """
    done = files_of(store)
    if not store.exists(MANIFEST):
        if done:
            raise EmbeddingError(
                f"{store.uri} holds {SUFFIX} files of somebody else",
                value=f"{len(done)} files and no {MANIFEST}",
                expected="an empty place, or one where jobs/embed.py was before",
                remedy="give another --out, or another --name",
            )
        folder = Folder(spec.fingerprint, spec.facts(), (snapshot_id,))
    else:
        folder = _going_on(store, read_folder(store), spec, snapshot_id)
    store.put(MANIFEST, folder.to_json())
    return folder, done


def unchanged(done: Iterable[str], now: NDArray[Any], before: Sequence[NDArray[Any]]) -> set[str]:
    """Those of the slides whose files still hold: their rows are the same in every snapshot that has them.

    Args:
        done: Slides with a file.
        now: Rows of the catalogue that is embedded.
        before: Rows of the catalogues of the folder's other snapshots.
    """
    left = set(done)
    current = _by_id(now)
    for rows in before:
        past = _by_id(rows)
        left = {name for name in left if name not in past or name not in current or past[name] == current[name]}
    return left


def write_left_out(store: Store, left_out: Iterable[LeftOut]) -> None:
    """Write which slides have no file, and why: a line of JSON for each."""
    lines = [
        json.dumps({"slide_id": each.slide_id, "reason": each.reason, "bad": each.is_bad})
        for each in sorted(left_out, key=lambda each: each.slide_id)
    ]
    store.put(LEFT_OUT, "".join(f"{line}\n" for line in lines).encode())


def _by_id(rows: NDArray[Any]) -> dict[str, tuple[Any, ...]]:
    names = [bytes(name).ljust(16, b"\0").hex() for name in rows["slide_id"]]
    columns = [np.asarray(rows[column]).tolist() for column in _SAME]
    return dict(zip(names, zip(*columns, strict=True), strict=True))


def _going_on(store: Store, folder: Folder, spec: EmbeddingSpec, snapshot_id: str) -> Folder:
    if folder.fingerprint != spec.fingerprint:
        facts = spec.facts()
        differing = [name for name in facts if facts[name] != folder.facts.get(name)]
        raise EmbeddingError(
            f"{store.uri} holds other embeddings",
            value=", ".join(f"{name} {facts[name]}" for name in differing),
            expected=", ".join(f"{name} {folder.facts.get(name)}" for name in differing),
            remedy="give what it was begun with to go on, or another --out or --name for embeddings beside it",
        )
    earlier = tuple(each for each in folder.snapshots if each != snapshot_id)
    return Folder(folder.fingerprint, folder.facts, (*earlier, snapshot_id))


def _decode(content: Any) -> Folder:  # noqa: ANN401 - whatever JSON holds
    if content.pop("format") != FORMAT or content.pop("version") != VERSION:
        raise ValueError("another format")
    fingerprint, snapshots = text_of(content.pop("fingerprint")), tuple(map(text_of, content.pop("snapshots")))
    slides, left_out = count_of(content.pop("slides")), count_of(content.pop("left_out"))
    is_complete = bool(content.pop("complete"))
    return Folder(fingerprint, content, snapshots, is_complete, slides, left_out)
