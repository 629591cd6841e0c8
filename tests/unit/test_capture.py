"""Captures on disk, and what a replay refuses. One process, no DeepSpeed."""

import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from histoscale.checkpoint import shard
from histoscale.checkpoint.capture import CapturedBatch, capture_failure, read_capture, write_capture
from histoscale.checkpoint.fragments import MASTER, Fragment
from histoscale.checkpoint.reader import load_into
from histoscale.checkpoint.writer import Snapshot
from histoscale.cluster import replay as replays
from histoscale.cluster.replay import ReplayRequest, changed_replicas, replay, split_uri
from histoscale.cluster.replay_report import describe_capture, describe_reading
from histoscale.cluster.run_folder import start_run
from histoscale.config.decode import fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import CheckpointError, ClusterError, NonFiniteError, StorageError
from histoscale.storage import open_store
from histoscale.storage.local import LocalStore
from histoscale.storage.store import Store
from histoscale.stream.faults import Fault, Quarantined
from histoscale.stream.feed import MicroBatch

SHAPES = {"a.weight": (2, 3)}
FAILURE = NonFiniteError(
    "the loss is not finite", value="dino nan", remedy="old advice", measured={"dino": math.nan, "kde": 1.5}
)
FAULT = Fault(7, 0, "f" * 32, "blur", whole_slide=False)
TILES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "run")


def snapshot(step: int = 3, recipe: str = "recipe") -> Snapshot:
    weights = torch.arange(6.0)
    fragments = {"a.weight": Fragment(0, 6, (2, 3), {MASTER: weights})}
    quarantine = (Quarantined("e" * 32, 1, "gone"),)
    return Snapshot(step, 8 * step, recipe, fragments, SHAPES, [], {"workers": "1"}, quarantine, "teacher")


def batch(replica: int = 0) -> CapturedBatch:
    ids = np.array([6, 7]) + 2 * replica
    return CapturedBatch.of(replica, ids, TILES + replica, [FAULT])


def write(store: Store, step: int = 3, recipe: str = "recipe") -> str:
    return write_capture(store, snapshot(step, recipe), [batch(1), batch(0)], FAILURE)


# On disk.


def test_a_capture_comes_back_as_it_was_written(store: Store) -> None:
    capture = read_capture(store, write(store))
    assert [entry.replica for entry in capture.micro_batches] == [0, 1]
    assert capture.micro_batches[0] == batch(0)
    assert capture.micro_batches[0].samples == ((6, 2),)
    assert capture.micro_batches[0].faults == (FAULT,)
    assert math.isnan(capture.measured["dino"])
    assert capture.measured["kde"] == 1.5
    assert capture.message == str(FAILURE)
    state = capture.state
    assert (state.step, state.images_seen, state.fingerprint, state.teacher) == (3, 24, "recipe", "teacher")
    assert state.quarantine == snapshot().quarantine
    held = {"a.weight": Fragment(0, 6, (2, 3), {MASTER: torch.zeros(6)})}
    load_into(store, state, held, SHAPES)
    assert torch.equal(held["a.weight"].tensors[MASTER], torch.arange(6.0))


def test_its_json_is_json_for_everybody(store: Store) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = store.get(write(store) + "capture.json")
    assert json.loads(data, parse_constant=refuse)["measured"] == {"dino": "nan", "kde": "1.5"}


def test_the_two_newest_are_kept_whatever_their_steps(store: Store) -> None:
    written = [write(store, step) for step in (9, 5, 7)]
    store.put("captures/step-00000008.torn/manifest.json", b"{}")
    written.append(write(store, 4))
    folders = {info.key.rpartition("/")[0] + "/" for info in store.list("captures")}
    assert folders == {written[2], written[3]}


def test_what_cannot_be_removed_is_told_and_does_no_harm(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: LocalStore, prefix: str) -> None:
        raise StorageError("no deleting here")

    monkeypatch.setattr(LocalStore, "delete_prefix", refuse)
    with caplog.at_level(logging.WARNING):
        written = [write(store, step) for step in (1, 2, 3)]
    assert "old captures could not be removed: no deleting here" in caplog.text
    assert [read_capture(store, folder).state.step for folder in written] == [1, 2, 3]


def test_the_failure_names_the_capture_and_the_command(store: Store) -> None:
    error = capture_failure(store, snapshot(), [batch()], FAILURE)
    [folder] = (Path(store.uri) / "captures").iterdir()
    assert str(error).startswith("the loss is not finite (got 'dino nan'). The step is captured: ")
    assert f"run `python jobs/doctor.py --replay {folder} --index INDEX`." in str(error)
    assert error.measured["kde"] == 1.5


def test_without_a_capture_the_failure_comes_out_with_a_note(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LocalStore, key: str, parts: object) -> None:
        raise StorageError("the bucket is full")

    monkeypatch.setattr(LocalStore, "put_parts", full)
    error = capture_failure(store, snapshot(), [batch()], FAILURE)
    expected = "Old advice. No capture of the step could be written: the bucket is full."
    assert str(error) == f"the loss is not finite (got 'dino nan'). {expected}"


def test_a_host_without_memory_is_a_diagnosis(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(shard, "_copied", full)
    with pytest.raises(StorageError, match=r"this rank's state could not be copied to host memory .*'RuntimeError'"):
        write(store)


def test_a_capture_that_was_cut_short_is_refused(store: Store) -> None:
    folder = write(store)
    with pytest.raises(CheckpointError, match=r"there is no whole capture at .*got 'nothing'"):
        read_capture(store, "captures/step-00000099.00000000")
    shard = Path(store.uri) / folder / "rank-0-of-1.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"the capture is torn: .*rank-0-of-1.safetensors is truncated"):
        read_capture(store, folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"rank-0-of-1.safetensors is missing"):
        read_capture(store, folder)
    store.delete(folder + "capture.json")
    with pytest.raises(CheckpointError, match=r"got '1 files without capture.json'"):
        read_capture(store, folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda values: values | {"format": 99}, "another version of histoscale"),
        (lambda values: [], "is damaged"),
        (lambda values: values | {"micro_batches": [{}]}, "is damaged"),
        (lambda values: values | {"measured": {"dino": "much"}}, "is damaged"),
        (lambda values: values | {"state": {"step": 3}}, "is damaged"),
    ],
)
def test_a_damaged_capture_is_refused(store: Store, spoil: Any, said: str) -> None:
    key = write(store) + "capture.json"
    store.put(key, json.dumps(spoil(json.loads(store.get(key)))).encode())
    with pytest.raises(CheckpointError, match=said):
        read_capture(store, key.removesuffix("/capture.json"))
    store.put(key, b"{")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_capture(store, key.removesuffix("capture.json"))


def test_what_was_measured_travels_with_the_error() -> None:
    assert pickle.loads(pickle.dumps(FAILURE)).measured["kde"] == 1.5


# What a replay refuses.


@pytest.mark.parametrize("uri", ["/runs/a", "captures/step-1.a", "/runs/a/captures/", "/runs/captures/x/y", ""])
def test_other_places_are_no_captures(uri: str) -> None:
    with pytest.raises(CheckpointError, match="this is not the place of a capture"):
        split_uri(uri)


@pytest.mark.parametrize("uri", ["s3://b/runs/a/captures/step-1.f", "s3://b/runs/a/captures/step-1.f/"])
def test_a_capture_lies_in_its_run_folder(uri: str) -> None:
    assert split_uri(uri) == ("s3://b/runs/a", "captures/step-1.f")


def test_a_gpu_that_is_not_there_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = Recipe()
    start_run(store, recipe, "/index", "0" * 16)
    place = f"{store.uri}/{write(store, recipe=fingerprint(recipe))}"
    with pytest.raises(ClusterError, match="this machine has no CUDA device"):
        next(replay(ReplayRequest(place, "/index", "cuda")))


def test_a_state_that_does_not_fit_is_refused_with_a_remedy_of_its_own(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer:
        def restore(self, state: object) -> None:
            raise CheckpointError("a shard is corrupt", remedy="delete the marker")

    monkeypatch.setattr(replays, "build_trainer", lambda *arguments: Trainer())
    capture = read_capture(store, write(store))
    with pytest.raises(CheckpointError, match=r"cannot be restored: a shard is corrupt\. Replay it with the version"):
        replays._rerun(store, Recipe(), capture, [], torch.device("cpu"))


def test_a_replay_is_of_one_process_and_needs_no_file_of_weights(store: Store) -> None:
    model, cluster = {"weights": "/gone.pth"}, {"zero_stage": 1, "workers": 4, "compile": True}
    recipe = Recipe.model_validate({"model": model, "cluster": cluster})
    start_run(store, recipe, "/index", "0" * 16)
    found = replays._recipe_of(store, read_capture(store, write(store, recipe=fingerprint(recipe))), ("seed=4",))
    assert (found.model.weights, found.seed) == (None, 4)
    assert (found.cluster.workers, found.cluster.zero_stage, found.cluster.compile) == (1, 2, False)


def test_tiles_that_are_others_now_are_found_by_replica(store: Store) -> None:
    capture = read_capture(store, write(store))
    now = [_micro_batch(0, TILES), _micro_batch(1, TILES + 1)]
    assert changed_replicas(capture, now) == []
    assert changed_replicas(capture, [now[0], _micro_batch(1, TILES)]) == [1]
    assert describe_reading(now, []) == "tiles: 4 of 2 replicas read again, pixel by pixel those of the run"
    assert "; replica 1 differ from what the run saw" in describe_reading(now, [1])


def _micro_batch(replica: int, tiles: Any) -> MicroBatch:
    ids = np.array([6, 7]) + 2 * replica
    return MicroBatch(replica, ids, tiles, np.array([0.5, 0.5]), np.array([0, 1], np.int32))


def test_a_capture_is_described(store: Store) -> None:
    capture = read_capture(store, write(store))
    when, numbers = describe_capture(capture)
    assert when == f"step 3, captured at {capture.created} by workers 1"
    assert numbers == "the run said: dino nan, kde 1.5"
