"""Workers of a run that another job has by now: all of them end with the diagnosis, and what is committed stays."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from workers import _error_of, launch, tiny_recipe, turns

from histoscale.checkpoint.ledger import ledger_key
from histoscale.cluster.lease import require_lease
from histoscale.storage import open_store

THEIRS = ledger_key(1, 9)

pytestmark = pytest.mark.timeout(600)


def two_workers(rank: int, folder: Path) -> None:
    """A run that is taken over after its first commit, and goes on, and is resumed."""
    from histoscale.train.trainer import build_trainer

    recipe, store = tiny_recipe(zero_stage=2), open_store(folder)
    fence = partial(require_lease, store, "ours")
    trainer = build_trainer(recipe, torch.device("cpu"), store, fence)
    trainer.resume()
    trainer.step(0, turns(recipe, rank, 0))
    trainer.save(1)
    trainer.step(1, turns(recipe, rank, 1))
    dist.barrier()
    if rank == 0:
        store.put("lease.json", b'{"holder": "job-theirs", "token": "theirs", "beat": 0}')
    dist.barrier()
    report: dict[str, Any] = {"save": _error_of(partial(trainer.save, 2))}
    store.put(THEIRS, b"theirs, on its way to a commit")
    report["resume"] = _error_of(build_trainer(recipe, torch.device("cpu"), store, fence).resume)
    dist.barrier()
    report["files"] = sorted(info.key for info in store.list() if info.key.count("/") == 1)
    (folder / f"report-{rank}.txt").write_text(json.dumps(report))


def test_every_rank_is_told_and_nothing_of_the_new_holder_is_removed(tmp_path: Path) -> None:
    open_store(tmp_path).put("lease.json", b'{"holder": "job-ours", "token": "ours", "beat": 0}')
    launch(two_workers, 2, tmp_path)
    for rank in (0, 1):
        report = json.loads((tmp_path / f"report-{rank}.txt").read_text())
        refusal = f"RunError: run {tmp_path} was taken over by another job (got 'job-theirs'"
        assert report["save"].startswith(refusal)
        assert report["resume"].startswith(refusal)
        assert [key for key in report["files"] if key.startswith("checkpoints")] == ["checkpoints/step-00000001.json"]
        assert THEIRS in report["files"]
