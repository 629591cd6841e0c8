"""One piece of work on a node of the cluster, whose lines for people appear where the job was started."""

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import ray

from histoscale.cluster.failures import diagnosis_in
from histoscale.errors import ClusterError

T = TypeVar("T")
Tell = Callable[[str], None]
Work = Callable[[str, Tell], T]
"""Takes the device, `cpu` or `cuda`, and what takes a line for people."""

_POLL_S = 1.0
_PATIENCE_S = 15.0


def run_on_a_node(work: Work[T], cpus: int, tell: Tell, device: str = "auto") -> T:
    """Run work on a node with so many CPUs, and with a GPU where it is to have one.

    Args:
        work: What is run; it is pickled.
        cpus: Of the node.
        tell: Takes a line for people, of the work or on why it has not begun.
        device: `cpu`, `cuda`, or `auto` for a GPU where the cluster has one.

    Raises:
        ClusterError: There is no GPU, or the node is lost.
        HistoscaleError: What the work raises.
    """
    has_gpu = ray.cluster_resources().get("GPU", 0.0) >= 1.0  # type: ignore[no-untyped-call]
    if device == "cuda" and not has_gpu:
        raise ClusterError("the cluster has no GPU", value="--device cuda", remedy="give --device cpu")
    gpus = 1 if has_gpu and device != "cpu" else 0
    worker: Any = ray.remote(_Worker).options(num_cpus=cpus, num_gpus=gpus, max_concurrency=2).remote()
    result = worker.run.remote(work, "cuda" if gpus else "cpu")
    started_s, asked, seen, told = time.monotonic(), worker.lines.remote(0), 0, False
    while True:
        ended = bool(ray.wait([result], timeout=_POLL_S)[0])
        try:
            if ray.wait([asked], timeout=0)[0]:
                lines: list[str] = ray.get(asked)
                seen += len(lines)
                for line in lines:
                    tell(line)
                asked = worker.lines.remote(seen)
            elif not told and time.monotonic() - started_s > _PATIENCE_S:
                tell(_waiting(cpus, gpus))
                told = True
            if ended:
                for line in ray.get(worker.lines.remote(seen)):
                    tell(line)
                found: T = ray.get(result)
                return found
        except ray.exceptions.RayActorError as error:
            raise ClusterError(
                "the node that did the work is lost, or its memory did not suffice",
                value=str(error).strip().splitlines()[0],
                expected="a node that stays",
                remedy="run the same command again",
                transient=True,
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise diagnosis_in(error) or error from None


class _Worker(Generic[T]):
    """The actor: one thread works, another gives the lines out."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._lock = threading.Lock()

    def run(self, work: Work[T], device: str) -> T:
        return work(device, self._tell)

    def lines(self, after: int) -> list[str]:
        with self._lock:
            return self._lines[after:]

    def _tell(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)


def _waiting(cpus: int, gpus: int) -> str:
    """Why nothing is heard of the work yet."""
    total, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
    wanted = f"{cpus} free CPU{'s' if cpus > 1 else ''}" + (" and a free GPU" if gpus else "")
    said = [f"{free.get(name, 0):g} of {total[name]:g} {name}s are free" for name in ("CPU", "GPU") if name in total]
    return f"waiting for a process on a node with {wanted}; {', '.join(said)}"
