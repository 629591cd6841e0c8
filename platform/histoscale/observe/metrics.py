"""The metrics of a run, as TensorBoard events and as JSON lines, cut back to the committed step at every resume."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from histoscale.observe.goodput import useful_s
from histoscale.storage import Store, is_remote

METRICS_KEY = "metrics.jsonl"
EVENTS_PREFIX = "events"


class MetricsWriter:
    """Rank 0's writer; local run folders are written in place, remote ones at each `publish`.

    Args:
        store: The run folder.
        first_step: The committed step that the run goes on from; what was written of later steps is forgotten.

    Attributes:
        useful_s: Seconds of the committed steps, without what they waited.
    """

    def __init__(self, store: Store, first_step: int) -> None:
        self._store = store
        self._remote = is_remote(store.uri)
        self._directory = Path(tempfile.mkdtemp(prefix="histoscale-") if self._remote else store.uri)
        self._metrics = self._directory / METRICS_KEY
        self._metrics.parent.mkdir(parents=True, exist_ok=True)
        self._keep_committed(first_step)
        self._lines = self._metrics.open("a")
        self._events = SummaryWriter(str(self._directory / EVENTS_PREFIX), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def publish(self) -> None:
        """Make everything written so far visible in the run folder."""
        self._lines.flush()
        self._events.flush()
        if not self._remote:
            return
        for path in sorted(self._directory.rglob("*")):
            if path.is_file():
                self._store.upload(path, path.relative_to(self._directory).as_posix())

    def close(self) -> None:
        """Publish and let go."""
        self.publish()
        self._lines.close()
        self._events.close()
        if self._remote:
            shutil.rmtree(self._directory)

    def _keep_committed(self, first_step: int) -> None:
        kept = list(_lines_before(self._store, first_step))
        self.useful_s = sum(useful_s(values) for _, values in kept)
        rewritten = self._metrics.with_suffix(".part")
        rewritten.write_text("".join(f"{line}\n" for line, _ in kept))
        rewritten.replace(self._metrics)


def read_metrics(store: Store, stop: int) -> Iterator[dict[str, float]]:
    """What was measured of steps 0 to `stop - 1`, each step once; `stop` is the step of a commit."""
    for _, values in _lines_before(store, stop):
        yield values


def _lines_before(store: Store, stop: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Lines of steps before `stop`, as text and as values; a line that a crash has torn is left out."""
    if not store.exists(METRICS_KEY):
        return
    for line in store.get(METRICS_KEY).decode().splitlines():
        try:
            values = json.loads(line)
            if int(values["step"]) < stop:
                yield line, values
        except (ValueError, KeyError, TypeError):
            continue
