"""What evaluation beside a run costs its steps.

One worker trains a small network on a real node (a raylet of this machine) while its checkpoints are evaluated on
another core. In one run the evaluation is stopped and let go on, window by window, so that both kinds of step meet
the same machine. The trainer has a core of its own; the reader has one where there are three, and else shares the
evaluation's, which yields to it.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from PIL import Image

from histoscale.bench.elastic import bench_environment, small_index
from histoscale.bench.figure import Figure
from histoscale.bench.ray_local import own_processes
from histoscale.bench.watched_job import POLL_S, SMALL_RUN, WatchedJob, set_words
from histoscale.errors import RunError
from histoscale.observe.metrics import METRICS_KEY, read_metrics
from histoscale.storage import open_store

_TILES, _CROP_PX, _LABELLED = 16, 112, 3000
_WINDOW_STEPS, _PAIRS = 12, 10
_STEPS = 100_000  # more than the windows need: the run is stopped when they are measured
_PATIENCE_S = 240.0
_SETTINGS = (
    *SMALL_RUN,
    "data.region_px=196",
    f"crops.global_px={_CROP_PX}",
    "crops.local_px=56",
    f"batch.tiles={_TILES}",
    f"schedule.images={_STEPS * _TILES}",
    "checkpoint.every_steps=50",
    "cluster.workers=1",
    "cluster.cpus_per_worker=1",
)


@dataclass
class Window:
    """Times of steps, in seconds.

    Attributes:
        steps: Whole ones.
        computing: Without what they waited for tiles.
    """

    steps: list[float] = field(default_factory=list)
    computing: list[float] = field(default_factory=list)


def evaluate() -> Iterator[Figure]:
    """`evaluate.slowdown_ratio`: the median step beside an evaluation over the median step without one."""
    with tempfile.TemporaryDirectory(prefix="histoscale-bench-") as name, bench_environment() as environment:
        folder = Path(name)
        index = small_index(folder, environment)
        words = [*_SETTINGS, f"evaluation.datasets=[{_labelled(folder / 'tiles')}]"]
        command = ["jobs/pretrain.py", "--recipe", "jobs/recipes/quickstart.yaml", "--index", str(index)]
        job = WatchedJob([*command, "--out", str(folder / "run"), *set_words(*words)], environment)
        try:
            beside, alone = _measure(job, folder / "run")
        finally:
            job.end()
    for figure, kind in (("evaluate.slowdown_ratio", "steps"), ("evaluate.computing_ratio", "computing")):
        ours, theirs = median(getattr(beside, kind)), median(getattr(alone, kind))
        details = {"beside_s": ours, "alone_s": theirs, "steps": len(beside.steps), "cores": os.cpu_count()}
        yield Figure(figure, ours / theirs, "ratio", baseline=1.0, details=details)


def _measure(job: WatchedJob, run: Path) -> tuple[Window, Window]:
    """Steps beside a running evaluation and beside a stopped one, in turns."""
    job.wait_for("checkpoint committed", _PATIENCE_S)
    beside, alone = Window(), Window()
    for pair in range(2 * _PAIRS):
        running = pair % 2 == 0
        while not _window(job, run, beside if running else alone, running=running):
            pass
    return beside, alone


def _window(job: WatchedJob, run: Path, found: Window, *, running: bool) -> bool:
    """Add the steps of one window; False where the evaluation ended in it, so that it says nothing."""
    process = _evaluation(job)
    _separate(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        if not running:
            process.suspend()
        try:
            first = _done(run) + 1  # the step that is under way has seen both
            _wait_for(job, run, first + _WINDOW_STEPS)
            whole = process.is_running()
        finally:
            process.resume()
        if whole:
            for values in list(read_metrics(open_store(run), first + _WINDOW_STEPS))[first:]:
                found.steps.append(values["time/step_s"])
                found.computing.append(values["time/step_s"] - values["time/wait_s"])
        return whole
    return False


def _evaluation(job: WatchedJob) -> psutil.Process:
    """The process that evaluates; waits for one."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s and job.process.poll() is None:
        found = own_processes("ray::evaluation")
        if found:
            return found[0]
        time.sleep(POLL_S)
    raise RunError("no evaluation is under way", value=job.text[-500:], expected="one for every commit")


def _separate(evaluation: psutil.Process) -> None:
    """Give the trainer a core of its own, and the evaluation one that it shares with as few as there can be."""
    cores = list(range(psutil.cpu_count() or 1))
    for process in own_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            place = cores[:1] if "RayTrainWorker" in title else cores[2:] or cores[1:]
            for thread in process.threads():  # each has its own cores, which only threads that it starts inherit
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(thread.id, cores[1:2] if process.pid == evaluation.pid else place)


def _done(run: Path) -> int:
    return (run / METRICS_KEY).read_bytes().count(b"\n")


def _wait_for(job: WatchedJob, run: Path, steps: int) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while _done(run) < steps:
        if time.monotonic() > deadline_s or job.process.poll() is not None:
            raise RunError("the run does not go on", value=job.text[-500:], expected=f"{steps} steps")
        time.sleep(POLL_S)


def _labelled(folder: Path) -> Path:
    """Two classes that colour tells apart, in so many tiles that an evaluation outlasts some windows."""
    rng = np.random.default_rng(0)
    for name, level in (("pale", 200), ("dark", 80)):
        (folder / name).mkdir(parents=True)
        for number in range(_LABELLED // 2):
            pixels = rng.normal(level, 20, (_CROP_PX, _CROP_PX, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png", compress_level=1)
    return folder
