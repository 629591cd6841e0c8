"""Checkpoints are evaluated and drawn beside a run on a real head; what becomes of that is nothing to the run."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.integration.jobs_at_work import TINY, Submission, process_of, run_directly, run_to_the_end

from histoscale.bench.watched_job import set_words
from histoscale.checkpoint.ledger import read_history
from histoscale.cluster.local import HeadSize, LocalHead
from histoscale.observe.picture_store import read_sets
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store

STEPS, TILES = 60, 16


def labelled_tiles(folder: Path, count: int = 12) -> Path:
    """Two classes that colour tells apart."""
    rng = np.random.default_rng(0)
    for name, level in (("pale", 200), ("dark", 80)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(level, 20, (56, 56, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def head() -> Iterator[LocalHead]:
    with LocalHead(HeadSize(cpus=8, object_store_bytes=500_000_000)) as running:
        yield running


@pytest.fixture(scope="module")
def index(head: LocalHead, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("slides")
    make_slides(folder / "slides", count=2)
    run_to_the_end(head, ["python", "jobs/index.py", str(folder / "slides"), "--out", str(folder / "index")])
    return str(folder / "index")


def test_checkpoints_are_evaluated_beside_the_run_though_one_evaluation_is_killed(
    head: LocalHead, index: str, tmp_path: Path
) -> None:
    dataset, run = labelled_tiles(tmp_path / "tiles"), tmp_path / "run"
    settings = set_words(f"batch.tiles={TILES}", f"schedule.images={STEPS * TILES}", f"evaluation.datasets=[{dataset}]")
    job = Submission(head, ["python", "jobs/pretrain.py", "--index", index, "--out", str(run), *TINY, *settings])
    process_of(head, "evaluation").kill()
    job.wait_for(lambda line: line.startswith("the evaluation of step ") and "is tried again" in line)
    text = job.finish()
    assert job.status == 0, text
    assert "the workers failed" not in text
    assert "restarted on" not in text
    assert f"evaluated step {STEPS} on tiles: balanced accuracy" in text
    assert dict(read_history(open_store(run), STEPS)) == {step: [(step * TILES, TILES)] for step in range(STEPS)}

    reports = {json.loads(path.read_text())["step"] for path in (run / "evaluations").glob("tiles-step-*.json")}
    assert STEPS in reports
    best = json.loads((run / "evaluations" / "best.json").read_text())
    assert best["step"] in reports
    curves = EventAccumulator(str(run / "events" / "evaluation"))
    curves.Reload()
    assert {scalar.step for scalar in curves.Scalars("evaluate/tiles/both/knn_balanced_accuracy")} == reports


def test_pictures_are_made_beside_the_run_though_their_process_is_killed(
    head: LocalHead, index: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    length = (f"batch.tiles={TILES}", f"schedule.images={STEPS * TILES}", "evaluation.pictures=true")
    job = Submission(
        head, ["python", "jobs/pretrain.py", "--index", index, "--out", str(run), *TINY, *set_words(*length)]
    )
    process_of(head, "pictures").kill()
    job.wait_for(lambda line: line.startswith("the making of pictures of step ") and "is tried again" in line)
    text = job.finish()
    assert job.status == 0, text
    assert "the workers failed" not in text
    assert "restarted on" not in text
    assert f"pictures of step {STEPS}: 7 drawn" in text
    assert dict(read_history(open_store(run), STEPS)) == {step: [(step * TILES, TILES)] for step in range(STEPS)}

    newest = read_sets(open_store(run))[-1]
    assert newest.step == STEPS
    assert all((run / shown.file).is_file() for shown in newest.pictures)
    images = EventAccumulator(str(run / "events" / "pictures"))
    images.Reload()
    assert STEPS in {image.step for image in images.Images("pictures/neighbours")}
    assert "data:image/webp" in (run / "report.html").read_text()


def test_a_dataset_that_cannot_be_used_is_refused_before_the_run(index: str, tmp_path: Path) -> None:
    words = ["--index", index, "--out", str(tmp_path / "run"), *TINY]
    done = run_directly("pretrain.py", *words, *set_words(f"evaluation.datasets=[{tmp_path / 'nowhere'}]"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the place of the dataset does not exist, or is empty")
    assert not (tmp_path / "run").exists()
