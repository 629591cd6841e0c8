"""A slide that goes missing after it was indexed: quarantined by its id, and past the bound a reason to stop."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.jobs_at_work import TINY, Submission, run_directly

from histoscale.checkpoint.ledger import read_history, read_replacements
from histoscale.checkpoint.reader import latest_commit
from histoscale.cluster.local import HeadSize, LocalHead
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store

STEPS, TILES = 24, 16


@pytest.fixture(scope="module")
def head() -> Iterator[LocalHead]:
    with LocalHead(HeadSize(cpus=8, object_store_bytes=500_000_000)) as running:
        yield running


@pytest.fixture(scope="module")
def index(head: LocalHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of three slides, one of which is not there any more."""
    folder = tmp_path_factory.mktemp("slides")
    make_slides(folder / "slides", count=3)
    job = Submission(head, ["python", "jobs/index.py", str(folder / "slides"), "--out", str(folder / "index")])
    assert "accepted: 3 slides" in job.finish()
    sorted((folder / "slides").iterdir())[0].unlink()
    return folder / "index"


def pretrain(head: LocalHead, index: Path, run: Path, *more: str) -> Submission:
    length = ["--set", f"schedule.images={STEPS * TILES}"]
    places = ["--index", str(index), "--out", str(run)]
    return Submission(head, ["python", "jobs/pretrain.py", *places, *TINY, *length, *more])


def test_a_lost_slide_is_quarantined_and_the_run_completes(head: LocalHead, index: Path, tmp_path: Path) -> None:
    job = pretrain(head, index, tmp_path)
    text = job.finish()
    assert job.status == 0, text
    assert f"complete: {STEPS} steps" in text
    commit = latest_commit(open_store(tmp_path))
    assert commit is not None
    [slide] = commit.quarantine
    assert f"slide {slide.slide_id} is quarantined: " in text
    assert "slides/" not in slide.reason
    history = dict(read_history(open_store(tmp_path), STEPS))
    assert history == {step: [(step * TILES, TILES)] for step in range(STEPS)}
    replaced = [entry for _, step in read_replacements(open_store(tmp_path), STEPS) for entry in step]
    assert slide.slide_id in {slide_id for _, _, slide_id, _ in replaced}


def test_past_the_bound_the_run_commits_stops_and_lists_the_slides(
    head: LocalHead, index: Path, tmp_path: Path
) -> None:
    job = pretrain(head, index, tmp_path, "--set", "stream.max_bad_slides=0", "--set", "schedule.images=9600")
    text = job.finish()
    assert job.status != 0
    assert "error: 1 of 3 slides cannot be read any more: " in text
    commit = latest_commit(open_store(tmp_path))
    assert commit is not None
    assert commit.quarantine[0].slide_id in text


def test_the_simulator_deals_the_plan_of_an_archive_that_does_not_exist() -> None:
    arguments = ["--simulate", "--recipe", "jobs/recipes/quickstart.yaml", "--slides", "20000", "--blocks", "8"]
    done = run_directly("doctor.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20,000 slides: first chapter planned after ")
    assert "every block was the one of the plan, in order" in done.stdout


@pytest.mark.parametrize("option", ["--slides", "--workers", "--blocks"])
def test_a_simulation_of_nothing_is_refused(option: str) -> None:
    done = run_directly("doctor.py", "--simulate", "--recipe", "jobs/recipes/quickstart.yaml", option, "0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {option} is too small (got 0; expected 1 or more)")
