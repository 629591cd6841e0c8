"""The parent of a forked run: which checkpoint of which other run it began from.

A fork takes the parent's weights, moments and average once, and numbers its own steps from 0. From its first commit on
it never looks at the parent again; what stays is the record, which also says how many updates the moments had behind
them, as Adam's bias correction goes by that.
"""

import json
from dataclasses import asdict, dataclass

from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.reader import commit_at
from histoscale.errors import CheckpointError, RunError
from histoscale.storage import open_store
from histoscale.storage.store import Store

PARENT_KEY = "parent.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Parent:
    """A committed checkpoint of another run.

    Attributes:
        uri: Its run folder.
        step: Of the checkpoint.
        fingerprint: Of its recipe.
        manifest_crc32: Checksum of the checkpoint's manifest, which holds those of all its data.
        updates: Updates that its Adam moments had behind them: its step, and those of its own parent.
    """

    uri: str
    step: int
    fingerprint: str
    manifest_crc32: int
    updates: int

    def line(self) -> str:
        """A line for people."""
        return f"forked from {self.uri} at step {self.step}, {self.fingerprint}@{self.step}:{self.manifest_crc32:08x}"


def parent_at(uri: str, commit: Commit, grandparent: Parent | None) -> Parent:
    """The record of a checkpoint as a parent.

    Args:
        uri: The run folder of the checkpoint.
        commit: The checkpoint.
        grandparent: What that run was forked from, if it was.
    """
    earlier = grandparent.updates if grandparent else 0
    return Parent(uri, commit.step, commit.fingerprint, commit.manifest_crc32, commit.step + earlier)


def read_parent(store: Store) -> Parent | None:
    """What a run was forked from; None where it began from new weights.

    Raises:
        RunError: The record cannot be read.
    """
    if not store.exists(PARENT_KEY):
        return None
    try:
        values = json.loads(store.get(PARENT_KEY))
        version = values.pop("format")
        if version == FORMAT_VERSION:
            return Parent(**values)
    except (ValueError, KeyError, TypeError, AttributeError):
        version = None
    raise RunError(
        f"{PARENT_KEY} of run {store.uri} cannot be read",
        value=version,
        expected=f"the parent of a fork, format {FORMAT_VERSION}",
        remedy="restore it: without it nobody can tell what the run began from",
    )


def write_parent(store: Store, parent: Parent | None) -> None:
    """Record what a run is forked from, or that it is not."""
    if parent is None:
        store.delete(PARENT_KEY)
    else:
        store.put(PARENT_KEY, json.dumps({"format": FORMAT_VERSION, **asdict(parent)}, indent=1).encode())


def open_parent(parent: Parent) -> tuple[Store, Commit]:
    """The parent's run folder and the checkpoint, the very one that was recorded.

    Raises:
        CheckpointError: It is gone, torn, or another one by now.
        StorageError: It cannot be reached.
    """
    store = open_store(parent.uri)
    commit = commit_at(store, parent.step)
    if (commit.fingerprint, commit.manifest_crc32) != (parent.fingerprint, parent.manifest_crc32):
        raise CheckpointError(
            f"the checkpoint of step {parent.step} of {parent.uri} is not the one that this run was forked from",
            value=f"{commit.fingerprint}:{commit.manifest_crc32:08x}",
            expected=f"{parent.fingerprint}:{parent.manifest_crc32:08x}",
            remedy="restore it, or fork again into a new run folder",
        )
    return store, commit
