"""Suggestions of a search: inside what the spec names, the same for the same rows, better with what is known."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.test_sweep_search import SEARCH, build_of
from tests.unit.test_sweep_spec import SCALING
from tests.unit.test_sweep_trials import BASE

from histoscale.errors import SweepError
from histoscale.storage import open_store
from histoscale.sweeps import job
from histoscale.sweeps.folder import SUGGESTIONS, SweepFolder
from histoscale.sweeps.rows import TrialRow, row_of
from histoscale.sweeps.search import scaling_build, search_trial
from histoscale.sweeps.spec import ScalingSpec
from histoscale.sweeps.trial import Trial

pytest.importorskip("optuna")
from histoscale.sweeps.suggest import suggest


def rows_of(count: int) -> list[TrialRow]:
    """A search whose error is least at a rate of 1e-3."""
    search, build = build_of()
    rows: list[TrialRow] = []
    for number in range(count):
        suggestion = suggest(search, rows, "oral", 1, seed=0)[0]
        error = min(0.9, abs(suggestion["optim.lr"] - 1e-3) / 1e-2)
        row = row_of(search_trial(build, suggestion, number, 0), scores={"oral": 1.0 - error})
        rows.append(replace(row, reason="diverged", scores={}) if number == 3 else row)
    return rows


def test_suggestions_are_what_the_spec_names_and_follow_from_the_rows() -> None:
    search, _ = build_of()
    rows = rows_of(4)
    first = suggest(search, rows, "oral", 2, seed=0)
    assert first == suggest(search, list(reversed(rows)), "oral", 2, seed=0)
    for suggestion in first:
        assert 1e-4 <= suggestion["optim.lr"] <= 1e-2
        assert suggestion["crops.local_count"] in range(2, 7)
        assert suggestion["loss.centering"] in ("sinkhorn", "center")


def test_what_is_known_makes_suggestions_better() -> None:
    rows = [row for row in rows_of(40) if not row.reason]
    early, late = rows[:10], rows[-10:]
    assert statistics.median(row.error("oral") for row in late) < statistics.median(row.error("oral") for row in early)


class Killed(Exception):
    """The driver is gone; a fake."""


def planned_at(path: Path) -> job.PlannedSweep:
    spec = ScalingSpec.model_validate(
        {**SCALING, "search": {**SEARCH, "trials": 4}, "resources": {"max_concurrent": 2}}
    )
    request = job.SweepRequest("spec.yaml", "/index", str(path), "somebody")
    return job.PlannedSweep(request, spec, (), scaling_build(spec, BASE))


def test_a_trial_that_a_kill_has_left_goes_on_as_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[str, Any] = {}
    kills = [True]

    def run(setting: Any, trials: Sequence[Trial], tell: Any) -> dict[str, TrialRow]:
        """In place of Tune: the first call with two trials ends the second one, and the driver dies."""
        folder = setting.folder
        for trial in reversed(trials):
            if folder.result(trial.name) is None:
                settings = begun.setdefault(trial.name, dict(trial.settings))
                assert settings == dict(trial.settings)
                folder.keep(row_of(trial, scores={"tissue": 0.5 + trial.recipe.optim.lr}))
                if kills:
                    kills.pop()
                    raise Killed
        return folder.results()

    monkeypatch.setattr(job, "run_trials", run)
    with pytest.raises(Killed):
        job._search(planned_at(tmp_path), print)
    rows = job._search(planned_at(tmp_path), print)
    searched = [row.name for row in rows if row.role == "search"]
    assert len(searched) == len(set(searched)) == 4
    assert sum(row.role == "finalist" for row in rows) == 4


def test_a_damaged_record_of_suggestions_is_a_diagnosis(tmp_path: Path) -> None:
    (tmp_path / SUGGESTIONS).write_text("{")
    with pytest.raises(SweepError, match=r"suggestions\.json of sweep .* is damaged"):
        SweepFolder(open_store(tmp_path)).suggestions()
