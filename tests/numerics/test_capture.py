"""A step that is not finite leaves a capture, and one process finds in it where that began."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import archive
import capturing
import numpy as np
import pytest
import workers

from histoscale.checkpoint.capture import read_capture
from histoscale.cluster.replay import ReplayRequest, changed_replicas, read_step, replay
from histoscale.errors import CheckpointError, RunError, SlideIndexError
from histoscale.slides.catalogue import open_catalogue
from histoscale.slides.exclusions import append_exclusion
from histoscale.storage import open_store

pytestmark = pytest.mark.timeout(900)  # several processes share what cores there are

ROOT = Path(__file__).parents[2]
CASES = [case.name for case in capturing.CASES]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an index, and of the runs of two workers that failed on it."""
    folder = tmp_path_factory.mktemp("runs")
    archive.write_archive(folder, capturing.slides())
    workers.launch(capturing.fail_and_capture, 2, folder)
    return folder


@pytest.fixture(scope="module")
def replayed(runs: Path) -> dict[str, list[str]]:
    """What replays of these runs tell."""
    requests = {
        case: ReplayRequest(place(runs, case), str(runs / "index"), "cpu") for case in ("inf", "bf16", "gradient")
    }
    requests["cured"] = replace(requests["bf16"], overrides=("precision=fp32",))
    workers.launch(capturing.replay_all, 1, requests, runs / "told.json")
    told: dict[str, list[str]] = json.loads((runs / "told.json").read_text())
    return told


def place(runs: Path, case: str) -> str:
    [folder] = (runs / case / "captures").iterdir()
    return str(folder)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_a_capture_holds_the_state_before_the_step_bit_for_bit(runs: Path, case: str, rank: int) -> None:
    report = json.loads((runs / f"{case}-{rank}.json").read_text())
    assert report["unchanged"]
    assert report["held"]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_names_the_capture_and_the_way_to_replay_it(runs: Path, case: str) -> None:
    errors = {json.loads((runs / f"{case}-{rank}.json").read_text())["error"] for rank in (0, 1)}
    [error] = errors
    assert f"`python jobs/doctor.py --replay {place(runs, case)} --index INDEX`" in error


@pytest.mark.parametrize("case", capturing.CASES, ids=CASES)
def test_a_capture_says_what_the_step_was_made_of_and_names_no_slide(runs: Path, case: capturing.Case) -> None:
    folder = Path(place(runs, case.name))
    capture = read_capture(open_store(runs / case.name), f"captures/{folder.name}")
    step, tiles = case.step, workers.TILES_PER_STEP
    assert capture.state.step == step
    assert [batch.replica for batch in capture.micro_batches] == [0, 1, 2, 3]
    assert [batch.samples for batch in capture.micro_batches] == [((step * tiles + 3 * r, 3),) for r in range(4)]
    assert capture.state.written_by["workers"] == "2"
    assert not all(map(np.isfinite, capture.measured.values()))
    for file in folder.iterdir():
        assert archive.NAME.encode() not in file.read_bytes()


def test_doctor_finds_the_replicas_and_the_tiles_that_bring_it_about(runs: Path) -> None:
    script = [sys.executable, "jobs/doctor.py", "--replay", place(runs, "white"), "--index", str(runs / "index")]
    done = subprocess.run([*script, "--device", "cpu"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    white = white_replicas(runs)
    assert white
    assert len(white) < 4
    named = f"replica{'s' if len(white) > 1 else ''} {', '.join(map(str, white))}"
    assert any("pixel by pixel those of the run" in line for line in lines)
    assert any(line.startswith("again, in fp32 on cpu: reproduced (") for line in lines)
    first = "first: the output of the student's backbone.blocks.0.norm1 (its input was finite)"
    assert f"{first}, in {named} of 4" in lines
    assert [line for line in lines if line.startswith("replica ")] == [f"replica {replica}:" for replica in white]
    assert any(f"slide {capturing.WHITE} (row 0)" in line and line.endswith(", constant") for line in lines)
    assert lines[-2].startswith(f"diagnosis: only {named} of 4 are affected")
    assert lines[-1].startswith("what to do: look at these slides")
    assert archive.NAME not in done.stdout


def white_replicas(runs: Path) -> list[int]:
    recipe = capturing.recipe_of()
    reader = archive.open_reader(recipe, runs)
    batches = [archive.read(reader, recipe, 1, replica) for replica in range(4)]
    return [batch.replica for batch in batches if 0 in batch.slides]


def test_weights_that_were_not_finite_before_the_step_are_named(replayed: dict[str, list[str]]) -> None:
    lines = replayed["inf"]
    assert any(line.endswith("not finite in weights: backbone.blocks.0.mlp.fc1.weight") for line in lines)
    assert any("the student's backbone.blocks.0.mlp.fc1 (its input was finite), in replicas" in line for line in lines)
    assert lines[-2].startswith("diagnosis: the weights were not finite before the step")


def test_what_only_bf16_cannot_compute_is_told(replayed: dict[str, list[str]]) -> None:
    lines = replayed["bf16"]
    assert any(line.startswith("again, in bf16 on cpu: reproduced (") for line in lines)
    assert any("the student's dino_head.prototypes (its input was finite)" in line for line in lines)
    assert "the same in fp32: finite" in lines
    assert lines[-2] == "diagnosis: fp32 computes this step and bf16 does not"


def test_a_gradient_that_is_not_finite_is_traced_to_its_parameter(runs: Path, replayed: dict[str, list[str]]) -> None:
    error = json.loads((runs / "gradient-0.json").read_text())["error"]
    assert error.startswith("the gradient is not finite, so no update was made")
    lines = replayed["gradient"]
    assert any(line.startswith("the run said: grad_norm inf, dino ") for line in lines)
    assert "the same in fp32: not finite either" in lines
    first = "first: the gradient of ibot_head.mlp.4.weight, in the order of the backward pass"
    assert f"{first}, in replicas 0, 1, 2 and 1 more of 4" in lines
    assert lines[-2].startswith("diagnosis: all replicas are affected, so the cause is the weights")


def test_an_override_that_cures_the_step_is_told(replayed: dict[str, list[str]]) -> None:
    lines = replayed["cured"]
    assert any(line.startswith("again, in fp32 on cpu: finite, so not reproduced (") for line in lines)
    assert lines[-2] == "diagnosis: with precision=fp32 the step is finite"


def copy_of(runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs / "white", tmp_path / "white")
    return Path(place(tmp_path, "white"))


def first_error(capture: str | Path, index: Path, *overrides: str) -> str:
    with pytest.raises((CheckpointError, RunError, SlideIndexError)) as caught:
        list(replay(ReplayRequest(str(capture), str(index), "cpu", overrides)))
    return str(caught.value)


def test_a_torn_capture_is_refused(runs: Path, tmp_path: Path) -> None:
    capture = copy_of(runs, tmp_path)
    shard = capture / "rank-1-of-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "the capture is torn: captures/step-00000001." in first_error(capture, runs / "index")
    (capture / "capture.json").unlink()
    assert "there is no whole capture at" in first_error(capture, runs / "index")


def test_a_capture_of_another_recipe_is_refused(runs: Path, tmp_path: Path) -> None:
    capture = copy_of(runs, tmp_path)
    recipe = tmp_path / "white" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 5", "seed: 6"))
    assert "the capture belongs to another recipe" in first_error(capture, runs / "index")


def test_without_its_index_or_run_there_is_no_replay(runs: Path, tmp_path: Path) -> None:
    assert "no slide index" in first_error(place(runs, "white"), tmp_path)
    capture = copy_of(runs, tmp_path)
    (tmp_path / "white" / "recipe.yaml").unlink()
    assert "is not a run folder" in first_error(capture, runs / "index")


def test_a_slide_that_was_withdrawn_since_is_not_read_again(runs: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    shutil.copytree(runs / "index", index)
    append_exclusion(open_store(index), [capturing.WHITE])
    store, catalogue = open_store(runs / "white"), open_catalogue(str(index))
    capture = read_capture(store, f"captures/{Path(place(runs, 'white')).name}")
    batches = read_step(store, capturing.recipe_of(), capture, catalogue)
    assert all(0 not in batch.slides for batch in batches)
    assert changed_replicas(capture, batches) == white_replicas(runs)


def test_overrides_that_change_the_samples_are_refused(runs: Path) -> None:
    error = first_error(place(runs, "white"), runs / "index", "batch.replicas=2", "batch.tiles=12")
    assert error.startswith("the plan gives step 1 other samples than the capture has (got 'replica 0: ((12, 6),)'")
