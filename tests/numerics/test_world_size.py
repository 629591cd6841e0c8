"""Any world size and any ZeRO stage give the loss curve of one plain PyTorch process."""

import json
from pathlib import Path
from typing import Any

import pytest
from plain_reference import PlainRun, relative_distance
from workers import STEPS, TILES_PER_STEP, launch, three_workers

from histoscale.checkpoint.ledger import read_history
from histoscale.checkpoint.reader import latest_commit, load_teacher
from histoscale.storage import open_store

TOLERANCE = 1e-5

pytestmark = pytest.mark.timeout(900)  # several processes share what cores there are


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three-workers")
    launch(three_workers, 3, folder)
    return folder


@pytest.fixture(params=[(2, 1), (2, 2), (2, 3), (3, 2), (3, 3)], ids=lambda case: "workers-{}-zero-{}".format(*case))
def run(two_workers: Path, three: Path, request: pytest.FixtureRequest) -> Path:
    workers, stage = request.param
    return {2: two_workers, 3: three}[workers] / f"zero-{stage}"


def metrics_of(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    parts = sorted(run.glob(f"metrics-*-rank-{rank}.json"))
    return [step for part in parts for step in json.loads(part.read_text())]


def test_curve_equals_that_of_one_plain_process(plain: PlainRun, run: Path) -> None:
    metrics = metrics_of(run)
    assert [step["step"] for step in metrics] == list(range(STEPS))
    for name in ("loss", "dino", "ibot", "kde", "grad_norm"):
        expected = [step[name] for step in plain.metrics]
        assert [step[name] for step in metrics] == pytest.approx(expected, rel=TOLERANCE), name


def test_teacher_equals_that_of_one_plain_process(plain: PlainRun, run: Path) -> None:
    store = open_store(run)
    commit = latest_commit(store)
    assert commit is not None
    assert relative_distance(load_teacher(store, commit), plain.teacher) < TOLERANCE


def test_ledger_holds_each_sample_once(run: Path) -> None:
    history = list(read_history(open_store(run), STEPS))
    assert history == [(step, [(step * TILES_PER_STEP, TILES_PER_STEP)]) for step in range(STEPS)]


def test_every_rank_reports_the_same_metrics(three: Path) -> None:
    run = three / "zero-2"
    assert metrics_of(run, 0) == metrics_of(run, 1) == metrics_of(run, 2)


def test_the_plain_process_learns(plain: PlainRun) -> None:
    assert relative_distance(plain.initial_teacher, plain.teacher) > 1e-2
    for name in ("loss", "kde"):
        assert plain.metrics[-1][name] < plain.metrics[0][name]
