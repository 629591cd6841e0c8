"""What the driver does where workers leave out a corrupt commit: it plans again from the one before."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from tests.unit.snapshots import snapshot

from histoscale.checkpoint.manifest import marker_key
from histoscale.checkpoint.reader import latest_commit
from histoscale.checkpoint.writer import write_checkpoint
from histoscale.cluster import pretrain as driver
from histoscale.cluster.worker import _require_planned
from histoscale.config.running import TrackingSection
from histoscale.errors import CheckpointError
from histoscale.storage import open_store
from histoscale.storage.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A run with commits of steps 1 and 2."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    store = open_store(tmp_path / "run")
    for step in (1, 2):
        write_checkpoint(store, snapshot(step), 2)
    yield store
    dist.destroy_process_group()


def spec(store: Store, committed_step: int) -> Any:
    return SimpleNamespace(committed_step=committed_step, run_uri=store.uri)


def test_steps_before_the_drivers_plan_are_refused(store: Store) -> None:
    _require_planned(spec(store, 2), 2)
    _require_planned(spec(store, 2), 7)  # another attempt, later
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 2 of .* is corrupt and was left out"):
        _require_planned(spec(store, 2), 1)


def test_the_driver_plans_again_once_a_commit_was_left_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    started_at, told = [], []

    def go_on(checked: Any, *rest: Any) -> str:
        commit = latest_commit(store)
        started_at.append(commit.step if commit else 0)
        if len(started_at) == 1:
            store.delete(marker_key(2))  # as the workers do
            _require_planned(spec(store, 2), 1)
        return "outcome"

    outcome: Any = run(store, go_on, told, monkeypatch)
    assert (outcome, started_at) == ("outcome", [2, 1])
    assert told == [
        f"warning: the checkpoint of step 2 of {store.uri} is corrupt and was left out (got 'step 1'; "
        "expected step 2). Run the same command again, which goes on from the one before."
    ]


def test_any_other_error_of_checkpoints_ends_the_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def go_on(checked: Any, *rest: Any) -> str:
        raise CheckpointError("the checkpoint belongs to another recipe")

    with pytest.raises(CheckpointError, match="another recipe"):
        run(store, go_on, [], monkeypatch)


def run(store: Store, go_on: Any, told: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(driver, "Lease", lambda store, holder: contextlib.nullcontext())
    monkeypatch.setattr(driver, "read_run", lambda store: None)
    monkeypatch.setattr(driver, "resolve_device", lambda cluster, precision: "cpu")
    monkeypatch.setattr(driver, "_go_on", go_on)
    request = SimpleNamespace(
        recipe=SimpleNamespace(cluster=None, precision="fp32", tracking=TrackingSection()), holder="job"
    )
    checked: Any = SimpleNamespace(store=store, request=request)
    return driver.pretrain(checked, told.append)
