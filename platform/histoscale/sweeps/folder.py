"""The folder of a sweep: what it tries, one result for each trial that has ended, tables and the report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from histoscale.errors import SweepError
from histoscale.storage import Store, join
from histoscale.storage.json_object import read_json
from histoscale.sweeps.rows import TrialRow, from_json, to_csv, to_json, to_parquet
from histoscale.sweeps.trial import Trial

SPEC, SUGGESTIONS, REPORT = "sweep.json", "suggestions.json", "report.html"
CSV, PARQUET = "trials.csv", "trials.parquet"
_TRIALS, _RESULTS, _LOGS = "trials", "results", "logs"


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep lies.

    Attributes:
        store: Its root.
    """

    store: Store

    def run_uri(self, trial: str) -> str:
        """The run folder of a trial."""
        return join(self.store.uri, f"{_TRIALS}/{trial}")

    def begin(self, asked: Mapping[str, Any]) -> None:
        """Record what the sweep tries, or hold it against what is recorded.

        Args:
            asked: Everything that decides what the trials are, as JSON has it.

        Raises:
            SweepError: The folder is another sweep's, or holds something else.
        """
        wanted = json.loads(json.dumps(asked, default=str))
        if not self.store.exists(SPEC):
            if next(iter(self.store.list()), None) is not None:
                raise SweepError(
                    f"{self.store.uri} holds something else than a sweep",
                    expected="an empty folder or the folder of a sweep",
                    remedy="give another place with --out",
                )
            self.store.put(SPEC, json.dumps(wanted, indent=1).encode())
            return
        recorded: dict[str, Any] = read_json(
            self.store,
            SPEC,
            dict,
            kind=SweepError,
            what=f"{SPEC} of sweep {self.store.uri} is damaged",
            expected="what the sweep tries",
            remedy="restore it as the sweep wrote it, or give another --out",
        )
        differing = sorted(name for name in {*recorded, *wanted} if recorded.get(name) != wanted.get(name))
        if differing:
            raise SweepError(
                f"{self.store.uri} is the folder of another sweep",
                value=f"{differing[0]} is {wanted.get(differing[0])}",
                expected=f"{recorded.get(differing[0])}",
                remedy="give another --out, or the spec and the places that the sweep was started with",
            )

    def results(self) -> dict[str, TrialRow]:
        """Name of a trial that has ended -> its row."""
        keys = [info.key for info in self.store.list(_RESULTS) if info.key.endswith(".json")]
        rows = [from_json(self.store.get(key)) for key in keys]
        return {row.name: row for row in rows}

    def result(self, trial: str) -> TrialRow | None:
        """The row of a trial, or None where it has not ended."""
        key = f"{_RESULTS}/{trial}.json"
        return from_json(self.store.get(key)) if self.store.exists(key) else None

    def keep(self, row: TrialRow) -> None:
        """Record that a trial has ended."""
        self.store.put(f"{_RESULTS}/{row.name}.json", to_json(row))

    def suggestions(self) -> list[dict[str, Any]]:
        """What a search has tried or is trying, in order: field -> value of each.

        Raises:
            SweepError: The record is damaged.
        """
        if not self.store.exists(SUGGESTIONS):
            return []
        return read_json(
            self.store,
            SUGGESTIONS,
            lambda values: [dict(each) for each in values["suggestions"]],
            kind=SweepError,
            what=f"{SUGGESTIONS} of sweep {self.store.uri} is damaged",
            expected="what the search wrote",
            remedy=f"restore {SUGGESTIONS}, or begin the sweep in another folder",
        )

    def keep_suggestions(self, suggestions: Sequence[Mapping[str, Any]]) -> None:
        """Record them before any of them is tried: a trial that is interrupted goes on as what it was."""
        self.store.put(SUGGESTIONS, json.dumps({"suggestions": suggestions}, indent=1).encode())

    def log(self, trial: str, lines: Sequence[str]) -> None:
        """Write what a trial has told."""
        self.store.put(f"{_LOGS}/{trial}.txt", "".join(f"{line}\n" for line in lines).encode())

    def publish(self, rows: Sequence[TrialRow], page: str) -> str:
        """Write tables and report; gives the report's place."""
        self.store.put(CSV, to_csv(rows).encode())
        self.store.put(PARQUET, to_parquet(rows))
        self.store.put(REPORT, page.encode())
        return join(self.store.uri, REPORT)


def in_order(trials: Sequence[Trial], results: Mapping[str, TrialRow]) -> list[TrialRow]:
    """The rows that there are, in the order of the trials."""
    return [results[trial.name] for trial in trials if trial.name in results]
