"""What a step refuses to train on, and how ranks agree."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)  # several processes share what cores there are


@pytest.fixture(params=list(product((1, 2, 3), (0, 1))), ids=lambda case: "zero-{}-rank-{}".format(*case))
def report(two_workers: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    stage, rank = request.param
    return json.loads((two_workers / f"report-{stage}-rank-{rank}.json").read_text())


def test_non_finite_loss_of_one_rank_stops_all_before_the_update(report: dict[str, Any]) -> None:
    assert report["loss: error"].startswith(
        "NonFiniteError: the loss is not finite, so no update was made (got 'dino nan"
    )
    assert report["loss: unchanged"]


def test_non_finite_gradient_of_one_rank_stops_all_before_the_update(report: dict[str, Any]) -> None:
    assert report["gradient: error"].startswith("NonFiniteError: the gradient is not finite, so no update was made")
    assert report["gradient: unchanged"]


def test_one_rank_asks_to_stop_and_all_know(report: dict[str, Any]) -> None:
    assert [report["asked to stop at 0"], report["asked to stop at 1"]] == [True, False]


def test_step_out_of_order_is_refused(report: dict[str, Any]) -> None:
    assert report["order: error"].startswith("TrainingError: a step is out of order (got 3; expected step 2). Begin")


def test_save_of_another_step_is_refused(report: dict[str, Any]) -> None:
    assert report["save: error"].startswith("TrainingError: a checkpoint is asked for at another step")


@pytest.mark.parametrize("rank", [0, 1])
def test_no_step_is_taken_on_a_checkpoint_that_was_read_in_part(two_workers: Path, rank: int) -> None:
    report = json.loads((two_workers / f"in-part-rank-{rank}.json").read_text())
    assert report["resume"].startswith("CorruptCheckpoint: ")
    assert report["read"], "some of it is in the student's weights"
    refusal = "TrainingError: the state of this run was read in part only"
    assert report["step"].startswith(refusal)
    assert report["save"].startswith(refusal)
