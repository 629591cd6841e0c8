"""Build the slide index: list the slides, examine each with Ray Data, commit what was found.

Names stay out of Ray's hands: Ray Data's rows hold slide ids, and the readers take the locations from the
object store, so that no row, log line or exception of Ray can show where a slide lies.
"""

import contextlib
import math
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import ray
from ray.util.annotations import RayDeprecationWarning

from histoscale.errors import HistoscaleError, SlideError, SlideIndexError
from histoscale.slides.examine import NO_TISSUE, examine
from histoscale.slides.identity import index_key, slide_id
from histoscale.slides.index import (
    HEADER,
    REFUSED,
    RefusedSlide,
    has_our_header,
    is_ours,
    make_index,
    protected,
    read_index,
    read_locations,
    write_index,
    write_refused,
)
from histoscale.slides.locate import SINGLE_FILE_SUFFIXES, LocatedSlide, locate
from histoscale.slides.records import (
    SLIDES_SCHEMA,
    Refusal,
    SlideIndex,
    SlideLocation,
    SlideRecord,
    record_from_row,
    record_to_row,
)
from histoscale.slides.sidecar import read_sidecar
from histoscale.storage import Store, join, open_store
from histoscale.storage.cache import ObjectCache, local_name

DEFAULT_SIDECAR = "slides.csv"
DEFAULT_CACHE_BYTES = 64 * 2**30
WAVE = 4096
"""Slides per Ray Data execution: bounds what the driver and each reader hold of an archive of millions."""

_CACHE_FOLDER = Path(tempfile.gettempdir()) / f"histoscale-index-{os.getuid()}"
_OUTCOME_SCHEMA = SLIDES_SCHEMA.append(pa.field("reason", pa.string()))
_TRIES = 3  # of a slide whose reader process dies: a lost node is not the slide's fault, a third death is
_CRASHED = "its reader process died"


@dataclass(frozen=True)
class IndexProgress:
    """How far an indexing is, in slides; `reused` are those that the index in place already holds."""

    total: int
    accepted: int
    refused: int
    reused: int
    slides_per_s: float

    @property
    def done(self) -> int:
        """Slides that are decided."""
        return self.accepted + self.refused + self.reused

    @property
    def eta_s(self) -> float:
        """Seconds to the end at the present rate; infinite before the first slide."""
        left = self.total - self.done
        return left / self.slides_per_s if self.slides_per_s else float("inf") if left else 0.0

    def line(self) -> str:
        """The progress as a line for a person to read."""
        eta = "" if math.isinf(self.eta_s) else f", {self.slides_per_s:.2f} slides/s, {self.eta_s:.0f} s left"
        kept = f", {self.reused} unchanged" if self.reused else ""
        return f"{self.done} of {self.total} slides: {self.accepted} accepted, {self.refused} refused{kept}{eta}"


def build_index(
    slides_uri: str,
    out_uri: str,
    *,
    sidecar: str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    connect: Callable[[], None] | None = None,
    progress: Callable[[IndexProgress], None] | None = None,
) -> SlideIndex:
    """Index the slides of a folder, a bucket's prefix or one file.

    Run again with the same places, it examines only what is new, changed or was refused.

    Args:
        slides_uri: Where the slides are; the root that slide ids are relative to (for one file: its folder).
        out_uri: Where the index goes.
        sidecar: A CSV `slide,mpp`; by default `slides.csv` of `slides_uri`, where there is one.
        cache_bytes: Disk that a reader may use for its copy of a remote slide.
        connect: Joins the cluster; called once the inputs are checked, and only where there are slides to examine.
        progress: Called after each slide.

    Raises:
        SlideIndexError: No slides, all of them refused, no tissue anywhere, or faults in the sidecar.
        StorageError: A place that cannot be read or written.
    """
    source, only = _root(slides_uri)
    slides = _slides(source)
    mpp_by_path = _read_sidecar(source, sidecar, slides)
    slides = [slide for slide in slides if only in (None, slide.path)]
    out = open_store(out_uri)
    _refuse_strangers(out)
    key = index_key(protected(out))
    paths = {slide_id(key, slide.path): slide.path for slide in slides}
    locations = {
        name: SlideLocation(source.uri, slide.objects, mpp_by_path.get(slide.path))
        for name, slide in zip(paths, slides, strict=True)
    }
    reused = _reusable(out, locations)
    if connect is not None and len(reused) < len(locations):
        connect()
    found = _examine_all(locations, reused, cache_bytes, progress)
    refusals = [Refusal(name, reason) for name, reason in found.reasons.items()]
    refused = [RefusedSlide(refusal, join(source.uri, paths[refusal.slide_id])) for refusal in refusals]
    write_refused(out, refused)
    if not found.records:
        raise _nothing_accepted(refusals)
    index = make_index(found.records, refusals)
    write_index(out, index, locations)
    return index


def _refuse_strangers(out: Store) -> None:
    """An index is written only where nothing is, or where an index is; never over a run or an export."""
    strangers = [info.key for info in out.list() if not is_ours(info.key)]
    if strangers or (out.exists(HEADER) and not has_our_header(out)):
        raise SlideIndexError(
            f"{out.uri} holds something else than an index",
            expected="an empty place or that of an earlier index",
            remedy="give another place with --out",
        )


def _root(slides_uri: str) -> tuple[Store, str | None]:
    """The store that slides are listed in, and the path of the only one wanted where the URI names one."""
    root, _, name = slides_uri.rstrip("/").rpartition("/")
    if root and PurePosixPath(name).suffix.lower() in SINGLE_FILE_SUFFIXES:
        parent = open_store(root, private=True)
        if parent.exists(name):
            return parent, name
    return open_store(slides_uri, private=True), None


def _slides(source: Store) -> Sequence[LocatedSlide]:
    located = locate(source.list())
    if not located.slides:
        raise SlideIndexError(
            "no slides found",
            value=f"{located.ignored} other objects",
            expected=f"objects ending in {' '.join(SINGLE_FILE_SUFFIXES)}, or folders of .dcm",
            remedy="give the folder, the bucket's prefix or the file that holds slides",
        )
    return located.slides


def _read_sidecar(source: Store, sidecar: str | None, slides: Sequence[LocatedSlide]) -> dict[str, float]:
    if sidecar is None:
        if not source.exists(DEFAULT_SIDECAR):
            return {}
        return read_sidecar(source.get(DEFAULT_SIDECAR), slides)
    folder, _, name = sidecar.rpartition("/")
    store = open_store(folder or ("/" if sidecar.startswith("/") else "."))
    if not store.exists(name):
        raise SlideIndexError(
            "the sidecar CSV is not there", expected="the path or URI of a CSV with the columns slide,mpp"
        )
    return read_sidecar(store.get(name), slides)


def _reusable(out: Store, locations: Mapping[str, SlideLocation]) -> list[SlideRecord]:
    """Records of the index in place whose objects and sidecar entry are what they were."""
    try:
        records, before = read_index(out).records, read_locations(out)
    except SlideIndexError:
        # None yet, of another version, or torn: this run replaces it.
        return []
    return [
        record
        for record in records
        if record.slide_id in locations and before.get(record.slide_id) == locations[record.slide_id]
    ]


@dataclass(frozen=True)
class _Found:
    records: list[SlideRecord]
    reasons: dict[str, str]


def _examine_all(
    locations: Mapping[str, SlideLocation],
    reused: Sequence[SlideRecord],
    cache_bytes: int,
    progress: Callable[[IndexProgress], None] | None,
) -> _Found:
    found = _Found(list(reused), {})
    kept = {record.slide_id for record in reused}
    pending = [name for name in locations if name not in kept]
    start_s = time.monotonic()

    def tell() -> None:
        new = len(found.records) - len(reused)
        elapsed_s = time.monotonic() - start_s
        rate = (new + len(found.reasons)) / elapsed_s if elapsed_s else 0.0
        if progress is not None:
            progress(IndexProgress(len(locations), new, len(found.reasons), len(reused), rate))

    tell()
    for first in range(0, len(pending), WAVE):
        wave = {name: locations[name] for name in pending[first : first + WAVE]}
        for row in _outcomes(wave, cache_bytes):
            name, reason = row["slide_id"], row.pop("reason")
            del wave[name]
            if reason is None:
                found.records.append(record_from_row(row))
            else:
                found.reasons[name] = reason
            tell()
        for name in wave:
            found.reasons[name] = _CRASHED
            tell()
    return found


def _outcomes(wave: Mapping[str, SlideLocation], cache_bytes: int) -> Iterator[dict[str, Any]]:
    """Rows of `_OUTCOME_SCHEMA` as they come; none for a slide that its reader process did not survive."""
    context = ray.data.DataContext.get_current().copy()
    context.max_errored_blocks = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray 2.60 calls the two limits on retries deprecated and has no other name for them yet.
    with (
        ray.data.DataContext.current(context),
        warnings.catch_warnings(category=RayDeprecationWarning, action="ignore"),
    ):
        dataset = ray.data.from_items([{"slide_id": name} for name in wave], override_num_blocks=len(wave))
        outcomes = dataset.map_batches(
            _Examiner,
            fn_constructor_args=(ray.put(dict(wave)), cache_bytes),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=len(wave)),
            num_cpus=1,
            max_restarts=-1,
            max_task_retries=_TRIES - 1,
        )
    tables: Iterator[pa.Table] = iter(outcomes.iter_batches(batch_size=None, batch_format="pyarrow"))
    for table in tables:
        yield from table.to_pylist()


class _Examiner:
    """An actor that turns slide ids into records or reasons."""

    def __init__(self, locations: "ray.ObjectRef[dict[str, SlideLocation]]", cache_bytes: int) -> None:
        self._locations = ray.get(locations)
        self._cache_bytes = cache_bytes

    def __call__(self, batch: pa.Table) -> pa.Table:
        names = batch["slide_id"].to_pylist()
        rows = [outcome(name, self._locations[name], self._cache_bytes) for name in names]
        return pa.Table.from_pylist(rows, schema=_OUTCOME_SCHEMA)


def outcome(name: str, location: SlideLocation, cache_bytes: int) -> dict[str, Any]:
    """The record of a slide as a row, or its id and the reason why there is none; never raises."""
    try:
        return record_to_row(_examine(name, location, cache_bytes)) | {"reason": None}
    except HistoscaleError as error:
        reason = _without_names(str(error), location)
    # Whatever a reader raises on a broken file is the slide's fault, never the indexing's, and its text may
    # hold a name, so only its type goes on.
    except Exception as error:  # noqa: BLE001
        reason = f"reading it failed with {type(error).__name__}"
    return {"slide_id": name, "reason": reason}


def _examine(name: str, location: SlideLocation, cache_bytes: int) -> SlideRecord:
    if any(not _is_utf8(info.key) for info in location.objects):
        raise SlideError("its name is not UTF-8", remedy="rename the file or its folder")
    store = open_store(location.root_uri, private=True)
    # A cache for one slide: no slide is read twice, and Ray ends its actors without a chance to clean up.
    with (
        contextlib.closing(ObjectCache(_CACHE_FOLDER, cache_bytes)) as cache,
        cache.lease(store, location.objects, name) as folder,
    ):
        files = [folder / local_name(number, info.key) for number, info in enumerate(location.objects)]
        return examine(name, files, mpp=location.mpp_override)


def _is_utf8(key: str) -> bool:
    # A folder's names may be any bytes; Python holds the odd ones as lone surrogates, which no table can.
    return key.encode(errors="replace").decode() == key


def _without_names(text: str, location: SlideLocation) -> str:
    """A reason without the root it came from; nothing of it where it holds the name of an object."""
    if any(PurePosixPath(info.key).name in text for info in location.objects):
        return "it cannot be read"
    return text.replace(location.root_uri, "SLIDES").removesuffix(".")


def _nothing_accepted(refusals: Sequence[Refusal]) -> SlideIndexError:
    look = f"protected/{REFUSED} of the index has the slides by name"
    reasons = Counter(refusal.reason for refusal in refusals)
    if set(reasons) == {NO_TISSUE}:
        return SlideIndexError(
            "no tissue anywhere", value=f"{len(refusals)} slides", expected="tissue in one of them", remedy=look
        )
    counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    return SlideIndexError(f"all {len(refusals)} slides are refused: {counts}", remedy=look)
