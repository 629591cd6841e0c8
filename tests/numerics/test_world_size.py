"""Any world size and any ZeRO stage give the curve, the weights and the samples of one plain PyTorch process."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grid import (
    KINDS,
    STAGES,
    STEPS,
    TERMS,
    Leg,
    curve_distance,
    record_of,
    state_of,
    tensor_distances,
    train_legs,
    train_under_ray,
)
from plain_reference import PlainRun, relative_distance
from workers import LIVELY_ARCH, TILES_PER_STEP, launch
from workers import STEPS as FEW_STEPS

from histoscale.bench.ray_local import local_ray
from histoscale.checkpoint.ledger import read_history
from histoscale.checkpoint.reader import latest_commit, load_teacher
from histoscale.cluster.job import ENVIRONMENT
from histoscale.storage import open_store

TOLERANCE = 1e-5
TENSOR_TOLERANCE = 1e-4  # of each tensor, its moments too
GRID = {f"workers-{size}-zero-{stage}": (size, stage) for size in (1, 2, 3, 4) for stage in STAGES}
UNDER_RAY = {"ray-workers-2-zero-3": (2, 3), "ray-workers-3-zero-2": (3, 2)}

pytestmark = pytest.mark.timeout(900)  # several processes share what cores there are


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A local cluster whose workers can import the helpers of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "OMP_WAIT_POLICY": "PASSIVE"}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        with local_ray(cpus=8, object_store_bytes=512 * 2**20):
            yield


def slow(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(params=["resumed", *slow(GRID), *slow(UNDER_RAY)])
def run(grid_folder: Path, request: pytest.FixtureRequest) -> Path:
    """A run of thirty steps; workers that are started take all stages."""
    name: str = request.param
    if name == "resumed":
        request.getfixturevalue("grid_groups")
    elif not (grid_folder / name).exists():
        if name in UNDER_RAY:
            request.getfixturevalue("ray_cluster")
            train_under_ray(grid_folder, name, *UNDER_RAY[name])
        else:
            size, _ = GRID[name]
            legs = [Leg(other, stage) for other, (theirs, stage) in GRID.items() if theirs == size]
            launch(train_legs, size, grid_folder, legs)
    return grid_folder / name


def test_curve_equals_that_of_one_plain_process(plain_grid: PlainRun, run: Path) -> None:
    metrics = record_of(run).metrics
    assert [step["step"] for step in metrics] == list(range(STEPS))
    for name in (*TERMS, "grad_norm"):
        assert curve_distance(metrics, plain_grid.metrics, name) < TOLERANCE, name


def test_weights_moments_and_teacher_equal_those_of_one_plain_process(plain_grid: PlainRun, run: Path) -> None:
    state = state_of(run)
    for kind in KINDS:
        assert relative_distance(state[kind], plain_grid.state[kind]) < TOLERANCE, kind
        distances = tensor_distances(state[kind], plain_grid.state[kind])
        assert max(distances.values()) < TENSOR_TOLERANCE, (kind, max(distances, key=distances.__getitem__))


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_gradients_in_bf16_are_the_same_with_three_workers_as_with_one(grid_groups: Path, stage: int) -> None:
    """No gradient may be scaled by a size that is no power of two before it is rounded to bf16.

    After one step: the weights that the second one computes with are rounded to bf16 once more, where any difference
    may become one of the last digit.
    """
    three, one = (grid_groups / f"bf16-{size}-{stage}" for size in (3, 1))
    for name in (*TERMS, "grad_norm"):
        assert curve_distance(record_of(three).metrics, record_of(one).metrics, name) < 1e-6, name
    moments = [state_of(run, step=1)["exp_avg"] for run in (three, one)]
    assert relative_distance(*moments) < 1e-6


def test_sample_ids_crops_and_masks_are_the_same_to_the_bit(grid_inputs: dict[str, dict[str, str]], run: Path) -> None:
    assert record_of(run).inputs == grid_inputs


def test_groups_learn_at_the_rates_of_one_plain_process(plain_grid: PlainRun, run: Path) -> None:
    rates = record_of(run).rates
    assert list(map(len, rates)) == list(map(len, plain_grid.rates))
    for ours, theirs in zip(rates, plain_grid.rates, strict=True):
        for pair, expected in zip(ours, theirs, strict=True):
            assert pair == pytest.approx(expected, rel=1e-9)


def test_ledger_holds_each_sample_once(run: Path) -> None:
    history = list(read_history(open_store(run), STEPS))
    assert history == [(step, [(step * TILES_PER_STEP, TILES_PER_STEP)]) for step in range(STEPS)]


def test_the_plain_process_learns(plain_grid: PlainRun) -> None:
    assert relative_distance(plain_grid.initial_teacher, plain_grid.teacher) > 1e-2
    for name in ("loss", "kde"):
        assert plain_grid.metrics[-1][name] < plain_grid.metrics[0][name]


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "zero-3", "twice"])
def test_two_workers_follow_one_plain_process_from_the_first_step(
    plain: PlainRun, two_workers: Path, name: str
) -> None:
    run = two_workers / name
    metrics = [step for part in sorted(run.glob("metrics-*-rank-0.json")) for step in json.loads(part.read_text())]
    assert [step["step"] for step in metrics] == list(range(FEW_STEPS))
    for term in (*TERMS, "grad_norm"):
        assert curve_distance(metrics, plain.metrics, term) < TOLERANCE, term
    store = open_store(run)
    commit = latest_commit(store)
    assert commit is not None
    assert relative_distance(load_teacher(store, commit), plain.teacher) < TOLERANCE


@pytest.mark.parametrize("rank", [0, 1])
def test_without_kept_activations_the_student_computes_each_block_twice(two_workers: Path, rank: int) -> None:
    calls = json.loads((two_workers / f"twice-rank-{rank}.json").read_text())
    assert calls == FEW_STEPS * 2 * LIVELY_ARCH.depth * 3, "steps, replicas, blocks; the teacher, and the student twice"
