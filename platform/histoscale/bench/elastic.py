"""What an elastic run loses when a worker is killed, and when a node is taken away with notice.

Two workers of a small network on real nodes (raylets of this machine), a folder as the run's store. A worker is killed
with SIGKILL a few times; then its node gets a notice and leaves. The same run that nobody disturbs is the baseline of
the curve.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import psutil
from ray.cluster_utils import Cluster

from histoscale.bench.figure import Figure
from histoscale.bench.ray_local import announce_end, own_processes
from histoscale.bench.watched_job import SMALL_RUN, WatchedJob, set_words
from histoscale.cluster.job import ENVIRONMENT
from histoscale.errors import RunError
from histoscale.observe.metrics import read_metrics
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store

# A node of Ray's test cluster, which has no types.
_Node: TypeAlias = Any

_KILLS = 3
_STEPS, _TILES, _COMMIT_STEPS = 300, 16, 20
_WORKER_CPUS = 2  # trainers fit on nodes of two, readers on nodes of one
_STORE_BYTES = 2 * 10**8
_NOTICE_S = 90.0
_SETTINGS = (
    *SMALL_RUN,
    f"batch.tiles={_TILES}",
    f"schedule.images={_STEPS * _TILES}",
    f"checkpoint.every_steps={_COMMIT_STEPS}",
    f"cluster.cpus_per_worker={_WORKER_CPUS}",
)


def elastic() -> Iterator[Figure]:
    """`elastic.recovery_s`, `elastic.steps_redone` after a kill and after a notice, `elastic.curve_difference`."""
    with tempfile.TemporaryDirectory(prefix="histoscale-bench-") as name, bench_environment() as environment:
        folder = Path(name)
        with _cluster() as (cluster, last_node):
            environment["RAY_ADDRESS"] = cluster.address
            index = small_index(folder, environment)
            _pretrain(index, folder / "alone", "1", environment).finish()
            job = _pretrain(index, folder / "run", "[1, 2]", environment)
            try:
                kills = [_after_a_kill(job) for _ in range(_KILLS)]
                notice = _after_a_notice(job, cluster, last_node)
                job.finish()
            finally:
                job.end()
        details = {"recoveries_s": [each.seconds for each in kills], "workers": 2, "commit_every_steps": _COMMIT_STEPS}
        yield Figure("elastic.recovery_s", median(each.seconds for each in kills), "s", details=details)
        yield _redone("SIGKILL of a worker", kills)
        yield _redone("notice", [notice])
        yield Figure("elastic.curve_difference", curve_difference(folder / "alone", folder / "run"), "relative")


@dataclass(frozen=True)
class _Recovery:
    """From what was done to a run until the next optimiser step was known, and the steps taken again."""

    seconds: float
    steps_redone: int


def _redone(after: str, recoveries: list[_Recovery]) -> Figure:
    counts = [each.steps_redone for each in recoveries]
    return Figure("elastic.steps_redone", max(counts), "steps", details={"after": after, "all": counts})


def _after_a_kill(job: WatchedJob) -> _Recovery:
    job.wait_for("checkpoint committed")
    find_trainers()[-1].kill()
    return _recovered(job, time.monotonic())


def _after_a_notice(job: WatchedJob, cluster: Cluster, node: _Node) -> _Recovery:
    job.wait_for("checkpoint committed")
    given_s = time.monotonic()
    announce_end(cluster.address, node.node_id, _NOTICE_S)
    recovery = _recovered(job, given_s)
    cluster.remove_node(node, allow_graceful=False)
    return recovery


def _recovered(job: WatchedJob, since_s: float) -> _Recovery:
    line = job.wait_for("restarted on")
    found = re.search(r"(-?\d+) steps done again", line.text)
    return _Recovery(line.time_s - since_s, int(found.group(1)) if found else 0)


def find_trainers() -> list[psutil.Process]:
    """The run's workers, below the raylets that this process started.

    Raises:
        RunError: There are none.
    """
    found = own_processes("RayTrainWorker")
    if not found:
        raise RunError("no worker is there to be killed", value=0, expected="2 workers that train")
    return found


def curve_difference(alone: Path, run: Path) -> float:
    """Largest relative difference of the losses of two runs.

    Raises:
        RunError: They have not taken as many steps.
    """
    one, other = (_losses(path) for path in (alone, run))
    if len(one) != len(other):
        raise RunError("the curves differ in length", value=len(other), expected=f"{len(one)} steps")
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def _losses(run: Path) -> list[float]:
    return [values["loss/total"] for values in read_metrics(open_store(run), _STEPS)]


def _pretrain(index: Path, run: Path, workers: str, environment: Mapping[str, str]) -> WatchedJob:
    command = ["jobs/pretrain.py", "--recipe", "jobs/recipes/quickstart.yaml", "--index", str(index), "--out", str(run)]
    return WatchedJob([*command, *set_words(*_SETTINGS, f"cluster.workers={workers}")], environment)


def small_index(folder: Path, environment: Mapping[str, str]) -> Path:
    """An index of two slides that are drawn."""
    make_slides(folder / "slides", count=2)
    command = [sys.executable, "jobs/index.py", str(folder / "slides"), "--out", str(folder / "index")]
    subprocess.run(command, env=dict(environment), check=True, stdout=sys.stderr)
    return folder / "index"


@contextlib.contextmanager
def bench_environment() -> Iterator[dict[str, str]]:
    """Of all processes: nodes inherit it, and workers of nodes. Threads that wait must not spin on two cores."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT, RAY_AUTH_MODE="disabled", OMP_WAIT_POLICY="PASSIVE")
    os.environ["PYTHONPATH"] = str(Path("platform").resolve())
    try:
        yield dict(os.environ)
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _cluster() -> Iterator[tuple[Cluster, _Node]]:
    """A head and a node for readers, and two that a trainer fits on; the last of these is given as well."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": _STORE_BYTES})
    try:
        nodes = [
            cluster.add_node(num_cpus=cpus, object_store_memory=_STORE_BYTES)
            for cpus in (1, _WORKER_CPUS, _WORKER_CPUS)
        ]
        yield cluster, nodes[-1]
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]
