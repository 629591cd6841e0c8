import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from histoscale.bench.quickstart import accuracy
from histoscale.evaluate.figures import Figure as ProbeFigure
from histoscale.evaluate.report import EvaluationReport

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "histoscale.bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_overhead_prints_its_figures_as_json_lines_and_nothing_else() -> None:
    done = bench("overhead")
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [figure["figure"] for figure in figures] == ["overhead.import_s", "overhead.help_s"]
    assert all(set(figure) == {"figure", "value", "unit", "baseline", "details"} for figure in figures)
    assert all(figure["value"] > 0 and figure["baseline"] > 0 for figure in figures)


def test_the_benchmarks_of_the_step_need_no_ray() -> None:
    modules = ", ".join(f"histoscale.bench.{name}" for name in ("augment", "checkpoint", "memory", "step"))
    code = f"import sys, {modules}; print(sorted(name for name in sys.modules if name.partition('.')[0] == 'ray'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [(), ("nothing",)])
def test_a_missing_or_unknown_name_is_refused_with_the_known_ones(arguments: tuple[str, ...]) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "overhead" in done.stderr or "NAME" in done.stderr


def test_trainers_of_one_process_give_their_memory_back() -> None:
    code = """
import gc, weakref, torch
from histoscale.bench.step import only_rank, random_tiles, step_recipe, trainer_of
def state_of(folder):
    recipe = step_recipe("vit_test14", 2, 8, "bf16")
    with trainer_of(recipe, torch.device("cpu"), folder / "run") as trainer:
        trainer.step(0, [random_tiles(recipe)])
        deepspeed = trainer.student.deepspeed
        return [weakref.ref(each) for each in (deepspeed.optimizer, next(deepspeed.module.parameters()))]
with only_rank("cpu") as folder:
    left = state_of(folder)
    gc.collect()
    print([each() is None for each in left])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[True, True]"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["augment", "memory", "step"])
def test_a_gpu_that_is_not_there_is_refused(name: str) -> None:
    done = bench(name, "--device", "cuda")
    assert (done.returncode, done.stdout) == (2, "")
    assert "this machine has no CUDA device, so give cpu" in done.stderr


def test_the_accuracy_is_the_mean_over_the_seeds_beside_the_untrained_one() -> None:
    def report(pretrained: float) -> EvaluationReport:
        values = {"pretrained": pretrained, "untrained": 0.4, "colour statistics": 0.3}
        figures = tuple(
            ProbeFigure(name, "both", "knn", "balanced_accuracy", (v, v), (v, v)) for name, v in values.items()
        )
        return EvaluationReport("tiles", "", "", 1, 1, {}, "", figures)

    figure = accuracy([report(0.5), report(0.7)], "knn")
    assert figure.value == pytest.approx(0.6)
    assert figure.baseline == pytest.approx(0.4)
    assert figure.details["pretrained"] == [0.5, 0.7]
