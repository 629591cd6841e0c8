"""What happened to a run and when, and what became of its time.

Each event is one small object below `timeline/`: a bucket cannot append to an object, the driver and the first rank
write at the same time, and whatever is killed leaves events that are whole. The name of an event holds its time and its
kind, so a listing alone tells how long a run has been going.
"""

import json
import logging
import re
import secrets
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum

from histoscale.errors import RunError, StorageError
from histoscale.storage import Store

FOLDER = "timeline/"
FORMAT_VERSION = 1
_READERS = 16

_log = logging.getLogger(__name__)


class Kind(Enum):
    """What an event says."""

    START = "start"
    """A job has taken the run."""
    RESUME = "resume"
    """The workers are ready for their first step."""
    RESIZE = "resize"
    PREEMPTION_NOTICE = "preemption_notice"
    PREEMPTION = "preemption"
    CRASH = "crash"
    RESTART = "restart"
    COMMIT = "commit"
    ALARM = "alarm"
    """An alarm has rung; its reason is what it says."""
    STOP = "stop"
    """The job has ended before the run."""
    END = "end"


_KEY = re.compile(rf"timeline/(\d{{15}})-({'|'.join(kind.value for kind in Kind)})-[0-9a-f]{{8}}\.json")
ENDS = (Kind.STOP, Kind.END)
DOWNS = (Kind.RESIZE, Kind.PREEMPTION, Kind.CRASH, Kind.RESTART)
"""From these on until the next resume nobody trains."""


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: What.
        time_s: Seconds since 1970 on the clock of whoever tells it.
        step: Steps that were done.
        workers: Of the group that trains, trained or shall train; 0 where that is not known.
        reason: Why, for people.
        restart_s: Of a resume: seconds since the last step that the group before had told of.
        steps_redone: Of a resume: steps that the group before had done and that were not committed.
        stall_s: Of a commit: seconds for which the steps waited for it.
    """

    kind: Kind
    time_s: float
    step: int
    workers: int = 0
    reason: str = ""
    restart_s: float | None = None
    steps_redone: int | None = None
    stall_s: float | None = None


class Timeline:
    """Writes events beside whoever tells them, in their order; what cannot be written is logged and left out.

    Args:
        store: The run folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="timeline")

    def tell(self, event: Event) -> None:
        """Write an event soon."""
        self._writer.submit(self._write, event)

    def close(self) -> None:
        """Wait until everything is written."""
        self._writer.shutdown()

    def _write(self, event: Event) -> None:
        try:
            write_event(self._store, event)
        except StorageError as error:
            # The record of a run is worth less than the run.
            _log.warning("an event of the timeline could not be written: %s", error)


def write_event(store: Store, event: Event) -> None:
    """Write an event now.

    Raises:
        StorageError: It cannot be written.
    """
    key = f"{FOLDER}{round(event.time_s * 1000):015d}-{event.kind.value}-{secrets.token_hex(4)}.json"
    store.put(key, json.dumps({"format": FORMAT_VERSION, **asdict(event), "kind": event.kind.value}).encode())


def read_events(store: Store) -> list[Event]:
    """All events of a run by time.

    Raises:
        RunError: One of them is damaged or of another version.
        StorageError: They cannot be read.
    """
    keys = [info.key for info in store.list(FOLDER) if _KEY.fullmatch(info.key)]
    with ThreadPoolExecutor(_READERS) as readers:
        contents = list(readers.map(store.get, keys))
    return sorted(map(_decode, contents, keys), key=lambda event: event.time_s)


def wall_before(store: Store, now_s: float) -> float:
    """Seconds that jobs have had a run until now, by the names of its events; see `sessions`.

    Raises:
        StorageError: They cannot be listed.
    """
    matches = [match for info in store.list(FOLDER) if (match := _KEY.fullmatch(info.key))]
    marks = [(int(match[1]) / 1000.0, Kind(match[2])) for match in matches]
    return sum(end - start for start, end in sessions([*marks, (now_s, Kind.STOP)]))


def sessions(marks: Iterable[tuple[float, Kind]]) -> list[tuple[float, float]]:
    """From when to when jobs had a run: from each start to the stop or end after it, or to the last event of all.

    A job that died without a word is followed by another start: the time between belongs to the run, as nobody had
    asked it to pause.
    """
    found: list[tuple[float, float]] = []
    begun: float | None = None
    last_s = 0.0
    for time_s, kind in sorted(marks, key=lambda mark: mark[0]):
        last_s = time_s
        if kind in ENDS and begun is not None:
            found.append((begun, time_s))
            begun = None
        elif kind not in ENDS and begun is None:
            begun = time_s
    return found if begun is None else [*found, (begun, last_s)]


def _decode(data: bytes, key: str) -> Event:
    version = None
    try:
        values = json.loads(data)
        version = values.pop("format")
        if version == FORMAT_VERSION:
            return Event(**values | {"kind": Kind(values["kind"])})
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise RunError(
        f"{key} is no event of a run",
        value=version,
        expected=f"an event of the timeline, format {FORMAT_VERSION}",
        remedy=f"delete {key}: only the report knows less without it",
    )
