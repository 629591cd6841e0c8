"""Checkpoints beside training: one in flight, failures, what is kept, what a kill leaves. One process, no DeepSpeed."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from tests.unit.snapshots import KINDS, SHAPES, SHARD, shard_path, snapshot, state

from histoscale.checkpoint.ledger import read_history
from histoscale.checkpoint.manifest import Commit, marker_key
from histoscale.checkpoint.reader import latest_commit
from histoscale.checkpoint.retention import BEST_KEY, Retention
from histoscale.checkpoint.writer import CheckpointWriter, write_checkpoint
from histoscale.errors import CheckpointError, StorageError
from histoscale.storage import local, open_store
from histoscale.storage.local import LocalStore
from histoscale.storage.store import Store

WAIT_S = 30.0


pytestmark = pytest.mark.usefixtures("process_group")


class Gated(LocalStore):
    """A folder that takes nothing under a prefix before it may, and refuses so many writes; a fake."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.open = threading.Event()
        self.open.set()
        self.refusals = 0
        self.lost_answers = 0

    def put_parts(self, key: str, parts: "list[memoryview]") -> None:
        assert self.open.wait(WAIT_S)
        if self.refusals:
            self.refusals -= 1
            raise StorageError("the server is away", value="503", remedy="wait", transient=True)
        super().put_parts(key, parts)
        if self.lost_answers and key.startswith("checkpoints/") and key.endswith(".json") and "manifest" not in key:
            self.lost_answers -= 1
            raise StorageError("no answer came")


@pytest.fixture
def store(tmp_path: Path) -> Gated:
    return Gated(tmp_path / "run")


def writer_to(store: Store, max_failed: int = 3, retention: Retention | None = None) -> CheckpointWriter:
    return CheckpointWriter(store, retention or Retention(2), max_failed)


def settled(writer: CheckpointWriter) -> Commit | None:
    """What comes of the checkpoint in flight when it is only looked at, as between steps."""
    deadline_s = time.monotonic() + WAIT_S
    while writer.in_flight is not None:
        commit = writer.settle(wait=False)
        if commit is not None:
            return commit
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    return None


# In flight.


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_of_it(store: Gated) -> None:
    writer = writer_to(store)
    taken = snapshot(3)
    store.open.clear()
    writer.begin(taken)
    for part in taken.fragments.values():
        for tensor in part.tensors.values():
            tensor.zero_()
    assert [writer.settle(wait=False) for _ in range(3)] == [None, None, None]
    assert (writer.in_flight, latest_commit(store)) == (3, None)
    store.open.set()
    commit = settled(writer)
    assert commit is not None
    assert (commit, writer.in_flight, writer.settle(wait=True)) == (latest_commit(store), None, None)
    other = open_store(f"{store.uri}-waited-for")
    waited_for = write_checkpoint(other, snapshot(3), 2)
    for name in (SHARD, "manifest.json"):
        assert store.get(commit.folder + name) == other.get(waited_for.folder + name)
    assert replace(commit, folder=waited_for.folder) == waited_for


def test_a_shard_is_what_safetensors_would_have_written(store: Gated) -> None:
    path = shard_path(store, write_checkpoint(store, snapshot(1), 1))
    expected = {kind: torch.cat([state(1)[f"{name}/{kind}"] for name in SHAPES]) for kind in KINDS}
    assert path.read_bytes() == save(expected)
    found = load_file(path)
    assert all(torch.equal(found[kind], expected[kind]) for kind in KINDS)


def test_a_rank_that_owns_nothing_writes_an_empty_file(store: Gated) -> None:
    path = shard_path(store, write_checkpoint(store, replace(snapshot(1), fragments={}), 1))
    assert load_file(path) == {}


def test_waiting_takes_a_checkpoint_to_its_commit(store: Gated) -> None:
    writer = writer_to(store)
    writer.begin(snapshot(1))
    assert writer.settle(wait=True) == latest_commit(store)
    writer.begin(snapshot(2))
    assert writer.finish() == latest_commit(store)
    with pytest.raises(CheckpointError, match=r"no checkpoint is being written"):
        writer.finish()


def test_what_must_come_first_has_ended_before_the_commit_and_does_not_hold_up_the_steps(store: Gated) -> None:
    writer, go_on, seen = writer_to(store), threading.Event(), []

    def first() -> None:
        go_on.wait(WAIT_S)
        seen.append(latest_commit(store))

    writer.begin(snapshot(1), first)
    assert writer.settle(wait=False) is None
    assert seen == []
    go_on.set()
    assert writer.settle(wait=True) is not None
    assert seen == [None]


def test_what_must_come_first_may_fail(store: Gated) -> None:
    writer = writer_to(store)
    writer.begin(snapshot(1), lambda: store.get("nowhere"))
    assert writer.settle(wait=True) == latest_commit(store)


# Failures.


def test_a_failure_is_told_and_the_next_checkpoint_holds_all_steps_since_the_last_commit(
    store: Gated, caplog: pytest.LogCaptureFixture
) -> None:
    writer = writer_to(store)
    writer.begin(snapshot(2, start=0))
    first = settled(writer)
    store.refusals = 1
    writer.begin(snapshot(4, start=2))
    with caplog.at_level(logging.WARNING):
        assert settled(writer) is None
    assert "the checkpoint of step 4 was not committed: the server is away (got '503'). Wait." in caplog.text
    assert "failed 1 of 3 times, the next one tries again" in caplog.text
    assert latest_commit(store) == first
    writer.begin(snapshot(6, start=2))
    assert settled(writer) == latest_commit(store)
    assert [step for step, _ in read_history(store, 6)] == list(range(6))


def test_too_many_failures_in_a_row_are_an_error_and_a_commit_starts_the_count_again(store: Gated) -> None:
    writer = writer_to(store, max_failed=2)
    for step, refusals, committed in ((1, 1, False), (2, 0, True), (3, 1, False)):
        store.refusals = refusals
        writer.begin(snapshot(step))
        assert (settled(writer) is not None) == committed
    store.refusals = 1
    writer.begin(snapshot(4))
    with pytest.raises(StorageError, match=r"the checkpoint of step 4 was not committed: the server is away") as caught:
        settled(writer)
    assert caught.value.transient, "as what the store says of it"
    assert writer.in_flight is None


def test_whoever_waits_for_the_last_checkpoint_gets_its_failure_at_once(store: Gated) -> None:
    writer = writer_to(store)
    store.refusals = 1
    writer.begin(snapshot(1))
    with pytest.raises(StorageError, match=r"the checkpoint of step 1 was not committed"):
        writer.finish()


@pytest.mark.parametrize("refused", range(4), ids=["shard", "manifest", "ledger", "marker"])
def test_nothing_is_half_committed_whatever_is_refused(
    store: Gated, refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_checkpoint(store, snapshot(1), 2)
    put_parts, turns = Gated.put_parts, iter(range(100))

    def refuse(self: Gated, key: str, parts: "list[memoryview]") -> None:
        if next(turns) == refused:
            raise StorageError("the bucket is full")
        put_parts(self, key, parts)

    writer = writer_to(store)
    with monkeypatch.context() as patch:
        patch.setattr(Gated, "put_parts", refuse)
        writer.begin(snapshot(2))
        assert settled(writer) is None
    assert latest_commit(store) == first
    writer.begin(snapshot(3, start=1))
    assert settled(writer) == latest_commit(store)
    assert [step for step, _ in read_history(store, 3)] == [0, 1, 2]
    assert len(list(store.list("checkpoints"))) == 6  # two commits: marker, manifest, shard


def test_a_commit_whose_answer_was_lost_is_no_second_truth(store: Gated) -> None:
    writer = writer_to(store)
    writer.begin(snapshot(1))
    first = settled(writer)
    store.lost_answers = 1
    writer.begin(snapshot(2))
    assert settled(writer) is None
    ghost = latest_commit(store)
    assert ghost is not None
    assert (ghost.step, [step for step, _ in read_history(store, 2)]) == (2, [0, 1])  # whole, if nobody goes on
    writer.begin(snapshot(3, start=1))
    last = settled(writer)
    assert last is not None
    assert latest_commit(store, before=3) == first
    assert [step for step, _ in read_history(store, 3)] == [0, 1, 2]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_diagnosis(store: Gated, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(code, "full")

    monkeypatch.setattr(local.os, "fsync", full)
    with pytest.raises(StorageError, match=r"step 1 was not committed: .* the disk or quota is full.*Make room there"):
        write_checkpoint(store, snapshot(1), 1)
    assert not [path for path in Path(store.uri).rglob("*") if path.is_file()]


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "gone"), RuntimeError("can't start new thread")])
def test_what_only_one_rank_meets_is_a_diagnosis_too(
    store: Gated, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Gated, key: str, parts: object) -> None:
        raise error

    monkeypatch.setattr(Gated, "put_parts", fail)
    with pytest.raises(StorageError, match=rf"a checkpoint could not be written .*{type(error).__name__}"):
        write_checkpoint(store, snapshot(1), 1)


def test_a_host_without_memory_for_the_copy_is_a_failed_checkpoint(
    store: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fragments: object) -> None:
        raise RuntimeError("can't allocate memory")

    writer = writer_to(store)
    with monkeypatch.context() as patch:
        patch.setattr("histoscale.checkpoint.shard._copied", full)
        writer.begin(snapshot(1))
    assert settled(writer) is None
    writer.begin(snapshot(1))
    assert settled(writer) is not None


# What is kept.


def steps_kept(store: Store) -> list[int]:
    markers = Path(store.uri, "checkpoints").glob("*.json")
    return sorted(int(marker.stem.removeprefix("step-")) for marker in markers)


@pytest.mark.parametrize(
    ("retention", "best", "kept"),
    [
        (Retention(2), None, [6, 7]),
        (Retention(1, 3), None, [3, 6, 7]),
        (Retention(1), 2, [2, 7]),
        (Retention(2, 5), 4, [4, 5, 6, 7]),
        (Retention(1), 99, [7]),
    ],
)
def test_the_newest_every_kth_and_the_best_stay(
    store: Gated, retention: Retention, best: int | None, kept: list[int]
) -> None:
    if best is not None:
        store.put(BEST_KEY, json.dumps({"step": best, "score": 0.7}).encode())
    writer = writer_to(store, retention=retention)
    for step in range(1, 8):
        writer.begin(snapshot(step))
        writer.finish()
    assert steps_kept(store) == kept
    assert len([info for info in store.list("checkpoints") if info.key.endswith(SHARD)]) == len(kept)


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"step": null}', b"\xff", b'{"stop": 3}'])
def test_where_the_best_is_not_known_nothing_goes(store: Gated, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store.put(BEST_KEY, data)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            write_checkpoint(store, snapshot(step), 1)
    assert steps_kept(store) == [1, 2]
    assert f"old checkpoints could not be removed: {BEST_KEY} does not say which step is the best" in caplog.text


def test_a_damaged_marker_keeps_its_files_until_it_goes_itself(store: Gated) -> None:
    first = write_checkpoint(store, snapshot(1), 3)
    store.put(marker_key(1), b"{")
    write_checkpoint(store, snapshot(2), 2)
    assert list(store.list(first.folder))
    write_checkpoint(store, snapshot(3), 2)
    assert not list(store.list(first.folder))
    assert steps_kept(store) == [2, 3]


# Killed.

STAGES = {"shard": SHARD, "manifest": "manifest.json", "ledger": "ledger/", "marker": "step-00000002.json"}


def dies_writing(stage: str, root: Path) -> None:
    """Commit step 1, then stop for ever at a write of step 2; for a process that is killed then."""

    class Stuck(LocalStore):
        def put_parts(self, key: str, parts: "list[memoryview]") -> None:
            if STAGES[stage] in key:
                (root / "stuck").touch()
                time.sleep(3600)
            super().put_parts(key, parts)

    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=0, world_size=1)
    write_checkpoint(open_store(root / "run"), snapshot(1), 2)
    writer = writer_to(Stuck(root / "run"))
    writer.begin(snapshot(2))
    while writer.settle(wait=False) is None:
        time.sleep(0.001)


def test_kill_9_before_the_marker_leaves_the_commit_before(tmp_path: Path) -> None:
    roots = {stage: tmp_path / stage for stage in STAGES}
    for root in roots.values():
        root.mkdir()
    program = "import sys; from tests.unit.test_checkpoint_writer import fork_all; fork_all(sys.argv[1:])"
    command = [sys.executable, "-c", program, *map(str, roots.values())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as parent:
        try:
            assert parent.stdout is not None
            children = [int(word) for word in parent.stdout.readline().split()]
            assert len(children) == len(roots)
            deadline_s = time.monotonic() + WAIT_S
            for child, root in zip(children, roots.values(), strict=True):
                while not (root / "stuck").exists():
                    assert time.monotonic() < deadline_s
                    time.sleep(0.01)
                os.kill(child, signal.SIGKILL)
        finally:
            parent.terminate()
    for root in roots.values():
        store = open_store(root / "run")
        found = latest_commit(store)
        assert found is not None
        assert found.step == 1
        assert [step for step, _ in read_history(store, 1)] == [0]
        write_checkpoint(store, snapshot(3, start=1), 2)
        assert [step for step, _ in read_history(store, 3)] == [0, 1, 2]
        assert len([info for info in store.list("checkpoints") if info.key.endswith(SHARD)]) == 2


def fork_all(roots: list[str]) -> None:
    """A process for each root, which has loaded everything already; prints their ids, and waits."""
    children = []
    for root in map(Path, roots):
        child = os.fork()
        if child == 0:
            dies_writing(root.name, root)
            os._exit(1)
        children.append(child)
    sys.stdout.write(f"{' '.join(map(str, children))}\n")
    sys.stdout.flush()
    for child in children:
        os.waitpid(child, 0)
