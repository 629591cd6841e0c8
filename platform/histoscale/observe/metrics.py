"""The metrics of a run, as TensorBoard events and as JSON lines, cut back to the committed step at every resume."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from histoscale.storage import Store, is_remote

METRICS_KEY = "metrics.jsonl"
EVENTS_PREFIX = "events"


class MetricsWriter:
    """Rank 0's writer; local run folders are written in place, remote ones at each `publish`.

    Args:
        store: The run folder.
        first_step: The committed step that the run goes on from; what was written of later steps is forgotten.
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
        lines = self._store.get(METRICS_KEY).decode().splitlines() if self._store.exists(METRICS_KEY) else []
        kept = [line for line in lines if _step_of(line) < first_step]
        rewritten = self._metrics.with_suffix(".part")
        rewritten.write_text("".join(f"{line}\n" for line in kept))
        rewritten.replace(self._metrics)


def _step_of(line: str) -> float:
    """The step of a metrics line; a line that a crash has torn counts as later than every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
