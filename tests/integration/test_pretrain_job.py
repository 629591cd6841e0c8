"""The life of a run on a real local head: killed, stopped, resumed elsewhere, refused; always the same curve."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.documented_metrics import as_documented, documented
from tests.integration.jobs_at_work import TINY, Submission, run_directly, run_to_the_end, train_workers

from histoscale.checkpoint.ledger import read_history
from histoscale.checkpoint.reader import latest_commit
from histoscale.cluster.lease import Lease
from histoscale.cluster.local import HeadSize, LocalHead
from histoscale.observe.timeline import Kind, read_events
from histoscale.slides.catalogue import open_catalogue
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store
from histoscale.train.health import WATCH_EVERY_STEPS

STEPS, TILES = 120, 16
LENGTH = ["--set", f"schedule.images={STEPS * TILES}"]


@pytest.fixture(scope="module")
def head() -> Iterator[LocalHead]:
    with LocalHead(HeadSize(cpus=8, object_store_bytes=500_000_000)) as running:
        yield running


@pytest.fixture(scope="module")
def index(head: LocalHead, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    make_slides(folder / "slides", count=2)
    run_to_the_end(head, ["python", "jobs/index.py", str(folder / "slides"), "--out", str(folder / "index")])
    return folder / "index"


def command(index: Path, run: Path, *more: str) -> list[str]:
    return ["python", "jobs/pretrain.py", "--index", str(index), "--out", str(run), *TINY, *LENGTH, *more]


@pytest.fixture(scope="module")
def killed_run(head: LocalHead, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which one worker was killed with SIGKILL after the first commit."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    job = Submission(head, command(index, run))
    job.wait_for(lambda line: "checkpoint committed" in line)
    victims = train_workers(head)
    assert len(victims) == 2
    victims[-1].kill()
    text = job.finish()
    assert job.status == 0, text
    assert f"complete: {STEPS} steps" in text
    return run


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), "a step is reported once"
    return {line["step"]: line["loss/total"] for line in lines}


def assert_every_sample_was_used_once(run: Path) -> None:
    history = dict(read_history(open_store(run), STEPS))
    assert history == {step: [(step * TILES, TILES)] for step in range(STEPS)}


def test_a_run_survives_the_death_of_a_worker(killed_run: Path) -> None:
    commit = latest_commit(open_store(killed_run))
    assert commit is not None
    assert commit.step == STEPS
    assert sorted(losses(killed_run)) == list(range(STEPS))
    assert_every_sample_was_used_once(killed_run)
    assert list((killed_run / "events").iterdir())


def test_a_stopped_run_commits_and_resumes_on_the_same_curve_at_another_size(
    head: LocalHead, index: Path, killed_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    job = Submission(head, command(index, run))
    job.wait_for(lambda line: line.startswith("step "))

    job.stop()
    text = job.finish()
    stopped = re.search(rf"stopped at step (\d+) of {STEPS}", text)
    assert stopped, text
    commit = latest_commit(open_store(run))
    assert commit is not None
    assert 0 < commit.step == int(stopped[1]) < STEPS

    resumed = run_to_the_end(head, command(index, run, "--set", "cluster.workers=1", "--set", "cluster.zero_stage=3"))
    assert f"resuming at step {commit.step} of {STEPS}" in resumed
    assert_every_sample_was_used_once(run)
    ours, theirs = losses(run), losses(killed_run)
    np.testing.assert_allclose([ours[step] for step in range(STEPS)], [theirs[s] for s in range(STEPS)], rtol=1e-5)

    again = run_to_the_end(head, command(index, run))
    assert f"is complete: {STEPS} steps" in again


def test_a_second_job_on_a_run_is_told_who_holds_it(head: LocalHead, index: Path, tmp_path: Path) -> None:
    run = tmp_path / "held"
    with Lease(open_store(run), "raysubmit_first"):
        second = Submission(head, command(index, run))
        text = second.finish()
    assert second.status == 1
    assert "is held by raysubmit_first" in text
    assert not (run / "recipe.yaml").exists()


def test_a_fork_succeeds_a_dead_driver_and_begins_from_a_checkpoint_under_another_recipe(
    head: LocalHead, index: Path, killed_run: Path, tmp_path: Path
) -> None:
    run, shorter = tmp_path / "fork", ["--set", "schedule.images=64", "--set", "cluster.workers=1"]
    run.mkdir()
    (run / "lease.json").write_text('{"holder": "raysubmit_dead", "token": "x", "beat": 3}')
    text = run_to_the_end(head, command(index, run, *shorter, "--fork-from", f"{killed_run}@100"))
    assert f"forked from {killed_run} at step 100" in text
    assert "starting at step 0 of 4" in text
    assert "complete: 4 steps" in text
    assert not (run / "lease.json").exists()
    assert json.loads((run / "parent.json").read_text())["updates"] == 100
    assert json.loads((run / "origins.json").read_text())[0].startswith(f"forked from {killed_run} at step 100")
    kinds = [event.kind for event in read_events(open_store(run))]
    assert kinds == [Kind.START, Kind.RESUME, Kind.COMMIT, Kind.END]
    done = run_directly("pretrain.py", *command(index, run, *shorter, "--fork-from", f"{killed_run}@120")[2:])
    assert done.returncode == 2, done.stderr
    assert "was not forked from there" in done.stderr.splitlines()[-1]


def test_an_alarm_is_recorded_and_stops_the_run_with_a_commit(head: LocalHead, index: Path, tmp_path: Path) -> None:
    run = tmp_path / "alarm"
    still = ["--set", "optim.lr=1e-8", "--set", "on_alarm=stop", "--set", "cluster.workers=1"]  # tokens stay alike
    job = Submission(head, command(index, run, *still))
    text = job.finish()
    assert job.status == 1, text
    told = re.search(r"warning: (the model collapses: since step \d+ .*)", text)
    assert told, text
    assert "an alarm has stopped the run, whose last step is committed" in text
    store = open_store(run)
    commit, events = latest_commit(store), read_events(store)
    assert commit is not None
    rung, *_ = [event for event in events if event.kind is Kind.ALARM]
    assert told[1].startswith(rung.reason)
    assert commit.step == rung.step + 1 < STEPS
    report = run_directly("report.py", str(run))
    assert report.returncode == 0, report.stderr
    assert rung.reason in report.stdout


def test_the_report_tells_of_the_restart_and_of_every_tile_of_every_slide(index: Path, killed_run: Path) -> None:
    done = run_directly("report.py", str(killed_run))
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{STEPS} committed steps, goodput [1-9]", done.stdout)
    assert "1 restarts" in done.stdout
    assert "<svg" in (killed_run / "report.html").read_text()
    scalars = json.loads((killed_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.0 < scalars["progress/goodput"] <= 1.0
    for line in map(json.loads, (killed_run / "metrics.jsonl").read_text().splitlines()):
        wanted = documented(watched=line["step"] % WATCH_EVERY_STEPS == 0)
        assert as_documented(line, wanted) == wanted
    tiles = 0
    for row in range(len(catalogue := open_catalogue(str(index)))):
        done = run_directly("report.py", str(killed_run), "--slide", catalogue.slide_id(row))
        assert done.returncode == 0, done.stderr
        tiles += int(re.search(r": ([\d,]+) tiles in", done.stdout)[1].replace(",", ""))  # type: ignore[index]
        assert f"checkpoint of step {STEPS}: has seen it" in done.stdout
    assert tiles == STEPS * TILES
    assert run_directly("report.py", str(killed_run), "--slide", "0" * 32).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "diagnosis"),
    [
        (["--set", "modle.arch=vit_s14"], r"modle is not a field \(nearest: model\)"),
        (["--set", "optim.lr=-1"], r"optim.lr = -1: input should be greater than 0"),
        (["--set", "data.mix=[{mpp: 0.06, share: 1}]"], r"no slide serves 0.06 um/px"),
        (["--set", "seed=1", "--out", "KILLED"], r"was started with another recipe .*seed: 1 != 0"),
        (["--index", "/nowhere"], r"/nowhere"),
        (["--fork-from", "KILLED", "--set", "heads.dino_prototypes=65"], r"heads.dino_prototypes: 65 != 64"),
        (["--recipe", "/nowhere.yaml"], r"recipe /nowhere.yaml cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_status_2_and_writes_nothing(
    index: Path, killed_run: Path, tmp_path: Path, arguments: list[str], diagnosis: str
) -> None:
    before = sorted(killed_run.rglob("*"))
    run = tmp_path / "run"
    arguments = [str(killed_run) if word == "KILLED" else word for word in arguments]
    done = run_directly("pretrain.py", *command(index, run, *arguments)[2:])
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert re.search(rf"^error: .*{diagnosis}", last), last
    assert "Traceback" not in done.stderr
    assert not run.exists()
    assert sorted(killed_run.rglob("*")) == before


def test_an_index_of_another_version_is_refused(index: Path, tmp_path: Path) -> None:
    changed = tmp_path / "index"
    changed.mkdir()
    for path in index.iterdir():
        if path.is_file():
            (changed / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((changed / "index.json").read_text())
    key = next(name for name in manifest if "version" in name)
    (changed / "index.json").write_text(json.dumps(manifest | {key: 999}))
    done = run_directly("pretrain.py", *command(changed, tmp_path / "run")[2:])
    assert done.returncode == 2
    assert "999" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()
