"""Build the slide index: list the slides, examine each with Ray Data, commit what was found.

Names stay out of Ray's hands: Ray Data's rows hold slide ids, and the readers take the locations from the
object store, so that no row, log line or exception of Ray can show where a slide lies.
"""

import heapq
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import ray
from ray.util.annotations import RayDeprecationWarning

from histoscale.errors import HistoscaleError, SlideError, SlideIndexError, StorageError
from histoscale.slides.archive import Archive, describe_slides, list_slides, read_tables
from histoscale.slides.commit import commit
from histoscale.slides.examine import EXAMINATION_VERSION, NO_TISSUE, examine
from histoscale.slides.external_sort import SlideSorter
from histoscale.slides.gather import Gathering, forget_pending
from histoscale.slides.identity import KEY_OBJECT, index_key
from histoscale.slides.index import RefusedSlide, write_refused
from histoscale.slides.opening import open_located
from histoscale.slides.pending import Spill
from histoscale.slides.progress import IndexProgress
from histoscale.slides.records import EXAMINED_SCHEMA, Refusal, SlideLocation, SlideRecord, kind_of, record_to_row
from histoscale.slides.snapshot import (
    HEADER,
    PROTECTED,
    REFUSED,
    Snapshot,
    has_our_header,
    is_ours,
    protected,
)
from histoscale.slides.strata import parse_pattern
from histoscale.slides.table_cache import TableCache
from histoscale.storage import Store, open_store
from histoscale.storage.ranges import RangeReader, open_ranges

DEFAULT_CACHE_BYTES = 64 * 2**30
WAVE = 4096
"""Slides per Ray Data execution: bounds what the driver and each reader hold of an archive of millions."""
PICTURES = 64
"""Slides of which a small picture is kept, for the report; chosen by their ids, which are random."""

_CACHE_FOLDER = Path(tempfile.gettempdir()) / f"histoscale-index-{os.getuid()}"
_TABLES_BYTES = 8 * 2**20
_OUTCOME_SCHEMA = EXAMINED_SCHEMA.append(pa.field("reason", pa.string())).append(pa.field("unreachable", pa.bool_()))
_TRIES = 3  # of a slide whose reader process dies: a lost node is not the slide's fault, a third death is
_ROUNDS = 2  # over slides that the storage did not give, beside the storage layer's own retries
_CRASHED = "its reader process died"


def build_index(
    slides_uri: str,
    out_uri: str,
    *,
    sidecar: str | None = None,
    strata: Sequence[str] = (),
    pattern: str | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    connect: Callable[[], None] | None = None,
    progress: Callable[[IndexProgress], None] | None = None,
) -> Snapshot:
    """Index the slides of a folder, a bucket's prefix or one file.

    Run again with the same places, it examines only what is new or has changed, and what the storage did not give;
    killed, it goes on where it was.

    Args:
        slides_uri: Where the slides are; the root that slide ids are relative to (for one file: its folder).
        out_uri: Where the index goes.
        sidecar: A CSV `slide,mpp` and strata; by default `slides.csv` of `slides_uri`, where there is one.
        strata: CSV files `slide` and strata; the first that says something wins, and all over the sidecar.
        pattern: A regular expression on paths whose named groups are strata.
        cache_bytes: Disk of a node for copies of remote slides, which its readers share.
        connect: Joins the cluster; called once the inputs are checked, and only where there are slides to examine.
        progress: Called after each slide.

    Raises:
        SlideIndexError: No slides, none of them accepted, or faults in what the user says of them.
        StorageError: A place that cannot be read or written.
    """
    parsed = None if pattern is None else parse_pattern(pattern)
    source = list_slides(slides_uri)
    out = open_store(out_uri)
    has_ids = protected(out).exists(KEY_OBJECT)
    tables = read_tables(source, sidecar, strata, index_key(protected(out)) if has_ids else None)
    refuse_strangers(out)
    archive = describe_slides(source, index_key(protected(out)), tables, parsed)
    with tempfile.TemporaryDirectory(prefix="histoscale-sort-") as folder:
        sorter = SlideSorter(Path(folder), len(archive.slides))
        found = Gathering(archive, sorter)
        found.take_earlier(out)
        if connect is not None and found.left:
            connect()
        unreachable = _examine_left(archive, found, out, cache_bytes, progress)
        refusals = [Refusal(name, row["reason"]) for name, row in found.refusals.items()]
        lost = [Refusal(name, f"unreachable: {reason}") for name, reason in unreachable.items()]
        write_refused(out, [RefusedSlide(refusal, archive.uri(refusal.slide_id)) for refusal in refusals + lost])
        if not found.accepted:
            raise _nothing_accepted(refusals, lost)
        snapshot = commit(out, sorter, list(found.refusals.values()), archive.about(), unreachable=len(unreachable))
    forget_pending(out, found.pending)
    return snapshot


def refuse_strangers(out: Store) -> None:
    """Refuse to write where something else than an index is, such as a run or an export.

    Raises:
        SlideIndexError: The place holds something else.
    """
    strangers = any(not is_ours(info.key) for info in out.list())
    if strangers or (out.exists(HEADER) and not has_our_header(out)):
        raise SlideIndexError(
            f"{out.uri} holds something else than an index of this version",
            expected="an empty place or that of an earlier index",
            remedy="give another place with --out",
        )


class _Meter:
    """Counts outcomes and tells the user."""

    def __init__(self, total: int, reused: int, tell: Callable[[IndexProgress], None] | None) -> None:
        self._total, self._reused, self._tell = total, reused, tell
        self._start_s = time.monotonic()
        self.accepted = self.refused = self.unreachable = 0

    def tell(self) -> None:
        """Say how far it is."""
        if self._tell is None:
            return
        elapsed_s = time.monotonic() - self._start_s
        rate = (self.accepted + self.refused) / elapsed_s if elapsed_s else 0.0
        self._tell(IndexProgress(self._total, self.accepted, self.refused, self._reused, rate, self.unreachable))


def _examine_left(
    archive: Archive,
    found: Gathering,
    out: Store,
    cache_bytes: int,
    progress: Callable[[IndexProgress], None] | None,
) -> dict[str, str]:
    """Examine the slides without an outcome; slide id -> reason of those that the storage did not give."""
    meter = _Meter(len(archive.slides), len(archive.slides) - len(found.left), progress)
    meter.tell()
    pictured = frozenset(heapq.nsmallest(PICTURES, archive.slides))
    spill = Spill(out, found.take)
    names = list(found.left)
    unreachable: dict[str, str] = {}
    for _ in range(_ROUNDS):
        unreachable = {}
        meter.unreachable = 0
        for first in range(0, len(names), WAVE):
            wave = {name: archive.location(name) for name in names[first : first + WAVE]}
            for row in _decided(wave, pictured, cache_bytes):
                if row.pop("unreachable"):
                    unreachable[row["slide_id"]] = row["reason"]
                    meter.unreachable += 1
                else:
                    row |= {"fingerprint": found.fingerprint(row["slide_id"]), "version": EXAMINATION_VERSION}
                    spill.add(row)
                    meter.refused += row["reason"] is not None
                    meter.accepted += row["reason"] is None
                meter.tell()
        names = list(unreachable)
        if not names:
            break
    spill.flush()
    found.pending += spill.keys
    return unreachable


def _decided(wave: Mapping[str, SlideLocation], pictured: frozenset[str], cache_bytes: int) -> Iterator[dict[str, Any]]:
    """A row of `_OUTCOME_SCHEMA` for every slide of a wave; a slide that kills its reader process is refused."""
    left = dict(wave)
    for row in _outcomes(wave, pictured, cache_bytes):
        del left[row["slide_id"]]
        yield row
    for name in left:
        yield _refused(name, _CRASHED)


def _outcomes(
    wave: Mapping[str, SlideLocation], pictured: frozenset[str], cache_bytes: int
) -> Iterator[dict[str, Any]]:
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
            fn_constructor_args=(ray.put(dict(wave)), pictured, cache_bytes),
            batch_size=1,
            batch_format="pyarrow",
            # One slide at a time: one that kills its reader, or takes long, must not take others with it.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=len(wave), max_tasks_in_flight_per_actor=1),
            num_cpus=1,
            max_restarts=-1,
            max_task_retries=_TRIES - 1,
        )
    # Prefetching would hold an outcome back until the next one comes, and a kill would lose it.
    tables: Iterator[pa.Table] = iter(
        outcomes.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    )
    for table in tables:
        yield from table.to_pylist()


class _Examiner:
    """An actor that turns slide ids into records or reasons."""

    def __init__(
        self, locations: "ray.ObjectRef[dict[str, SlideLocation]]", pictured: frozenset[str], cache_bytes: int
    ) -> None:
        self._locations = ray.get(locations)
        self._pictured = pictured
        self._cache_bytes = cache_bytes

    def __call__(self, batch: pa.Table) -> pa.Table:
        names = batch["slide_id"].to_pylist()
        rows = [outcome(name, self._locations[name], self._cache_bytes, name in self._pictured) for name in names]
        return pa.Table.from_pylist(rows, schema=_OUTCOME_SCHEMA)


def outcome(name: str, location: SlideLocation, cache_bytes: int, picture: bool = False) -> dict[str, Any]:
    """The record of a slide as a row, or its id and the reason why there is none; never raises.

    A fault of the storage says nothing of the slide: the row is then marked `unreachable`.
    """
    try:
        return record_to_row(_examine(name, location, cache_bytes, picture)) | {"reason": None, "unreachable": False}
    except StorageError as error:
        return _refused(name, _without_names(str(error), location)) | {"unreachable": True}
    except HistoscaleError as error:
        return _refused(name, _without_names(str(error), location))
    # Whatever a reader raises on a broken file is the slide's fault, never the indexing's, and its text may
    # hold a name, so only its type goes on.
    except Exception as error:  # noqa: BLE001
        return _refused(name, f"reading it failed with {type(error).__name__}")


def _refused(name: str, reason: str) -> dict[str, Any]:
    return {"slide_id": name, "reason": reason, "unreachable": False}


def _examine(name: str, location: SlideLocation, cache_bytes: int, picture: bool) -> SlideRecord:
    if any(not _is_utf8(info.key) for info in location.objects):
        raise SlideError("its name is not UTF-8", remedy="rename the file or its folder")
    tables = TableCache(_TABLES_BYTES)
    with open_located(location, _ranges(location.root_uri), tables, _CACHE_FOLDER, cache_bytes) as opened:
        size_bytes = sum(info.size_bytes for info in location.objects)
        return examine(name, opened.slide, size_bytes=size_bytes, layout=opened.layout, picture=picture)


@lru_cache(maxsize=4)
def _ranges(root_uri: str) -> RangeReader:
    return open_ranges(root_uri)


def _is_utf8(key: str) -> bool:
    # A folder's names may be any bytes; Python holds the odd ones as lone surrogates, which no table can.
    return key.encode(errors="replace").decode() == key


def _without_names(text: str, location: SlideLocation) -> str:
    """A reason without the root it came from; nothing of it where it holds the name of an object."""
    if any(PurePosixPath(info.key).name in text for info in location.objects):
        return "it cannot be read"
    return text.replace(location.root_uri, "SLIDES").removesuffix(".")


def _nothing_accepted(refusals: Sequence[Refusal], unreachable: Sequence[Refusal]) -> SlideIndexError:
    look = f"{PROTECTED}/{REFUSED} of the index has the slides by name"
    reasons = Counter(kind_of(refusal.reason) for refusal in [*refusals, *unreachable])
    if set(reasons) == {NO_TISSUE}:
        return SlideIndexError(
            "no tissue anywhere", value=f"{len(refusals)} slides", expected="tissue in one of them", remedy=look
        )
    counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    if unreachable:
        return SlideIndexError(
            f"no slide is accepted, and {len(unreachable)} could not be read: {counts}",
            remedy="see to the storage and run the same command again",
        )
    return SlideIndexError(f"all {len(refusals)} slides are refused: {counts}", remedy=look)
