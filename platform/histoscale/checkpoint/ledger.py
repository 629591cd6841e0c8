"""Which samples entered which committed step.

A ledger covers the steps from one commit to the next, one JSON line each: `{"step": 7, "samples": [[112, 16]]}` means
samples 112 to 127. It is written before the commit marker; ledgers past the newest commit are no history.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence

from histoscale.errors import CheckpointError
from histoscale.storage.store import Store

FOLDER = "ledger/"

Run = tuple[int, int]
"""First sample id and count of consecutive ones."""

_LEDGER = re.compile(r"ledger/step-(\d{8,})-(\d{8,})\.jsonl")


def runs_of(sample_ids: Iterable[int]) -> list[Run]:
    """Sorted runs of consecutive ids; an id that comes twice stays visible as a run of its own."""
    return merge_runs((int(sample_id), 1) for sample_id in sample_ids)


def merge_runs(runs: Iterable[Run]) -> list[Run]:
    """Runs in order, joined where one ends exactly where the next begins."""
    merged: list[Run] = []
    for first, count in sorted(runs):
        if merged and sum(merged[-1]) == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + count)
        else:
            merged.append((first, count))
    return merged


def ledger_key(start: int, stop: int) -> str:
    """Key of the ledger of steps `start` to `stop - 1`."""
    return f"{FOLDER}step-{start:08d}-{stop:08d}.jsonl"


def encode_ledger(steps: Sequence[tuple[int, Sequence[Run]]]) -> bytes:
    """The lines of a ledger."""
    lines = (json.dumps({"step": step, "samples": [list(run) for run in runs]}) for step, runs in steps)
    return "".join(f"{line}\n" for line in lines).encode()


def read_history(store: Store, stop: int) -> Iterator[tuple[int, list[Run]]]:
    """Steps 0 to `stop - 1` in order, each with its samples; `stop` is the step of a commit.

    Raises:
        CheckpointError: The ledgers do not cover each of these steps exactly once.
    """
    expected = 0
    for start, end, key in _ledgers(store):
        if end > stop:
            continue
        for line in store.get(key).decode().splitlines():
            entry = json.loads(line)
            if entry["step"] != expected:
                raise _gap(expected, entry["step"])
            yield expected, [(int(first), int(count)) for first, count in entry["samples"]]
            expected += 1
        if expected != end or start >= end:
            raise _gap(expected, end)
    if expected != stop:
        raise _gap(expected, stop)


def delete_after(store: Store, stop: int) -> None:
    """Remove ledgers of steps that are not committed."""
    for _, end, key in _ledgers(store):
        if end > stop:
            store.delete(key)


def _ledgers(store: Store) -> list[tuple[int, int, str]]:
    matches = (_LEDGER.fullmatch(info.key) for info in store.list(FOLDER))
    return sorted((int(match[1]), int(match[2]), match[0]) for match in matches if match)


def _gap(expected: int, found: int) -> CheckpointError:
    return CheckpointError(
        "the ledger does not cover the committed steps once each",
        value=found,
        expected=f"step {expected}",
        remedy="do not edit the ledger folder; the run's samples can no longer be proven",
    )
