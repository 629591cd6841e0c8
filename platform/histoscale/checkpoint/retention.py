"""Which commits stay, and what goes with the others: old commits, attempts that came to nothing, ledgers of lost steps.

A marker goes before what it names, so that nobody finds a commit without its files. Who reads a commit while it is
retired is told so by `reader.load_into`.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from histoscale.checkpoint import ledger
from histoscale.checkpoint.manifest import (
    FOLDER,
    CorruptCheckpoint,
    decode_commit,
    folder_prefix,
    folders_below,
    marker_key,
    marker_step,
)
from histoscale.errors import CheckpointError
from histoscale.storage.store import Store

BEST_KEY = "evaluations/best.json"
"""Where an evaluation says which step is the best: `{"step": 4000}`. The commit of that step stays."""


@dataclass(frozen=True)
class Retention:
    """Which commits stay.

    Attributes:
        keep_last: The newest ones, so many.
        keep_every_steps: Those of multiples of so many steps, for ever.
    """

    keep_last: int
    keep_every_steps: int | None = None

    def kept(self, steps: Collection[int], best: int | None) -> set[int]:
        """Those of the committed `steps` that stay, the best one among them."""
        newest = set(sorted(steps)[-self.keep_last :])
        every = self.keep_every_steps
        return newest | {step for step in steps if step == best or (every and step % every == 0)}


def remove_retired(store: Store, retention: Retention) -> None:
    """Delete all commits that do not stay, and every folder that no commit names.

    Raises:
        CheckpointError: `BEST_KEY` does not say which step is the best; nothing is deleted.
    """
    keys = [info.key for info in store.list(FOLDER)]
    steps = [step for step in map(marker_step, keys) if step is not None]
    best = read_best(store)
    kept = retention.kept(steps, best["step"] if best else None)
    folders = folders_below(FOLDER, keys)
    needed = {folder for step in kept for folder in _folders_of(store, step, folders)}
    for step in sorted(set(steps) - kept):
        store.delete(marker_key(step))
    for folder in sorted(folders - needed):
        store.delete_prefix(folder)


def discard_after(store: Store, step: int) -> None:
    """Remove what claims to be later than the commit of `step`: markers, then ledgers; their folders go at the next."""
    for later in reversed([each for each in committed_steps(store) if each > step]):
        store.delete(marker_key(later))
    ledger.delete_after(store, step)


def committed_steps(store: Store) -> list[int]:
    """Steps of the commits of a run that are there, ascending."""
    return sorted(step for info in store.list(FOLDER) if (step := marker_step(info.key)) is not None)


def _folders_of(store: Store, step: int, folders: Collection[str]) -> set[str]:
    """The folder of a commit; where its marker is damaged, every folder that may be it."""
    try:
        return {decode_commit(store.get(marker_key(step)), marker_key(step)).folder}
    except CorruptCheckpoint:
        return {folder for folder in folders if folder.startswith(folder_prefix(step, "").rstrip("/"))}


def read_best(store: Store) -> dict[str, Any] | None:
    """What `BEST_KEY` holds, with an integer `step`; None where nothing was evaluated.

    Raises:
        CheckpointError: It does not say which step is the best.
    """
    if not store.exists(BEST_KEY):
        return None
    try:
        best = json.loads(store.get(BEST_KEY))
        return {**best, "step": int(best["step"])}
    except (ValueError, LookupError, TypeError):
        raise CheckpointError(
            f"{BEST_KEY} does not say which step is the best",
            expected='{"step": 4000}',
            remedy="write it again, or delete it",
        ) from None
