"""Metrics that cannot be written are a warning, and those of the committed steps are kept at a resume."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from histoscale.errors import StorageError
from histoscale.observe import metrics
from histoscale.observe.metrics import METRICS_KEY, MetricsWriter, read_metrics
from histoscale.storage import open_store
from histoscale.storage.local import LocalStore

FULL = OSError(errno.ENOSPC, "No space left on device")


def steps_in(run: Path) -> list[float]:
    return [values["step"] for values in read_metrics(open_store(run), 1000)]


def write(run: Path, steps: range, first_step: int) -> None:
    writer = MetricsWriter(open_store(run), first_step)
    for step in steps:
        writer.write(step, {"loss/total": 1.0 / (step + 1), "time/step_s": 2.0, "time/wait_s": 0.5})
    writer.close()


def test_a_resume_keeps_what_is_committed_and_forgets_the_rest(tmp_path: Path) -> None:
    write(tmp_path, range(5), 0)
    file = tmp_path / METRICS_KEY
    inode = file.stat().st_ino
    with file.open("a") as torn:
        torn.write('{"step": 2, "loss')
    write(tmp_path, range(3, 6), 3)
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert file.stat().st_ino == inode, "it is cut where it lies, which a full disk allows"
    assert MetricsWriter(open_store(tmp_path), 3).useful_s == pytest.approx(4.5)


def test_lines_of_a_torn_file_are_sorted_out(tmp_path: Path) -> None:
    (tmp_path / METRICS_KEY).write_text('{"step": 0}\n{"ste\n{"step": 1}\n[]\n{"step": 9}\n')
    MetricsWriter(open_store(tmp_path), 2).close()
    assert (tmp_path / METRICS_KEY).read_text() == '{"step": 0}\n{"step": 1}\n'


def test_lines_wait_for_room_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(open_store(tmp_path), 0)
    writer.write(0, {"a": 1.0})
    writer._lines._path = Path("/dev/full")
    for step in (1, 2):
        writer.write(step, {"a": 1.0})
    assert caplog.text.count("metrics.jsonl cannot be written, its lines wait: No space left on device") == 1
    writer._lines._path = tmp_path / METRICS_KEY
    writer.write(3, {"a": 1.0})
    assert steps_in(tmp_path) == [0, 1, 2, 3]


class OnAFullDisk:
    """TensorBoard's writer where every second file finds no room, at the call that is named; a fake."""

    files: list[tuple[int, list[int]]]
    fails_in = "add_scalar"

    def __init__(self, folder: str, purge_step: int) -> None:
        self.steps: list[int] = []
        self._full = len(self.files) % 2 == 0
        self.files.append((purge_step, self.steps))
        self._fail("__init__")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._fail("add_scalar")
        self.steps.append(step)

    def flush(self) -> None:
        self._fail("flush")

    def close(self) -> None:
        self._fail("close")

    def _fail(self, name: str) -> None:
        if self._full and name == self.fails_in:
            raise FULL


@pytest.mark.parametrize(
    ("fails_in", "files"),
    [
        ("__init__", [(0, []), (1, [1, 2])]),
        ("add_scalar", [(0, []), (1, [1, 2])]),
        ("flush", [(0, [0]), (2, [2])]),
        ("close", [(0, [0, 1, 2])]),
    ],
)
def test_events_that_find_no_room_are_dropped_and_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_in: str, files: Any
) -> None:
    monkeypatch.setattr(OnAFullDisk, "files", [], raising=False)
    monkeypatch.setattr(OnAFullDisk, "fails_in", fails_in)
    monkeypatch.setattr(metrics, "SummaryWriter", OnAFullDisk)
    writer = MetricsWriter(open_store(tmp_path), 0)
    for step in range(3):
        writer.write(step, {"a": 1.0})
        writer.flush()()
    writer.close()
    assert OnAFullDisk.files == files
    assert "TensorBoard's events cannot be written, some are lost: No space left on device" in caplog.text
    assert steps_in(tmp_path) == [0, 1, 2]


class AwayBucket(LocalStore):
    """A bucket that takes nothing while it is away; a fake."""

    away = True
    uri = "s3://bucket/run"

    def upload(self, path: Path, key: str) -> None:
        if self.away:
            raise StorageError("the bucket is away")
        super().upload(path, key)


def test_what_a_bucket_does_not_take_is_published_with_the_next_commit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = AwayBucket(tmp_path)
    writer = MetricsWriter(store, 0)
    writer.write(0, {"a": 1.0})
    writer.flush()()
    assert "metrics could not be published, the next commit tries again: the bucket is away" in caplog.text
    assert not list(tmp_path.iterdir())
    store.away = False
    writer.write(1, {"a": 1.0})
    writer.close()
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS_KEY).read_text().splitlines()] == [0, 1]
    assert list((tmp_path / "events").iterdir())


def test_metrics_of_a_run_that_another_job_has_are_not_published(tmp_path: Path) -> None:
    store = AwayBucket(tmp_path)
    store.away = False
    writer = MetricsWriter(store, 0)
    writer.write(0, {"a": 1.0})
    theirs = b'{"step": 0, "a": 2.0}\n'
    store.put(METRICS_KEY, theirs)
    writer.close(publish=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {METRICS_KEY: theirs}
    assert not writer._directory.exists()
