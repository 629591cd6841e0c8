"""Who has lost a run's lease writes no commits, ledgers or metrics of it any more. One process, no Ray."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.unit.snapshots import SHARD, snapshot

from histoscale.checkpoint.ledger import read_history
from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.reader import latest_commit
from histoscale.checkpoint.retention import Retention
from histoscale.checkpoint.writer import CheckpointWriter, write_checkpoint
from histoscale.cluster import pretrain as driver
from histoscale.cluster import worker
from histoscale.cluster.control import Wish
from histoscale.cluster.lease import require_lease
from histoscale.errors import HistoscaleError, RunError, StorageError, TrainingError
from histoscale.observe.timeline import Kind, Timeline, read_events
from histoscale.storage import open_store
from histoscale.storage.local import LocalStore
from histoscale.storage.store import Store

WAIT_S = 30.0
OURS, THEIRS = "ours", "theirs"

pytestmark = pytest.mark.usefixtures("process_group")


class TakenAt(LocalStore):
    """A run folder that another job takes over right after a write of ours; a fake.

    Args:
        root: The folder.
        after: What that key holds.
        then: What the other job does at once.
    """

    def __init__(self, root: Path, after: str, then: Callable[[], object]) -> None:
        super().__init__(root)
        self._after, self._then = after, then

    def put_parts(self, key: str, parts: "list[memoryview]") -> None:
        super().put_parts(key, parts)
        if self._after in key:
            hold(self, THEIRS)
            self._then()


def hold(store: Store, token: str) -> None:
    LocalStore(Path(store.uri)).put(
        "lease.json", json.dumps({"holder": f"job-{token}", "token": token, "beat": 0}).encode()
    )


def fenced(store: Store, max_failed: int = 3, keep_last: int = 2) -> CheckpointWriter:
    return CheckpointWriter(store, Retention(keep_last), max_failed, partial(require_lease, store, OURS))


def files(store: Store) -> dict[str, bytes]:
    """What counts in a run folder: all but shards and manifests that no marker names."""
    commit = latest_commit(store)
    return {
        info.key: store.get(info.key)
        for info in store.list()
        if info.key != "lease.json"
        and ("/" not in info.key.removeprefix("checkpoints/") or (commit and info.key.startswith(commit.folder)))
    }


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """A run of ours with a commit of step 1."""
    store = open_store(tmp_path / "run")
    hold(store, OURS)
    write_checkpoint(store, snapshot(1), 2)
    return store


def settled(writer: CheckpointWriter) -> Commit | None:
    deadline_s = time.monotonic() + WAIT_S
    while writer.in_flight is not None:
        if (commit := writer.settle(wait=False)) is not None:
            return commit
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    return None


def test_who_holds_the_lease_commits(run: Store) -> None:
    writer = fenced(run)
    writer.begin(snapshot(2))
    assert settled(writer) == latest_commit(run)
    assert [step for step, _ in read_history(run, 2)] == [0, 1]


@pytest.mark.parametrize("waits", [False, True])
def test_commits_and_ledgers_of_the_new_holder_stay(run: Store, waits: bool) -> None:
    write_checkpoint(run, snapshot(3, start=1), 2)  # theirs
    hold(run, THEIRS)
    before = files(run)
    writer = fenced(run)
    measured: list[str] = []
    writer.begin(snapshot(2), lambda: measured.append("published"))
    with pytest.raises(RunError, match=r"run .* was taken over by another job \(got 'job-theirs'"):
        writer.finish() if waits else settled(writer)
    assert writer.in_flight is None
    assert files(run) == before
    assert measured == []
    assert [step for step, _ in read_history(run, 3)] == [0, 1, 2]


@pytest.mark.parametrize("after", [SHARD, "manifest.json", "ledger/"])
def test_a_run_that_is_taken_over_while_a_checkpoint_is_written_gets_no_marker(run: Store, after: str) -> None:
    first = latest_commit(run)
    writer = fenced(TakenAt(Path(run.uri), after, lambda: None))
    writer.begin(snapshot(2))
    with pytest.raises(RunError, match="was taken over by another job"):
        settled(writer)
    assert latest_commit(run) == first


def test_what_the_new_holder_is_writing_is_not_removed_as_a_failed_attempt(run: Store) -> None:
    theirs = "checkpoints/step-00000009-abcdef01/"
    writer = fenced(TakenAt(Path(run.uri), "step-00000002.json", lambda: run.put(theirs + SHARD, b"on its way")))
    writer.begin(snapshot(2))
    with pytest.raises(RunError, match="was taken over by another job"):
        settled(writer)
    assert run.exists(theirs + SHARD)


def test_a_lease_that_cannot_be_read_is_a_failed_checkpoint(run: Store, caplog: pytest.LogCaptureFixture) -> None:
    refusals = [StorageError("the server is away")]

    def fence() -> None:
        if refusals:
            raise refusals.pop()

    writer = CheckpointWriter(run, Retention(2), 3, fence)
    writer.begin(snapshot(2))
    assert settled(writer) is None
    assert "the checkpoint of step 2 was not committed: the server is away" in caplog.text
    assert "failed 1 of 3 times, the next one tries again" in caplog.text
    writer.begin(snapshot(3, start=1))
    assert settled(writer) == latest_commit(run)


# Rank 0's loop.


class FakeMetrics:
    """A writer of metrics that takes note of how it is closed; a fake."""

    useful_s = 0.0
    last = ()
    published: bool | None = None

    def __init__(self, store: Store, start: int) -> None:
        """Nothing is written."""

    def close(self, publish: bool = True) -> None:
        FakeMetrics.published = publish


class FakeTimeline:
    """A timeline that forgets; a fake."""

    def __init__(self, store: Store) -> None:
        """Nothing is written."""

    def tell(self, event: object) -> None:
        """Forget."""

    def close(self) -> None:
        """Nothing is open."""


def refusing(error: HistoscaleError) -> Callable[[int], Any]:
    def micro_batches(step: int) -> Any:
        raise error

    return micro_batches


@pytest.mark.parametrize(
    ("wish", "error", "published"),
    [
        (Wish.ABANDON, TrainingError("never reached"), False),
        (Wish.GO_ON, RunError("was taken over by another job"), False),
        (Wish.GO_ON, TrainingError("a loss is odd"), True),
    ],
)
def test_metrics_of_a_run_that_was_taken_over_are_not_published(
    run: Store, wish: Wish, error: HistoscaleError, published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "ControlLine", lambda control: SimpleNamespace(wish=wish))
    monkeypatch.setattr(worker, "MetricsWriter", FakeMetrics)
    monkeypatch.setattr(worker, "Timeline", FakeTimeline)
    monkeypatch.setattr(worker, "_resumed", lambda spec, start: None)
    recipe = SimpleNamespace(steps=4, batch=SimpleNamespace(tiles=8), optim=SimpleNamespace(warmup_images=1))
    spec: Any = SimpleNamespace(run_uri=run.uri, control=None, recipe=recipe)
    feed: Any = SimpleNamespace(micro_batches=refusing(error))
    trainer: Any = None
    with pytest.raises(RunError if not published else TrainingError):
        worker._lead(spec, trainer, feed, 0)
    assert FakeMetrics.published is published


# What the driver records.


def recorded(store: Store, error: Exception | None) -> list[tuple[Kind, int, str]]:
    recipe: Any = SimpleNamespace(steps=2, cluster=SimpleNamespace(worker_bounds=(1, 2)))

    def attempt() -> None:
        with driver._recorded(store, recipe, 0) as timeline:
            assert isinstance(timeline, Timeline)
            if error is not None:
                raise error

    if error is None:
        attempt()
    else:
        with pytest.raises(type(error), match=str(error)):
            attempt()
    return [(event.kind, event.step, event.reason) for event in read_events(open_store(store.uri))]


def test_a_job_that_fails_records_the_committed_step(run: Store) -> None:
    assert recorded(run, KeyError("odd")) == [(Kind.START, 0, ""), (Kind.STOP, 1, "the job failed")]


def test_a_job_that_ends_well_records_how(run: Store) -> None:
    assert recorded(run, None)[1:] == [(Kind.STOP, 1, "asked to stop")]
    write_checkpoint(run, snapshot(2), 2)
    assert recorded(run, None)[3:] == [(Kind.END, 2, "complete")]


class Away(LocalStore):
    """A run folder that cannot be listed; a fake."""

    def list(self, prefix: str = "") -> Any:
        raise StorageError("the bucket is away")


def test_what_ended_a_job_is_not_hidden_by_a_storage_that_is_away(run: Store) -> None:
    events = recorded(Away(Path(run.uri)), KeyError("odd"))
    assert events == [(Kind.START, 0, ""), (Kind.STOP, 0, "the job failed")]
