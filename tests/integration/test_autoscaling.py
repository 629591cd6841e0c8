"""Ray's real autoscaler: nodes of two kinds come from nothing when a run asks, and go when nobody needs them."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.integration.autoscaled import NodeType, autoscaled_head, nodes_of, processes_of_node
from tests.integration.jobs_at_work import TINY, Submission, run_to_the_end, train_workers
from tests.integration.local_nodes import INSTANCE

from histoscale.bench.watched_job import set_words
from histoscale.checkpoint.ledger import read_history
from histoscale.cluster.local import LocalHead
from histoscale.observe.timeline import read_events
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store

TYPES = {"trainer": NodeType(cpus=2, most=2), "reader": NodeType(cpus=1, most=2)}
IDLE_S = 15.0
WAIT_S = 240.0
STEPS, TILES = 450, 64
# Waits for the room of one worker, one reader and the planner.
ROOM = """
import sys, time
sys.path.insert(0, "platform")
import ray
from histoscale.cluster.resources import wait_for_resources
from histoscale.config.running import ClusterSection

ray.init(log_to_driver=False)
wait_for_resources(ClusterSection(workers=1, cpus_per_worker=2, readers=1), "cpu", lambda line: print(line, flush=True))
print("room", flush=True)
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHead]:
    with autoscaled_head(tmp_path_factory.mktemp("autoscaler"), TYPES, IDLE_S) as head:
        yield head


def wait_until(true: Callable[[], bool], head: LocalHead) -> float:
    """Wait; answers how many seconds that took."""
    began_s = time.monotonic()
    while not true():
        assert time.monotonic() - began_s < WAIT_S, f"nodes: {dict(nodes_of(head))}"
        time.sleep(0.5)
    return time.monotonic() - began_s


def test_nodes_come_from_nothing_when_a_run_needs_room_and_go_when_they_are_idle(
    head: LocalHead,
) -> None:
    wait_until(lambda: not nodes_of(head), head)
    text = run_to_the_end(head, ["python", "-c", ROOM])
    assert "waiting up to 600 s for 4 CPU more" in text
    assert "\nroom" in text
    came = nodes_of(head)
    assert came["trainer"] >= 1
    assert came["trainer"] * 2 + came["reader"] >= 4
    wait_until(lambda: not nodes_of(head), head)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_an_elastic_run_is_served_from_nothing_outlives_a_lost_node_and_leaves_nothing(
    head: LocalHead, tmp_path: Path
) -> None:
    make_slides(tmp_path / "slides", count=2)
    index, run = str(tmp_path / "index"), tmp_path / "run"
    run_to_the_end(head, ["python", "jobs/index.py", str(tmp_path / "slides"), "--out", index])
    words = ["python", "jobs/pretrain.py", "--index", index, "--out", str(run), *TINY]
    wait_until(lambda: not nodes_of(head), head)
    assert "error: no node of the cluster tells what to train on" in Submission(head, words).finish()

    settings = [f"batch.tiles={TILES}", f"schedule.images={STEPS * TILES}", "cluster.device=cpu"]
    settings += ["cluster.workers=[1, 2]", "cluster.cpus_per_worker=2", "cluster.readers=[1, 2]"]
    job = Submission(head, [*words, *set_words(*settings)])
    job.wait_for(lambda line: "from 1 to 2 workers" in line)
    job.wait_for(lambda line: "restarted on 2 workers" in line)
    job.wait_for(lambda line: (found := re.search(r"^step (\d+)/", line)) is not None and int(found[1]) > STEPS // 2)
    assert nodes_of(head)["trainer"] == 2

    lost = train_workers(head)[0].environ()[INSTANCE]
    for process in processes_of_node(head, lost):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait_for(lambda line: re.search(r"a node with workers was taken away|the workers failed", line) is not None)
    job.finish()
    assert job.status == 0, job.lines
    assert dict(read_history(open_store(run), STEPS)) == {step: [(step * TILES, TILES)] for step in range(STEPS)}
    kinds = [event.kind.value for event in read_events(open_store(run))]
    assert [kinds[0], kinds[-1]] == ["start", "end"]
    assert "resize" in kinds
    wait_until(lambda: not nodes_of(head), head)
