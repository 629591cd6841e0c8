"""The evaluation as a job: what happens on the node where it runs reaches the user, line by line."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image
from safetensors.torch import save_file

from histoscale.bench.ray_local import local_ray, own_processes
from histoscale.checkpoint.run_record import RECIPE_KEY
from histoscale.cluster.on_a_node import Tell, run_on_a_node
from histoscale.config.archs import ARCHS
from histoscale.config.decode import dump_recipe
from histoscale.config.recipe import Recipe
from histoscale.errors import ClusterError, DatasetError
from histoscale.evaluate.networks import PUBLISHED_PX
from histoscale.models import VisionTransformer
from histoscale.models.weights import initialise

ROOT = Path(__file__).parents[2]


def evaluate(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "jobs/evaluate.py", *words], cwd=ROOT, capture_output=True, text=True)


def test_diagnosis_of_the_task_is_the_last_line_and_the_status_is_two(tmp_path: Path) -> None:
    (tmp_path / RECIPE_KEY).write_text(dump_recipe(Recipe()))
    ran = evaluate("--run", str(tmp_path), "--dataset", str(tmp_path / "nowhere"))
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("error: the place of the dataset does not exist, or is empty (got ")
    assert "Traceback" not in ran.stderr


def test_a_suite_of_ones_own_is_measured_of_published_weights(tmp_path: Path) -> None:
    arch = ARCHS["vit_test14"]
    for name in ("mine", "theirs"):
        backbone = VisionTransformer(arch, PUBLISHED_PX)
        initialise(backbone, len(name), arch.init_std)
        save_file(backbone.state_dict(), tmp_path / f"{name}.safetensors")
    rng = np.random.default_rng(0)
    for number in range(20):
        folder = tmp_path / "data" / "tiles" / ("pale", "dark")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.normal((200, 80)[number % 2], 20, (56, 56, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "own.yaml").write_text(
        "name: own\nsource: the laboratory\ntasks:\n"
        "  - {name: tiles, title: Tiles, layout: folders, folder: tiles, metric: weighted_f1, protocol: ridge}\n"
    )
    model, other = (f"vit_test14={tmp_path / name}.safetensors" for name in ("mine", "theirs"))
    words = ["--model", model, "--beside", other, "--out", str(tmp_path / "out"), "--dataset", str(tmp_path / "data")]
    ran = evaluate(*words, "--suite", str(tmp_path / "own.yaml"))
    assert ran.returncode == 0, ran.stderr
    assert "tiles: begins" in ran.stdout
    assert "suite own (the laboratory): 1 of 1 tasks" in ran.stdout
    assert "theirs" in ran.stdout
    assert (tmp_path / "out" / "evaluations" / "suite-own-at-00000000.json").is_file()
    again = evaluate(*words, "--suite", str(tmp_path / "own.yaml"))
    assert "tiles: kept from before" in again.stdout


def test_a_model_without_a_place_for_its_report_is_refused(tmp_path: Path) -> None:
    ran = evaluate("--model", "vit_s14=/weights.safetensors", "--dataset", str(tmp_path))
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].endswith("is needed with --model, to say where the report goes")


def test_no_cpus_are_refused(tmp_path: Path) -> None:
    ran = evaluate("--model", "vit_s14=/weights.safetensors", "--out", "/tmp", "--dataset", "/tmp", "--cpus", "0")
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("error: the number of CPUs is out of range (got 0")


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[None]:
    with local_ray(cpus=1, object_store_bytes=10**8):
        yield


def three_lines(device: str, tell: Tell) -> str:
    for number in range(3):
        tell(f"line {number}")
        time.sleep(0.2)
    return device


def refused(device: str, tell: Tell) -> str:
    raise DatasetError("nothing to see", value=device)


def endless(device: str, tell: Tell) -> str:
    tell("begun")
    time.sleep(600.0)
    return device


@pytest.mark.usefixtures("one_cpu")
def test_lines_of_the_work_come_in_order_and_its_result_last() -> None:
    said: list[str] = []
    assert run_on_a_node(three_lines, 1, said.append) == "cpu"
    assert said == ["line 0", "line 1", "line 2"]


@pytest.mark.usefixtures("one_cpu")
def test_a_diagnosis_of_the_work_is_raised_as_itself() -> None:
    with pytest.raises(DatasetError, match="nothing to see"):
        run_on_a_node(refused, 1, print)


@pytest.mark.usefixtures("one_cpu")
def test_a_wait_for_a_node_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("histoscale.cluster.on_a_node._PATIENCE_S", 1.0)

    @ray.remote(num_cpus=1)
    def hold() -> None:
        time.sleep(6.0)

    holder = hold.remote()
    said: list[str] = []
    assert run_on_a_node(three_lines, 1, said.append) == "cpu"
    assert said[0] == "waiting for a process on a node with 1 free CPU; 0 of 1 CPUs are free"
    ray.get(holder)


@pytest.mark.usefixtures("one_cpu")
def test_work_that_is_lost_is_a_diagnosis() -> None:
    def kill(_line: str) -> None:
        for process in own_processes("_Worker"):
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(ClusterError, match="the node that did the work is lost") as caught:
        run_on_a_node(endless, 1, kill)
    assert caught.value.transient
