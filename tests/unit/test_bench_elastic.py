import json
from pathlib import Path

import pytest

from histoscale.bench.elastic import curve_difference, find_trainers
from histoscale.errors import RunError
from histoscale.observe.metrics import METRICS_KEY


def run(folder: Path, losses: list[float]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": step, "loss/total": loss}) + "\n" for step, loss in enumerate(losses)]
    (folder / METRICS_KEY).write_text("".join(lines))
    return folder


def test_the_difference_of_two_curves_is_the_largest_relative_one(tmp_path: Path) -> None:
    one, other = run(tmp_path / "one", [4.0, 2.0]), run(tmp_path / "other", [4.0, 2.1])
    assert curve_difference(one, other) == pytest.approx(0.05)


def test_curves_of_different_length_are_refused(tmp_path: Path) -> None:
    one, other = run(tmp_path / "one", [4.0, 2.0]), run(tmp_path / "other", [4.0])
    with pytest.raises(RunError, match="differ in length"):
        curve_difference(one, other)


def test_without_a_worker_there_is_nothing_to_kill() -> None:
    with pytest.raises(RunError, match="no worker is there"):
        find_trainers()
