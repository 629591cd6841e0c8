"""A spot notice drains one real raylet of a real cluster that asks for tokens; only AWS is a fake."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from tests.fake_metadata import FakeMetadataServer

from histoscale.cluster.local import HeadSize, LocalHead, _free_ports
from histoscale.cluster.spot import INTERRUPTION_PATH, local_raylets

SIZE = HeadSize(cpus=1, object_store_bytes=100_000_000)
WAIT_S = 60.0
# Keeps the node busy, for an idle one is gone as soon as it is drained; then answers each line with what Ray Train
# looks at to learn of preemptions.
DRIVER = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0, resources={"spot": 1})
class Busy:
    def node(self):
        return ray.get_runtime_context().get_node_id()

busy = Busy.remote()
print(ray.get(busy.node.remote()), flush=True)
for _ in sys.stdin:
    print(json.dumps(ray._private.state.state.get_draining_nodes()), flush=True)
"""


@pytest.fixture
def fake() -> Iterator[FakeMetadataServer]:
    server = FakeMetadataServer()
    yield server
    server.stop()


class Started:
    """A process of the test's own, with pipes; it ends with the test."""

    def __init__(self, stack: contextlib.ExitStack, head: LocalHead, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *words],
            env=head.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        stack.callback(self.stop)

    def stop(self) -> None:
        """SIGTERM, by which `ray start --block` also ends its raylet; never hangs."""
        self.process.terminate()
        try:
            self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def line(self, holding: str) -> str:
        assert self.process.stdout is not None
        said = []
        for line in self.process.stdout:
            said.append(line)
            if holding in line:
                return line
        raise AssertionError("".join(said))

    def ask(self) -> dict[str, int]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.line("{"))


def gcs_of(head: LocalHead) -> str:
    assert head._process is not None
    port = next(word.partition("=")[2] for word in head._process.args if word.startswith("--port="))
    (pid,) = (pid for pid in local_raylets().values() if os.getsid(pid) == head._process.pid)
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return next(word.partition("=")[2] for word in words if word.startswith("--node_ip_address=")) + ":" + port


@pytest.mark.slow
def test_a_notice_drains_this_node_alone_with_its_deadline(fake: FakeMetadataServer) -> None:
    with LocalHead(SIZE) as head, contextlib.ExitStack() as stack:
        address = gcs_of(head)
        start = ["-m", "ray.scripts.scripts", "start", f"--address={address}", "--block", "--disable-usage-stats"]
        start += ["--num-cpus=1", "--object-store-memory=80000000", '--resources={"spot": 1}']
        node = Started(stack, head, *start, f"--dashboard-agent-listen-port={_free_ports(1)[0]}")
        driver = Started(stack, head, "-c", DRIVER, address)
        node_id = driver.line("").strip()
        watch = ["-m", "histoscale.cluster.spot", "--address", address, "--metadata", fake.url, "--ask-every-s", "0.2"]
        watcher = Started(stack, head, *watch, "--node-id", node_id)
        unsure = Started(stack, head, *watch)
        watcher.line(f"spot: watching over node {node_id}")
        unsure.line("2 raylets of the cluster run on this machine")
        assert driver.ask() == {}

        deadline = datetime.now().astimezone().replace(microsecond=0) + timedelta(seconds=110)
        fake.announce(INTERRUPTION_PATH, {"action": "terminate", "time": deadline.isoformat()})
        watcher.line(f"node {node_id} is draining")
        assert driver.ask() == {node_id: int(deadline.timestamp() * 1000)}

        node.process.send_signal(signal.SIGTERM)
        watcher.line("the raylet has ended")
        assert watcher.process.wait(WAIT_S) == 0
