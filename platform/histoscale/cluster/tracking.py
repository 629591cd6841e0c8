"""A thread of the driver that tells an MLflow server of the run; a server that is away is nothing to the run."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from histoscale.checkpoint.reader import latest_commit
from histoscale.cluster.run_folder import read_run
from histoscale.config.running import TrackingSection
from histoscale.errors import HistoscaleError
from histoscale.observe.mlflow_sink import MlflowSink, client_errors, open_client
from histoscale.storage import Store

EVERY_S = 15.0
LAST_S = 30.0
"""How long the end of a job waits for a server."""

Open = Callable[[str], Any]


@contextlib.contextmanager
def tracked(
    store: Store,
    tracking: TrackingSection,
    tell: Callable[[str], None],
    lost: Callable[[], bool],
    every_s: float = EVERY_S,
    client_of: Open = open_client,
) -> Iterator[None]:
    """Tell a server what is committed for as long as the block lasts, and how it has ended after it.

    Args:
        store: The run folder.
        tracking: Of the recipe; nothing is done where it names no server.
        tell: Takes a line for people.
        lost: Whether another job has the run by now.
        every_s: From look to look.
        client_of: Opens MLflow's client.
    """
    if tracking.mlflow is None:
        yield
        return
    follower = _Follower(store, tracking, tell, lost, every_s, client_of)
    thread = threading.Thread(target=follower.run, name="mlflow", daemon=True)
    thread.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        follower.stop(failed)
        thread.join(LAST_S)
        if thread.is_alive() or follower.behind:
            tell("warning: MLflow lacks the end of the run; the same command again sends what is missing")


class _Follower:
    def __init__(
        self,
        store: Store,
        tracking: TrackingSection,
        tell: Callable[[str], None],
        lost: Callable[[], bool],
        every_s: float,
        client_of: Open,
    ) -> None:
        self._store = store
        self._tracking = tracking
        self._tell = tell
        self._lost = lost
        self._every_s = every_s
        self._client_of = client_of
        self._sink: MlflowSink | None = None
        self._done = threading.Event()
        self._failed = False
        self._told = False
        self.behind = True

    def run(self) -> None:
        """Look until told to stop, and once more."""
        while not self._done.wait(self._every_s):
            self._look()
        self._look(last=True)

    def stop(self, failed: bool) -> None:
        """Let the next look be the last."""
        self._failed = failed
        self._done.set()

    def _look(self, last: bool = False) -> None:
        """One look, which may fail: the next one sends what this one could not, and a person is told once."""
        if self._lost():
            self.behind = False  # another job has the run, and tells of it
            return
        self.behind = True
        expected: tuple[type[Exception], ...] = (HistoscaleError, *client_errors())
        try:
            self._send(last)
        except expected as error:
            if not self._told:
                why = str(error).strip().splitlines() or [type(error).__name__]
                self._tell(f"warning: MLflow at {self._tracking.mlflow} is not told of the run for now: {why[0][:300]}")
            self._told = True
        else:
            if self._told:
                self._tell("MLflow answers again, and was told what it lacked")
            self._told = self.behind = False

    def _send(self, last: bool) -> None:
        recipe = read_run(self._store)
        if recipe is None:
            return
        self._sink = self._sink or MlflowSink(self._store, self._tracking, self._client_of(str(self._tracking.mlflow)))
        self._sink.send(recipe)
        if last:
            commit = latest_commit(self._store)
            complete = commit is not None and commit.step >= recipe.steps
            self._sink.end("FINISHED" if complete else "FAILED" if self._failed else "KILLED")
