"""An elastic run on real nodes: it grows, heeds a notice, loses a node, and ends a worker that stands still.

Minutes on two cores, hence slow; the decisions themselves are tested in tests/unit/test_elasticity.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster
from tests.integration.jobs_at_work import REPOSITORY, TINY

from histoscale.bench.ray_local import announce_end, own_processes
from histoscale.bench.watched_job import WatchedJob, set_words
from histoscale.checkpoint.ledger import read_history
from histoscale.cluster.job import ENVIRONMENT
from histoscale.observe.metrics import read_metrics
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store

STEPS, TILES = 500, 64  # steps that are long enough for a larger size to repay its restart
WORKER_CPUS = 2  # trainers fit on nodes of two, readers on nodes of one


def start(environment: dict[str, str], index: Path, run: Path, *settings: str) -> WatchedJob:
    command = ["jobs/pretrain.py", "--index", str(index), "--out", str(run), *TINY, *set_words(*settings)]
    return WatchedJob(command, environment, REPOSITORY)


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of all processes: nodes inherit it, and workers of nodes. Threads that wait must not spin on two cores."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "disabled", "OMP_WAIT_POLICY": "PASSIVE"}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(REPOSITORY / "platform"))
        yield dict(os.environ)


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str]) -> Iterator[Cluster]:
    """A head and a node for readers, and one that a trainer fits on."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2 * 10**8})
    nodes.add_node(num_cpus=1, object_store_memory=2 * 10**8)
    nodes.add_node(num_cpus=WORKER_CPUS, object_store_memory=2 * 10**8)
    try:
        yield nodes
    finally:
        nodes.shutdown()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, environment: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    make_slides(folder / "slides", count=2)
    command = [sys.executable, "jobs/index.py", str(folder / "slides"), "--out", str(folder / "index")]
    subprocess.run(command, cwd=REPOSITORY, env={**environment, "RAY_ADDRESS": cluster.address}, check=True)
    return folder / "index"


def losses(run: Path) -> list[float]:
    return [values["loss/total"] for values in read_metrics(open_store(run), STEPS)]


def events(run: Path) -> list[str]:
    told = [json.loads(path.read_text()) for path in sorted((run / "timeline").iterdir())]
    return [event["kind"] for event in told if event["kind"] not in ("commit", "resume")]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_whose_nodes_come_and_go_gives_the_curve_of_one_that_is_left_alone(
    environment: dict[str, str], cluster: Cluster, index: Path, tmp_path: Path
) -> None:
    environment = {**environment, "RAY_ADDRESS": cluster.address}
    settings = [f"batch.tiles={TILES}", f"schedule.images={STEPS * TILES}", f"cluster.cpus_per_worker={WORKER_CPUS}"]
    alone = start(environment, index, tmp_path / "alone", *settings, "cluster.workers=1")
    alone.finish()

    run = tmp_path / "moved"
    job = start(environment, index, run, *settings, "cluster.workers=[1, 2]", "cluster.silence_s=20")
    job.wait_for("checkpoint committed")
    node = cluster.add_node(num_cpus=WORKER_CPUS, object_store_memory=2 * 10**8)
    job.wait_for("commit and start again: from 1 to 2 workers")
    assert "0 steps done again" in job.wait_for("restarted on 2 workers").text

    announce_end(cluster.address, node.node_id, 90.0)
    job.wait_for("commit and start again: node .* is taken away")
    assert "0 steps done again" in job.wait_for("restarted on 1 workers").text
    cluster.remove_node(node, allow_graceful=False)

    (worker,) = own_processes("RayTrainWorker")
    worker.suspend()
    job.wait_for("worker 0 has given no sign of life for 20 s and is ended")
    job.wait_for("the workers failed: a worker died")
    job.wait_for("restarted on 1 workers")

    job.finish()
    assert dict(read_history(open_store(run), STEPS)) == {step: [(step * TILES, TILES)] for step in range(STEPS)}
    np.testing.assert_allclose(losses(run), losses(tmp_path / "alone"), rtol=1e-5)
    assert events(run) == ["start", "resize", "preemption_notice", "restart", "crash", "end"]
