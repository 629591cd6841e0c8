"""Suggestions of a search: inside what the spec names, the same for the same rows, better with what is known."""

import statistics
from dataclasses import replace

import pytest
from tests.unit.test_sweep_search import build_of

from histoscale.sweeps.rows import TrialRow, row_of
from histoscale.sweeps.search import search_trial

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
