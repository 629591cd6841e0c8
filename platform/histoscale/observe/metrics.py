"""The metrics of a run, as TensorBoard events and as JSON lines, cut back to the committed step at every resume.

They are worth less than the run: where they cannot be written it goes on, with a warning.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from histoscale.errors import StorageError
from histoscale.observe.alarms import REMEMBERED_STEPS
from histoscale.observe.goodput import useful_s
from histoscale.storage import Store, is_remote

METRICS_KEY = "metrics.jsonl"
EVENTS_PREFIX = "events"

_log = logging.getLogger(__name__)


class MetricsWriter:
    """Rank 0's writer; local run folders are written in place, remote ones at each commit.

    Args:
        store: The run folder.
        first_step: The committed step that the run goes on from; what was written of later steps is forgotten.

    Attributes:
        useful_s: Seconds of the committed steps, without what they waited.
        last: What was measured of the last of the committed steps.
    """

    def __init__(self, store: Store, first_step: int) -> None:
        self._store = store
        self._remote = is_remote(store.uri)
        self._directory = Path(tempfile.mkdtemp(prefix="histoscale-") if self._remote else store.uri)
        self._metrics = self._directory / METRICS_KEY
        self._metrics.parent.mkdir(parents=True, exist_ok=True)
        self._keep_committed(first_step)
        self._lines = _Lines(self._metrics)
        self._events = _Events(self._directory / EVENTS_PREFIX, first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step."""
        self._lines.add(json.dumps({"step": step, **values}) + "\n")
        self._events.add(step, values)

    def flush(self) -> Callable[[], None]:
        """Finish what was written so far; the answer brings it into the run folder, and may be called by any thread."""
        self._events.flush()
        return self._upload if self._remote else _done

    def _upload(self) -> None:
        try:
            for path in sorted(self._directory.rglob("*")):
                if path.is_file():
                    self._store.upload(path, path.relative_to(self._directory).as_posix())
        except StorageError as error:
            _log.warning("metrics could not be published, the next commit tries again: %s", error)

    def close(self, publish: bool = True) -> None:
        """Let go.

        Args:
            publish: Bring everything into the run folder before; not where another job has the run by now.
        """
        if publish:
            self.flush()()
        self._events.close()
        if self._remote:
            shutil.rmtree(self._directory)

    def _keep_committed(self, first_step: int) -> None:
        content = self._store.get(METRICS_KEY) if self._store.exists(METRICS_KEY) else b""
        kept = list(_lines_before(content, first_step))
        self.useful_s = sum(useful_s(values) for _, values in kept)
        self.last = tuple(values for _, values in kept[-REMEMBERED_STEPS:])
        committed = "".join(f"{line}\n" for line, _ in kept).encode()
        if not self._remote and content.startswith(committed):
            if len(committed) < len(content):
                os.truncate(self._metrics, len(committed))  # which a full disk allows
            return
        rewritten = self._metrics.with_suffix(".part")
        rewritten.write_bytes(committed)
        rewritten.replace(self._metrics)


def _done() -> None:
    """Nothing is left to do: the file lies in the run folder."""


class _Lines:
    """Appends to a file; what it has no room for waits for the next time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending = b""

    def add(self, text: str) -> None:
        told = bool(self._pending)
        self._pending += text.encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                self._pending = self._pending[file.write(self._pending) :]
        except OSError as error:
            if not told:
                _log.warning("%s cannot be written, its lines wait: %s", METRICS_KEY, error.strerror)


class _Events:
    """TensorBoard's events; what it has no room for is lost, and a new file is begun at the next commit."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self._next_step = first_step
        self._writer: SummaryWriter | None = None
        self._begin()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._next_step = step + 1
        if self._writer is not None:
            with self._dropped_where_it_fails():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        if self._writer is None:
            self._begin()
        else:
            with self._dropped_where_it_fails():
                self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with self._dropped_where_it_fails():
                self._writer.close()

    def _begin(self) -> None:
        with self._dropped_where_it_fails():
            self._writer = SummaryWriter(str(self._folder), purge_step=self._next_step)

    @contextlib.contextmanager
    def _dropped_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            _log.warning("TensorBoard's events cannot be written, some are lost: %s", error.strerror)


def read_metrics(store: Store, stop: int) -> Iterator[dict[str, float]]:
    """What was measured of steps 0 to `stop - 1`, each step once; `stop` is the step of a commit."""
    if store.exists(METRICS_KEY):
        for _, values in _lines_before(store.get(METRICS_KEY), stop):
            yield values


def _lines_before(content: bytes, stop: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Lines of steps before `stop`, as text and as values; a line that a crash has torn is left out."""
    for line in content.decode().splitlines():
        try:
            values = json.loads(line)
            if int(values["step"]) < stop:
                yield line, values
        except (ValueError, KeyError, TypeError):
            continue
