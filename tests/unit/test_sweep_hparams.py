"""HParams: every trial with a score is a run of TensorBoard, with what was varied and what was measured."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.unit.test_sweep_folder import trials

from histoscale.storage import open_store
from histoscale.sweeps.hparams import measured, varied, write_hparams
from histoscale.sweeps.rows import row_of


def test_trials_with_scores_are_runs_and_are_replaced(tmp_path: Path) -> None:
    good, bad = trials()[:2]
    rows = [row_of(good, scores={"oral": 0.75}, loss=2.5, latency_ms=1.0), row_of(bad, reason="diverged")]
    store = open_store(tmp_path)
    for _ in range(2):
        write_hparams(store, rows)
        files = list((tmp_path / "events").rglob("events*"))
        assert [file.parent.name for file in files] == [good.name]
    events = EventAccumulator(str(files[0].parent))
    events.Reload()
    assert events.Scalars("score/oral")[0].value == 0.75
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_what_was_varied_is_plain() -> None:
    row = row_of(trials()[0], scores={"oral": 0.75}, loss=None)
    assert varied(row)["model.arch"] == row.arch
    assert all(isinstance(value, str | int | float) for value in varied(row).values())
    assert measured(row) == {"score/oral": 0.75, "parameters": float(row.parameters), "flops": row.flops}
