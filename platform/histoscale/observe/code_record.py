"""What a run records of the code that trained it, as reports, trackers and model cards tell it."""

from collections.abc import Mapping
from typing import Any

from histoscale.errors import RunError
from histoscale.storage import Store
from histoscale.storage.json_object import read_json, text_of

PROVENANCE_FOLDER = "provenance"
_PACKAGES = ("torch", "deepspeed", "ray")


def read_provenance(store: Store) -> list[dict[str, Any]]:
    """A record for each different code that trained a run.

    Raises:
        RunError: A record is damaged.
    """
    return [_record(store, info.key) for info in store.list(PROVENANCE_FOLDER) if info.key.endswith(".json")]


def code_line(record: Mapping[str, Any]) -> str:
    """The code of a record: its hash, and its commit where it is known."""
    git = record.get("git")
    at = f", commit {git['commit'][:12]}{' and changes' if git['difference'] else ''}" if git else ""
    return f"source {record['source_sha256'][:12]}{at}"


def code_lines(store: Store) -> list[str]:
    """For each different code of a run its line, with Python and the packages that decide most.

    Raises:
        RunError: A record is damaged.
    """
    lines = []
    for record in read_provenance(store):
        packages = ", ".join(f"{name} {record['packages'].get(name, 'unknown')}" for name in _PACKAGES)
        lines.append(f"{code_line(record)}, Python {record['python']}, {packages}")
    return lines


def _record(store: Store, key: str) -> dict[str, Any]:
    def decoded(values: Any) -> dict[str, Any]:  # noqa: ANN401 - whatever the file holds
        record = {name: text_of(values[name]) for name in ("source_sha256", "python", "platform")}
        git = values.get("git")
        told = {"commit": text_of(git["commit"]), "difference": text_of(git["difference"])} if git else None
        return {**record, "packages": {name: text_of(at) for name, at in values["packages"].items()}, "git": told}

    return read_json(
        store,
        key,
        decoded,
        kind=RunError,
        what=f"{key} of run {store.uri} is damaged",
        expected="the code and the packages that trained the run",
        remedy=f"delete {key}: only reports and cards know less without it",
    )
