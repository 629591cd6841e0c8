"""Where a run lives: raylets on this machine, an S3 server behind a proxy that can be switched, a small disk."""

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster
from tests.conftest import S3Server
from tests.integration.jobs_at_work import REPOSITORY

from histoscale.bench.proxy import Switch, switched_proxy
from histoscale.bench.ray_local import announce_end
from histoscale.cluster.job import ENVIRONMENT
from histoscale.cluster.local import _free_ports

WORKER_CPUS = 2
DISK_BYTES = 48 * 2**20
_MARK = "HISTOSCALE_CHAOS"
STORE_BYTES = 2 * 10**8


@dataclass
class Site:
    """A cluster whose nodes come and go, and what they stand on.

    Attributes:
        cluster: The nodes.
        job_server: URL of the job server; empty where there is none.
        switch: Makes requests to S3 go wrong.
        environment: Of every process of the cluster.
    """

    cluster: Cluster
    job_server: str
    switch: Switch
    environment: dict[str, str]
    _trainer_nodes: list[Any] = field(default_factory=list)

    def add_trainer_node(self) -> None:
        """A node that one worker fits on."""
        self._trainer_nodes.append(self.cluster.add_node(num_cpus=WORKER_CPUS, object_store_memory=STORE_BYTES))

    def processes(self, title: str) -> list[psutil.Process]:
        """Living processes of this cluster whose command line holds `title`, by age."""
        found = [process for process in psutil.process_iter() if title in _title(process) and self._owns(process)]
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self.environment[_MARK]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def trainers(self) -> list[psutil.Process]:
        """The workers that train."""
        return self.processes("RayTrainWorker")

    def readers(self) -> list[psutil.Process]:
        """The actors that read tiles."""
        return self.processes("MapBatches(Reader)")

    def driver(self) -> psutil.Process:
        """The process of the job."""
        (driver,) = (one for one in self.processes("jobs/pretrain.py") if one.cmdline()[1] == "jobs/pretrain.py")
        return driver

    def busy_nodes(self) -> list[Any]:
        """The nodes that a worker trains on."""
        return [
            node for node in self._trainer_nodes if any("RayTrainWorker" in _title(process) for process in _tree(node))
        ]

    def drain(self, node: Any, notice_s: float) -> None:
        """Say that a node is about to be taken away."""
        announce_end(self.cluster.address, node.node_id, notice_s)

    def kill_raylet(self, node: Any) -> None:
        """SIGKILL of the raylet alone: its workers have to find out."""
        _raylet(node).kill()

    def kill_machine(self, node: Any) -> None:
        """SIGKILL of all that runs on a node, at once."""
        for process in [_raylet(node), *_tree(node)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def forget(self, node: Any) -> None:
        """Clear up what is left of a node that was killed."""
        self._trainer_nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def open_site(s3_server: S3Server, *, head_cpus: int, trainer_nodes: int, job_server: bool) -> Iterator[Site]:
    """A head that readers fit on, and nodes for trainers; all of them reach S3 through the proxy."""
    with pytest.MonkeyPatch.context() as patch, switched_proxy(s3_server.endpoint) as switch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
            patch.delenv(name)
        values = {**ENVIRONMENT, **s3_server.environment(), "AWS_ENDPOINT_URL": switch.endpoint}
        # Threads that wait must not spin on two cores.
        values |= {"RAY_AUTH_MODE": "disabled", "OMP_WAIT_POLICY": "PASSIVE", _MARK: secrets.token_hex(8)}
        values |= {"PYTHONPATH": str(REPOSITORY / "platform"), "RAY_USAGE_STATS_ENABLED": "0"}
        values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # jobs say `python`
        for name, value in values.items():
            patch.setenv(name, value)
        port, agent_port = _free_ports(2)
        head = {"num_cpus": head_cpus, "object_store_memory": STORE_BYTES, "include_dashboard": job_server}
        head |= {"dashboard_host": "127.0.0.1", "dashboard_port": port, "dashboard_agent_listen_port": agent_port}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        site = Site(cluster, f"http://127.0.0.1:{port}" if job_server else "", switch, dict(os.environ))
        try:
            for _ in range(trainer_nodes):
                site.add_trainer_node()
            yield site
        finally:
            cluster.shutdown()
            for process in site.processes(""):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a disk of `DISK_BYTES` on a folder; False where this user may not."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "histoscale-chaos", str(folder)]
    mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _raylet(node: Any) -> psutil.Process:
    (raylet,) = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid)


def _tree(node: Any) -> list[psutil.Process]:
    """What a raylet has started."""
    try:
        return _raylet(node).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
