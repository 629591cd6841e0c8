import json
import logging
import math
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.snapshots import KINDS, SHAPES, shard_path, snapshot, state

from histoscale.checkpoint import reader, shard
from histoscale.checkpoint.collective import on_every_rank, on_first_rank
from histoscale.checkpoint.fragments import Fragment
from histoscale.checkpoint.ledger import (
    StepRecord,
    delete_after,
    encode_ledger,
    ledger_key,
    merge_records,
    merge_runs,
    read_history,
    read_replacements,
    runs_of,
)
from histoscale.checkpoint.manifest import (
    Commit,
    CorruptCheckpoint,
    Manifest,
    decode_commit,
    decode_manifest,
    encode,
    marker_key,
)
from histoscale.checkpoint.reader import (
    latest_commit,
    load_into,
    load_teacher,
    load_teacher_backbone,
    read_manifest,
    read_newest,
    require_recipe,
)
from histoscale.checkpoint.retention import discard_after
from histoscale.checkpoint.writer import write_checkpoint
from histoscale.errors import CheckpointError, StorageError
from histoscale.storage import open_store
from histoscale.storage.local import LocalStore
from histoscale.storage.store import Store
from histoscale.stream.faults import Fault, Quarantined

BLOCK_ELEMENTS = 8


pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "BLOCK_ELEMENTS", BLOCK_ELEMENTS)
    monkeypatch.setattr(reader, "_MAX_BLOCKS_PER_REQUEST", 3)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "run")


def empty_fragment(name: str, low: int, high: int, kinds: tuple[str, ...] = KINDS) -> Fragment:
    return Fragment(low, high - low, SHAPES[name], {kind: torch.full((high - low,), math.nan) for kind in kinds})


def rewrite_manifest(store: Store, commit: Commit, manifest: Manifest) -> Commit:
    data = encode(manifest)
    store.put(f"{commit.folder}manifest.json", data)
    changed = replace(commit, manifest_crc32=zlib.crc32(data))
    store.put(marker_key(commit.step), encode(changed))
    return changed


@pytest.mark.parametrize("seed", range(20))
def test_any_ranges_are_read_as_they_were_written(store: Store, seed: int) -> None:
    commit = write_checkpoint(store, snapshot(3), 1)
    draws = np.random.default_rng(seed)
    targets = {}
    for name, shape in SHAPES.items():
        low, high = sorted(draws.integers(0, math.prod(shape) + 1, 2))
        if low < high:
            targets[name] = empty_fragment(name, int(low), int(high))
    load_into(store, commit, targets, SHAPES)
    for name, part in targets.items():
        for kind in KINDS:
            expected = state(3)[f"{name}/{kind}"][part.offset : part.offset + part.numel]
            assert torch.equal(part.tensors[kind], expected)


def test_teacher_and_its_backbone_come_back_whole(store: Store) -> None:
    write_checkpoint(store, snapshot(3), 1)
    commit = latest_commit(store)
    assert commit is not None
    teacher = load_teacher(store, commit)
    assert {name: tuple(tensor.shape) for name, tensor in teacher.items()} == SHAPES
    assert all(torch.equal(tensor.flatten(), state(3)[f"{name}/ema"]) for name, tensor in teacher.items())
    assert set(load_teacher_backbone(store, commit)) == {"a", "b"}


def test_a_rank_fetches_only_the_blocks_that_it_needs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = write_checkpoint(store, snapshot(3), 1)
    fetched: list[int] = []
    get_range = LocalStore.get_range

    def counted(self: LocalStore, key: str, start: int, length: int) -> bytes:
        fetched.append(length)
        return get_range(self, key, start, length)

    monkeypatch.setattr(LocalStore, "get_range", counted)
    load_into(store, commit, {"backbone.a": empty_fragment("backbone.a", 6, 10, ("ema",))}, SHAPES)
    assert [length for length in fetched if length % (4 * BLOCK_ELEMENTS) == 0][-1] == 2 * 4 * BLOCK_ELEMENTS


def test_commit_says_what_it_holds(store: Store) -> None:
    write_checkpoint(store, snapshot(3, start=1), 1)
    commit = latest_commit(store)
    assert commit is not None
    assert (commit.step, commit.images_seen, commit.fingerprint) == (3, 30, "recipe")
    assert commit.ledger == ledger_key(1, 3)
    assert commit.written_by == {"workers": "1"}


def test_run_without_commit_has_none(store: Store) -> None:
    assert latest_commit(store) is None


def test_folder_without_marker_is_no_checkpoint_and_goes_with_the_next_commit(store: Store) -> None:
    torn = write_checkpoint(store, snapshot(3), 1)
    store.delete(marker_key(3))
    assert latest_commit(store) is None
    commit = write_checkpoint(store, snapshot(3), 1)
    assert latest_commit(store) == commit
    assert not list(store.list(torn.folder))


def test_only_the_newest_checkpoints_are_kept(store: Store) -> None:
    commits = [write_checkpoint(store, snapshot(step), 2) for step in range(1, 5)]
    kept = {re.sub(r"[^/]*$", "", info.key) for info in store.list("checkpoints/")}
    assert kept == {"checkpoints/", commits[2].folder, commits[3].folder}
    assert not store.exists(marker_key(2))
    assert list(read_history(store, 4)) == [(step, [(10 * step, 10)]) for step in range(4)]


def test_a_run_stays_committed_where_old_checkpoints_cannot_be_removed(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(store, snapshot(1), 1)

    def refuse(self: LocalStore, prefix: str) -> None:
        raise StorageError("no permission")

    monkeypatch.setattr(LocalStore, "delete_prefix", refuse)
    with caplog.at_level(logging.WARNING):
        commit = write_checkpoint(store, snapshot(2), 1)
    assert latest_commit(store) == commit
    assert "old checkpoints could not be removed: no permission." in caplog.text


def test_truncated_newest_checkpoint_falls_back_to_the_one_before(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    first = write_checkpoint(store, snapshot(1), 2)
    second = write_checkpoint(store, snapshot(2), 2)
    path = shard_path(store, second)
    path.write_bytes(path.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert latest_commit(store) == first
    assert f"{second.folder}rank-0-of-1.safetensors is truncated" in caplog.text
    discard_after(store, first.step)
    assert not store.exists(marker_key(2))
    assert [info.key for info in store.list("ledger/")] == [ledger_key(0, 1)]
    assert write_checkpoint(store, snapshot(2), 1) == latest_commit(store)


def flip_data(store: Store, commit: Commit) -> None:
    path = shard_path(store, commit)
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1  # of the average, whose name comes first
    path.write_bytes(data)


def spoil_header(store: Store, commit: Commit) -> None:
    path = shard_path(store, commit)
    path.write_bytes(path.read_bytes().replace(b"data_offsets", b"data_0ffsets"))


def spoil_manifest(store: Store, commit: Commit) -> None:
    path = Path(store.uri) / commit.folder / "manifest.json"
    path.write_text(path.read_text().replace("backbone.a", "backbone.x"))


def spoil_marker(store: Store, commit: Commit) -> None:
    path = Path(store.uri) / marker_key(commit.step)
    path.write_text(path.read_text().replace('"images_seen":20', '"images_seen":21'))


def remove_shard(store: Store, commit: Commit) -> None:
    shard_path(store, commit).unlink()


def remove_ledger(store: Store, commit: Commit) -> None:
    store.delete(str(commit.ledger))


DAMAGE = {
    flip_data: "rank-0-of-1.safetensors is corrupt",
    spoil_header: "rank-0-of-1.safetensors is corrupt",
    spoil_manifest: "manifest.json is corrupt",
    spoil_marker: "step-00000002.json is damaged",
    remove_shard: "rank-0-of-1.safetensors is missing",
    remove_ledger: "step-00000001-00000002.jsonl is missing",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_reader_takes_the_newest_checkpoint_that_is_whole(
    store: Store, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = write_checkpoint(store, snapshot(1), 2)
    damage(store, write_checkpoint(store, snapshot(2), 2))
    with caplog.at_level(logging.WARNING):
        found = read_newest(store, lambda commit: load_teacher(store, commit))
    assert found is not None
    teacher, commit = found
    assert commit == first
    assert torch.equal(teacher["backbone.b"].flatten(), state(1)["backbone.b/ema"])
    assert "checkpoint of step 2 is left out: " in caplog.text
    assert DAMAGE[damage] in caplog.text


def test_where_all_checkpoints_are_corrupt_each_is_named(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        flip_data(store, write_checkpoint(store, snapshot(step), 2))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CorruptCheckpoint, match=r"step-00000001\.\w+/rank-0-of-1.safetensors is corrupt.*start the run"),
    ):
        read_newest(store, lambda commit: load_teacher(store, commit))
    assert "checkpoint of step 2 is left out: checkpoints/step-00000002." in caplog.text


def test_a_corrupt_checkpoint_is_named_where_those_before_are_torn(store: Store) -> None:
    shard_path(store, write_checkpoint(store, snapshot(1), 2)).unlink()
    flip_data(store, write_checkpoint(store, snapshot(2), 2))
    with pytest.raises(CorruptCheckpoint, match=r"step-00000002\.\w+/rank-0-of-1.safetensors is corrupt"):
        read_newest(store, lambda commit: load_teacher(store, commit))


def test_a_reader_of_a_run_without_commits_finds_nothing(store: Store) -> None:
    with pytest.raises(CheckpointError, match=r"^run .* has no checkpoint yet \(expected one commit or more\)\. Let"):
        read_newest(store, lambda commit: load_teacher(store, commit))


def test_no_flipped_bit_of_a_marker_passes(store: Store) -> None:
    commit = write_checkpoint(store, snapshot(1), 1)
    whole = store.get(marker_key(1))
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 7
        try:
            found = decode_commit(bytes(flipped), marker_key(1))
        except CheckpointError:
            continue
        assert found == commit, whole[max(0, place - 20) : place + 1]


def test_a_marker_under_another_ones_name_is_damaged(store: Store) -> None:
    commit = write_checkpoint(store, snapshot(1), 1)
    with pytest.raises(CorruptCheckpoint, match=r"step-00000002\.json is damaged"):
        decode_commit(encode(commit), marker_key(2))


def test_a_commit_that_is_retired_while_it_is_read_is_a_diagnosis(store: Store) -> None:
    commit = write_checkpoint(store, snapshot(1), 1)
    write_checkpoint(store, snapshot(2), 1)
    for read in (load_teacher, read_manifest):
        with pytest.raises(CheckpointError, match="the checkpoint of step 1 was retired while it was read") as caught:
            read(store, commit)
        assert not isinstance(caught.value, CorruptCheckpoint)


def test_a_commit_that_is_retired_between_listing_and_reading_is_passed_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write_checkpoint(store, snapshot(step), 2)
    get = LocalStore.get

    def late(self: LocalStore, key: str) -> bytes:
        self.delete(marker_key(1))
        return get(self, key)

    monkeypatch.setattr(LocalStore, "get", late)
    assert latest_commit(store, before=2) is None


def test_what_cannot_be_reached_is_no_reason_to_fall_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        write_checkpoint(store, snapshot(step), 2)

    def down(self: LocalStore, key: str, start: int, length: int) -> bytes:
        raise StorageError("the server cannot be reached")

    monkeypatch.setattr(LocalStore, "get_range", down)
    with pytest.raises(StorageError, match="cannot be reached"):
        read_newest(store, lambda commit: load_teacher(store, commit))


def test_shards_of_larger_blocks_are_read_still(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard, "BLOCK_ELEMENTS", 1 << 20)
    commit = write_checkpoint(store, snapshot(1), 1)
    key = f"{commit.folder}manifest.json"
    data = store.get(key).replace(b',"block_elements":1048576', b"")
    store.put(key, data)
    older = replace(commit, manifest_crc32=zlib.crc32(data))
    assert torch.equal(load_teacher(store, older)["backbone.b"].flatten(), state(1)["backbone.b/ema"])


def test_missing_file_of_the_only_checkpoint_is_named(store: Store) -> None:
    commit = write_checkpoint(store, snapshot(1), 1)
    shard_path(store, commit).unlink()
    with pytest.raises(CheckpointError, match=f"{commit.folder}rank-0-of-1.safetensors is missing"):
        latest_commit(store)


@pytest.mark.parametrize(("start", "damage"), [(0, b"\xff\xff\xff"), (8, b"!!!!")])
def test_damaged_header_is_found(store: Store, start: int, damage: bytes) -> None:
    commit = write_checkpoint(store, snapshot(1), 1)
    path = shard_path(store, commit)
    data = bytearray(path.read_bytes())
    data[start : start + len(damage)] = damage
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-0-of-1\.safetensors is corrupt"):
        load_teacher(store, commit)


def test_manifest_that_was_not_committed_is_refused(store: Store) -> None:
    commit = write_checkpoint(store, snapshot(1), 1)
    path = Path(store.uri) / commit.folder / "manifest.json"
    path.write_text(path.read_text().replace("backbone.a", "backbone.x"))
    with pytest.raises(CheckpointError, match=r"manifest\.json is corrupt"):
        load_teacher(store, commit)


def test_missing_element_is_found(store: Store) -> None:
    commit = write_checkpoint(store, snapshot(1), 1)
    manifest = decode_manifest(store.get(f"{commit.folder}manifest.json"), "manifest.json")
    shard = manifest.shards[0]
    first, *others = shard.pieces
    shifted = replace(shard, pieces=(replace(first, offset=1), *others))
    changed = rewrite_manifest(store, commit, replace(manifest, shards=(shifted,)))
    with pytest.raises(CheckpointError, match=r"does not hold backbone\.a \(ema\) exactly once \(got 34;"):
        load_teacher(store, changed)


@pytest.mark.parametrize("shapes", [{**SHAPES, "head.d": (1,)}, {**SHAPES, "head.c": (24,)}])
def test_another_network_is_refused(store: Store, shapes: dict[str, tuple[int, ...]]) -> None:
    commit = write_checkpoint(store, snapshot(1), 1)
    with pytest.raises(CheckpointError, match="holds another network, 1 parameters differ"):
        load_into(store, commit, {}, shapes)


def test_another_recipe_is_refused(store: Store) -> None:
    commit = write_checkpoint(store, snapshot(1), 1)
    require_recipe(commit, "recipe")
    with pytest.raises(CheckpointError, match=r"belongs to another recipe \(got 'recipe'; expected other\)"):
        require_recipe(commit, "other")


def test_another_version_is_refused_and_not_skipped(store: Store) -> None:
    write_checkpoint(store, snapshot(1), 2)
    write_checkpoint(store, snapshot(2), 2)
    marker = json.loads(store.get(marker_key(2)))
    store.put(marker_key(2), json.dumps(marker | {"format": 2}).encode())
    with pytest.raises(CheckpointError, match="another version of histoscale"):
        latest_commit(store)


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"format": 1, "step": 1}', b"\xff\xfe"])
def test_damaged_marker_is_named(store: Store, data: bytes) -> None:
    store.put(marker_key(1), data)
    with pytest.raises(CheckpointError, match=r"checkpoints/step-00000001\.json is damaged"):
        latest_commit(store)


@pytest.mark.parametrize(
    "data", [b'{"format": 1}', b'{"format": 1, "shapes": {}, "shards": [{}]}', b'{"format":1,"shapes":[],"shards":[]}']
)
def test_damaged_manifest_is_named(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        decode_manifest(data, "manifest.json")


def test_failed_upload_commits_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_checkpoint(store, snapshot(1), 1)

    def refuse(self: LocalStore, key: str, parts: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(LocalStore, "put_parts", refuse)
    with pytest.raises(StorageError, match="the disk is full"):
        write_checkpoint(store, snapshot(2), 1)
    assert latest_commit(store) == first


def test_an_error_of_one_rank_is_the_error_of_all() -> None:
    def fail() -> None:
        raise CheckpointError("it is torn")

    for collective in (on_first_rank, on_every_rank):
        with pytest.raises(CheckpointError, match="it is torn"):
            collective(fail)
    assert on_first_rank(lambda: 7) == 7
    assert on_every_rank(lambda: 7) == [7]


def test_runs_join_neighbours_and_show_what_comes_twice() -> None:
    assert runs_of([4, 2, 3, 9]) == [(2, 3), (9, 1)]
    assert runs_of([2, 3, 3]) == [(2, 2), (3, 1)]
    assert merge_runs([(8, 4), (0, 4), (4, 4)]) == [(0, 12)]
    assert merge_runs([(0, 4), (0, 4)]) == [(0, 4), (0, 4)]


def test_replaced_attempts_of_all_ranks_stand_in_the_ledger_in_order(store: Store) -> None:
    shares = [
        StepRecord(0, ((4, 4),), (Fault(5, 0, "b" * 32, "blur", False), Fault(5, 1, "a" * 32, "background", False))),
        StepRecord(0, ((0, 4),), (Fault(2, 0, "a" * 32, "background", False),)),
    ]
    store.put(ledger_key(0, 2), encode_ledger([merge_records(shares), StepRecord(1, ((8, 8),))]))
    assert list(read_history(store, 2)) == [(0, [(0, 8)]), (1, [(8, 8)])]
    assert list(read_replacements(store, 2)) == [
        (0, [(2, 0, "a" * 32, "background"), (5, 0, "b" * 32, "blur"), (5, 1, "a" * 32, "background")]),
        (1, []),
    ]


def test_slides_that_are_out_are_committed_from_the_step_of_their_first_fault(store: Store) -> None:
    gone = Fault(11, 0, "a" * 32, "changed", True)
    first = replace(snapshot(1), records=[StepRecord(0, ((0, 10),), (Fault(3, 0, "c" * 32, "blur", False),))])
    assert write_checkpoint(store, first, keep_last=3).quarantine == ()
    records = [StepRecord(1, ((10, 10),), (gone,)), StepRecord(2, ((20, 10),), (replace(gone, sample_id=21),))]
    before = (Quarantined("b" * 32, 0, "gone"),)
    committed = write_checkpoint(store, replace(snapshot(3), records=records, quarantine=before), keep_last=3)
    assert committed.quarantine == (*before, Quarantined("a" * 32, 1, "changed"))
    assert latest_commit(store) == committed


@pytest.mark.parametrize(
    "ranges",
    [[(0, 2), (3, 5)], [(0, 2), (1, 5)], [(1, 5)], [(0, 4)], []],
    ids=["gap", "overlap", "late", "short", "none"],
)
def test_ledgers_that_do_not_cover_the_history_are_refused(store: Store, ranges: list[tuple[int, int]]) -> None:
    for start, stop in ranges:
        store.put(
            ledger_key(start, stop), encode_ledger([StepRecord(step, ((step, 1),)) for step in range(start, stop)])
        )
    with pytest.raises(CheckpointError, match="does not cover the committed steps once each"):
        list(read_history(store, 5))


def test_ledger_shorter_than_its_name_is_refused(store: Store) -> None:
    store.put(ledger_key(0, 5), encode_ledger([StepRecord(step, ((step, 1),)) for step in range(4)]))
    with pytest.raises(CheckpointError, match="does not cover the committed steps once each"):
        list(read_history(store, 5))


def test_uncommitted_ledgers_are_no_history(store: Store) -> None:
    for start, stop in [(0, 3), (3, 9)]:
        store.put(
            ledger_key(start, stop), encode_ledger([StepRecord(step, ((step, 1),)) for step in range(start, stop)])
        )
    assert [step for step, _ in read_history(store, 3)] == [0, 1, 2]
    delete_after(store, 3)
    assert [info.key for info in store.list("ledger/")] == [ledger_key(0, 3)]


def test_run_without_commit_discards_every_ledger(store: Store) -> None:
    store.put(ledger_key(0, 3), encode_ledger([]))
    discard_after(store, 0)
    assert not list(store.list("ledger/"))


def test_checkpoint_comes_back_from_a_bucket(s3_env: Any) -> None:
    bucket = open_store(f"s3://{s3_env.make_bucket()}/run")
    for step in (1, 2):
        write_checkpoint(bucket, snapshot(step), 1)
    commit = latest_commit(bucket)
    assert commit is not None
    teacher = load_teacher(bucket, commit)
    assert all(torch.equal(tensor.flatten(), state(2)[f"{name}/ema"]) for name, tensor in teacher.items())
    assert [step for step, _ in read_history(bucket, commit.step)] == [0, 1]
    assert len(list(bucket.list("checkpoints/"))) == 3  # marker, manifest, one shard
