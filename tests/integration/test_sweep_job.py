"""A sweep on a real head: killed on the way, and each trial is there exactly once."""

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from tests.integration.jobs_at_work import Submission, run_directly, run_to_the_end
from tests.integration.test_evaluation_beside import labelled_tiles

from histoscale.bench.watched_job import SMALL_RUN
from histoscale.checkpoint.ledger import read_history
from histoscale.cluster.local import HeadSize, LocalHead
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store
from histoscale.sweeps.rows import from_parquet

STEPS, TILES = 24, 16


@pytest.fixture(scope="module")
def head() -> Iterator[LocalHead]:
    with LocalHead(HeadSize(cpus=10, object_store_bytes=500_000_000)) as running:
        yield running


@pytest.fixture(scope="module")
def index(head: LocalHead, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("slides")
    make_slides(folder / "slides", count=2)
    run_to_the_end(head, ["python", "jobs/index.py", str(folder / "slides"), "--out", str(folder / "index")])
    return str(folder / "index")


def spec(folder: Path, **changes: object) -> str:
    """Two budgets of the smallest network, one trunk for both."""
    fields = dict(setting.split("=", 1) for setting in SMALL_RUN if not setting.startswith("model.arch"))
    content = {
        "recipe": "jobs/recipes/quickstart.yaml",
        "set": {name: json.loads(value) for name, value in fields.items()}
        | {
            "batch.tiles": TILES,
            "optim.freeze_last_layer_images": 0,
            "optim.weight_decay": [0.04, 0.04],
            "optim.ema_momentum": [0.99, 0.99],
            "checkpoint.every_steps": 4,
            "cluster.workers": 1,
        },
        "archs": ["vit_test14"],
        "budgets_images": [10 * TILES, STEPS * TILES],
        "constant_lr": {"cooldown_share": 0.2},
        "evaluation": {"datasets": {"tiles": str(labelled_tiles(folder / "tiles"))}},
        "resources": {"cpus": 1, "max_concurrent": 2},
        "price": {"gpu": "none", "peak_tflops": 1, "mfu": 0.5, "usd_per_gpu_hour": 0, "as_of": "2026-01-01"},
        **changes,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "sweep.yaml")


def kill_the_driver(head: LocalHead) -> None:
    """The process of jobs/sweep.py, without a chance to clean up."""
    token = head.environment["RAY_AUTH_TOKEN"]
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        is_driver = command[1:2] == ["jobs/sweep.py"]
        if is_driver and process.environ().get("RAY_AUTH_TOKEN") == token:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_that_is_killed_goes_on_and_holds_each_trial_once(head: LocalHead, index: str, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = ["python", "jobs/sweep.py", "scaling", "--spec", spec(tmp_path), "--index", index, "--out", str(out)]
    first = Submission(head, command)
    first.wait_for(lambda line: "trunk: done" in line)
    trunk = next((out / "results").glob("*trunk.json"))
    kept = trunk.stat().st_mtime_ns
    first.wait_for(lambda line: line.startswith("begins: ") and "trunk" not in line)
    kill_the_driver(head)
    first.finish()
    assert first.status != 0

    text = run_to_the_end(head, command)
    assert "1 of 3 trials have ended before" in text
    assert trunk.stat().st_mtime_ns == kept
    rows = from_parquet((out / "trials.parquet").read_bytes())
    assert [row.role for row in rows] == ["trunk", "cooldown", "cooldown"]
    assert {path.stem for path in (out / "results").iterdir()} == {row.name for row in rows}
    assert all(0.0 <= row.error("tiles") <= 1.0 for row in rows[1:])
    for row in rows:
        store = open_store(out / "trials" / row.name)
        steps = max(json.loads(line)["step"] for line in store.get("metrics.jsonl").decode().splitlines()) + 1
        assert [step for step, _ in read_history(store, steps)] == list(range(steps))
    assert "cannot say which model is best" in text
    assert (out / "report.html").is_file()
    assert (out / "trials.csv").read_text().count("\n") == 4


def test_what_makes_no_sense_is_refused_before_anything_starts(index: str, tmp_path: Path) -> None:
    words = ["scaling", "--index", index, "--out", str(tmp_path / "out"), "--spec"]
    for changes, said in (
        ({"grid": {"optim.learning_rate": [1e-3]}}, "optim.learning_rate is not a field"),
        ({"evaluation": {"datasets": {"tiles": "/nowhere"}}}, "the place of the dataset does not exist, or is empty"),
        ({"budgets_images": [1]}, "a budget is less than one step"),
    ):
        (tmp_path / "tiles").exists() or (tmp_path / "tiles").mkdir()
        folder = tmp_path / str(abs(hash(said)))
        folder.mkdir()
        done = run_directly("sweep.py", *words, spec(folder, **changes))
        assert done.returncode == 2, done.stderr
        assert said in done.stderr.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_a_distillation_needs_its_teacher(index: str, tmp_path: Path) -> None:
    words = ["--spec", "jobs/sweeps/distillation.yaml", "--index", index, "--out", str(tmp_path / "out")]
    done = run_directly("sweep.py", "distillation", *words)
    assert done.returncode == 2
    assert "is for distillation, which needs one" in done.stderr
    done = run_directly("sweep.py", "distillation", *words, "--teacher", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the teacher at ")
