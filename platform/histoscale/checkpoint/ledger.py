"""Which samples entered which committed step.

A ledger covers the steps from one commit to the next, one JSON line each: `{"step": 7, "samples": [[112, 16]]}` means
samples 112 to 127. Where the content refused a tile, `"replaced": [[115, 0, "<slide id>", "blur"]]` says that attempt 0
at sample 115 gave way to the next. A ledger is written before the commit marker; those past the newest commit are no
history.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from histoscale.errors import CheckpointError
from histoscale.sampling.plan import MAX_ATTEMPTS
from histoscale.storage.json_object import count_of, decode_json, text_of
from histoscale.storage.store import Store
from histoscale.stream.faults import Fault

FOLDER = "ledger/"
_REMEDY = "restore it, and do not edit the ledger folder; without it the run's samples cannot be proven"

Run = tuple[int, int]
"""First sample id and count of consecutive ones."""

Replacement = tuple[int, int, str, str]
"""Sample id, attempt that was given up, slide id, reason."""


@dataclass(frozen=True)
class StepRecord:
    """What entered one step: all of it, or one rank's share."""

    step: int
    samples: tuple[Run, ...]
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """A line of a ledger."""

    step: int
    samples: list[Run]
    replaced: list[Replacement]


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


def merge_records(shares: Sequence[StepRecord]) -> StepRecord:
    """One step out of the shares of all ranks."""
    faults = sorted((fault for share in shares for fault in share.faults), key=lambda f: (f.sample_id, f.attempt))
    runs = merge_runs(run for share in shares for run in share.samples)
    return StepRecord(shares[0].step, tuple(runs), tuple(faults))


def encode_ledger(records: Iterable[StepRecord]) -> bytes:
    """The lines of a ledger."""
    return "".join(f"{json.dumps(_line(record))}\n" for record in records).encode()


def _line(record: StepRecord) -> dict[str, object]:
    line: dict[str, object] = {"step": record.step, "samples": [list(run) for run in record.samples]}
    if record.faults:
        line["replaced"] = [[fault.sample_id, fault.attempt, fault.slide_id, fault.reason] for fault in record.faults]
    return line


def read_history(store: Store, stop: int) -> Iterator[tuple[int, list[Run]]]:
    """Steps 0 to `stop - 1` in order, each with its samples; `stop` is the step of a commit.

    Raises:
        CheckpointError: The ledgers do not cover each of these steps exactly once, or are damaged.
    """
    for entry in _entries(store, stop):
        yield entry.step, entry.samples


def read_replacements(store: Store, stop: int) -> Iterator[tuple[int, list[Replacement]]]:
    """As `read_history`, with the attempts that the content refused instead of the samples."""
    for entry in _entries(store, stop):
        yield entry.step, entry.replaced


def replacements_of(store: Store, step: int) -> list[Replacement]:
    """The attempts that the content refused at one committed step; only the ledger that covers it is read.

    Raises:
        CheckpointError: No ledger covers the step, or the one that does is damaged.
    """
    for start, end, key in _ledgers(store):
        if start <= step < end:
            for entry in _lines(store, key):
                if entry.step == step:
                    return entry.replaced
    raise _gap(step, None)


def _entries(store: Store, stop: int) -> Iterator[_Entry]:
    expected = 0
    for start, end, key in _ledgers(store):
        if end > stop:
            continue
        for entry in _lines(store, key):
            if entry.step != expected:
                raise _gap(expected, entry.step)
            yield entry
            expected += 1
        if expected != end or start >= end:
            raise _gap(expected, end)
    if expected != stop:
        raise _gap(expected, stop)


def _lines(store: Store, key: str) -> Iterator[_Entry]:
    for number, line in enumerate(store.get(key).splitlines(), start=1):
        yield decode_json(
            line,
            _decode,
            kind=CheckpointError,
            what=f"line {number} of {key} is damaged",
            expected="a step, its samples and those that were replaced",
            remedy=_REMEDY,
        )


def _decode(values: Any) -> _Entry:  # noqa: ANN401 - what a damaged line holds may be anything
    """A line as it was written; see `decode_json` for what else may be raised."""
    if not {"step", "samples"} <= values.keys() <= {"step", "samples", "replaced"}:
        raise ValueError("a name that is none of ours")
    samples = [(count_of(first), count_of(count)) for first, count in values["samples"]]
    replaced = [
        (count_of(sample_id), count_of(attempt), text_of(slide_id), text_of(reason))
        for sample_id, attempt, slide_id, reason in values.get("replaced", [])
    ]
    for sample_id, attempt, _, _ in replaced:
        if attempt > MAX_ATTEMPTS or not any(first <= sample_id < first + count for first, count in samples):
            raise ValueError("an attempt that cannot be, or at a sample of another step")
    return _Entry(count_of(values["step"]), samples, replaced)


def delete_after(store: Store, stop: int) -> None:
    """Remove ledgers of steps that are not committed."""
    for _, end, key in _ledgers(store):
        if end > stop:
            store.delete(key)


def _ledgers(store: Store) -> list[tuple[int, int, str]]:
    matches = (_LEDGER.fullmatch(info.key) for info in store.list(FOLDER))
    return sorted((int(match[1]), int(match[2]), match[0]) for match in matches if match)


def _gap(expected: int, found: int | None) -> CheckpointError:
    return CheckpointError(
        "the ledger does not cover the committed steps once each",
        value=found,
        expected=f"step {expected}",
        remedy=_REMEDY,
    )
