"""A Ray of a benchmark's own on this machine, and what its processes cost."""

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator

import psutil
import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]


@contextlib.contextmanager
def local_ray(cpus: int, object_store_bytes: int = 2 * 10**9) -> Iterator[None]:
    """Start a Ray that nobody else uses; it ends with the block, and touches no other Ray of the machine."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # socket paths must stay short
        ray.init(
            address="local",
            num_cpus=cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=folder,
        )
        try:
            yield
        finally:
            ray.shutdown()


def announce_end(address: str, node_id: str, notice_s: float) -> None:
    """Tell the cluster at `address` that a node is taken away in `notice_s` seconds, as a spot watcher does."""
    deadline_ms = int((time.time() + notice_s) * 1000)
    GcsClient(address=address).drain_node(node_id, DRAIN_NODE_REASON_PREEMPTION, "spot", deadline_ms)


def own_processes(*names: str) -> list[psutil.Process]:
    """Ray's worker processes below this one whose title holds one of the names; all of them without any."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and (not names or any(name in title for name in names)):
                found.append(process)
    return found


class CpuMeter:
    """CPU seconds of this process and of Ray's workers below it, those that end in between included."""

    def __init__(self) -> None:
        self._start = self._now()

    def seconds(self) -> float:
        """Since the meter was made; a process that is new since then counts whole."""
        now = self._now()
        return sum(spent_s - self._start.get(pid, 0.0) for pid, spent_s in now.items())

    @staticmethod
    def _now() -> dict[int, float]:
        spent_s = {}
        for process in [psutil.Process(), *own_processes()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent_s[process.pid] = times.user + times.system
        return spent_s


def resident_bytes(*names: str) -> int:
    """Largest resident memory among the named Ray processes of this one, object store pages left out."""
    sizes = [0]
    for process in own_processes(*names):
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = process.memory_info()
            sizes.append(memory.rss - memory.shared)
    return max(sizes)
