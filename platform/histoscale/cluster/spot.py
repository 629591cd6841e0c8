r"""Drain this Ray node when AWS announces that it takes the spot instance back; nothing in Ray does that.

    python -m histoscale.cluster.spot --address GCS_HOST:6379 &
    ray start --address GCS_HOST:6379 ...

One beside every raylet of a worker node, before or after `ray start`; it ends with the raylet. It asks the instance's
metadata server (IMDSv2) every 2 s, and on a notice tells Ray the reason PREEMPTION and the deadline, about two minutes
away: the run commits a checkpoint and goes on without the node. A cluster with token authentication is reached as by
`ray start`, through RAY_AUTH_MODE and RAY_AUTH_TOKEN or its file. Off AWS it says so once and goes on asking.

--on-rebalance drain|ignore. A rebalance recommendation says that an interruption has become likely; it may come long
before the notice, with it, or without any notice to follow. `ignore`, the default, because draining gives the node up
at once and costs a restart, for an instance that is paid for and often stays; because the notice that follows leaves
the same two minutes, enough for a checkpoint; and because `ray up` replaces the node from the same pool, whose next
instance is soon recommended away too. AWS's own handler for Kubernetes leaves such nodes alone by default as well.
`drain` is for runs whose checkpoint takes longer than two minutes, and for pools with better instances at hand.

Not needed on Kubernetes: `ray start --block`, the main process of KubeRay's pods, drains its node by itself on the
SIGTERM of a pod that is evicted (RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S says for how long).
"""

import argparse
import contextlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]
from ray.exceptions import RayError

from histoscale.cluster.job import run_job
from histoscale.cluster.spot_notice import Answer, Notice, OnRebalance, judge
from histoscale.errors import ClusterError

METADATA_ENDPOINT = "http://169.254.169.254"
INTERRUPTION_PATH = "/latest/meta-data/spot/instance-action"
REBALANCE_PATH = "/latest/meta-data/events/recommendations/rebalance"
TOKEN_PATH = "/latest/api/token"
ASK_EVERY_S = 2.0
UNREACHABLE_TOLD_AFTER_S = 60.0

_TOKEN_LIFE_S = 21600  # the longest that AWS grants
_HTTP_TIMEOUT_S = 1.0
_GCS_TIMEOUT_S = 5.0
_MAX_BODY_BYTES = 65536
_UNAUTHORIZED = 401
_PROC = Path("/proc")


class MetadataServer:
    """The metadata service of an EC2 instance, version 2: every question carries a token.

    Args:
        endpoint: Its URL, without a path.
        timeout_s: Seconds to wait for an answer.
    """

    def __init__(self, endpoint: str, timeout_s: float = _HTTP_TIMEOUT_S) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._timeout_s = timeout_s
        self._token: str | None = None
        self._direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy is another machine

    def get(self, path: str) -> Answer:
        """Ask for one item; a token that is no longer accepted is renewed once.

        Raises:
            ClusterError: There is no answer, or no token.
        """
        answer = self._ask_with_token(path)
        if answer.status == _UNAUTHORIZED:
            self._token = None
            answer = self._ask_with_token(path)
        return answer

    def _ask_with_token(self, path: str) -> Answer:
        if self._token is None:
            life = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_LIFE_S)}
            answer = self._ask("PUT", TOKEN_PATH, life)
            if answer.status != http.HTTPStatus.OK:
                raise self._silence(f"status {answer.status} in place of a token")
            self._token = answer.body
        return self._ask("GET", path, {"X-aws-ec2-metadata-token": self._token})

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        try:
            request = urllib.request.Request(self._endpoint + path, method=method, headers=headers)
            with self._direct.open(request, timeout=self._timeout_s) as response:
                return Answer(response.status, response.read(_MAX_BODY_BYTES).decode(errors="replace"))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, "")
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a token that is no header
            raise self._silence(str(error)) from error

    def _silence(self, reason: str) -> ClusterError:
        return ClusterError(
            "the metadata server of AWS does not answer",
            value=reason,
            expected=f"IMDSv2 on {self._endpoint}",
            remedy="off AWS this watcher is of no use; in a container on AWS set the instance's HttpPutResponseHopLimit"
            " to 2 or use the host's network",
        )


def local_raylets(proc: Path = _PROC) -> dict[str, int]:
    """Process ids of the raylets on this machine, by the hexadecimal id of their node."""
    found = {}
    for entry in proc.glob("[0-9]*"):
        node_id = _node_id_of(entry)
        if node_id is not None:
            found[node_id] = int(entry.name)
    return found


def _node_id_of(process: Path) -> str | None:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return None  # it ended while we looked
    if Path(os.fsdecode(words[0])).name != "raylet":
        return None
    return next((os.fsdecode(word[10:]) for word in words if word.startswith(b"--node_id=")), None)


class DrainableNode(Protocol):
    """A node that a watcher watches over."""

    def find(self) -> str:
        """Look which node it is, unless that is known; answers its id. Raises ClusterError where nobody can tell."""

    def has_ended(self) -> bool:
        """Whether it was found, and has ended since."""

    def drain(self, notice: Notice) -> None:
        """Have Ray move everything away. Raises ClusterError where Ray does not."""


class RayNode:
    """The Ray node of this machine, through its process and the cluster's control store (GCS).

    Args:
        address: HOST:PORT of the GCS.
        node_id: Which node, where several run on this machine.
        proc: Where Linux keeps its processes.
    """

    def __init__(self, address: str, node_id: str | None = None, proc: Path = _PROC) -> None:
        self._address = address
        self._wanted = node_id
        self._proc = proc
        self._found: tuple[str, int] | None = None

    def find(self) -> str:
        """Look which node of the cluster runs on this machine, unless that is known; answers its id.

        Raises:
            ClusterError: None or several do, or the GCS does not answer.
        """
        if self._found is None:
            here = local_raylets(self._proc)
            nodes = sorted(here.keys() & self._alive() & ({self._wanted} if self._wanted else here.keys()))
            if len(nodes) != 1:
                raise ClusterError(
                    f"{len(nodes) or 'no'} raylets of the cluster run on this machine",
                    value=", ".join(nodes) or self._wanted,
                    expected=f"one, of the cluster at {self._address}",
                    remedy="name one with --node-id"
                    if nodes
                    else "start it with `ray start`; the watcher waits for it",
                )
            self._found = nodes[0], here[nodes[0]]
        return self._found[0]

    def has_ended(self) -> bool:
        """Whether the raylet was found, and has ended since."""
        return self._found is not None and _node_id_of(self._proc / str(self._found[1])) != self._found[0]

    def drain(self, notice: Notice) -> None:
        """Have Ray move everything away until the notice's deadline.

        Raises:
            ClusterError: The node is not found, or the GCS does not take the drain.
        """
        node_id = self.find()
        with self._gcs() as gcs:
            accepted, objection = gcs.drain_node(
                node_id, DRAIN_NODE_REASON_PREEMPTION, notice.reason, notice.deadline_ms, timeout=_GCS_TIMEOUT_S
            )
            # The GCS also accepts what it does not carry out. An idle node is gone as soon as it is drained.
            draining = gcs.get_draining_nodes(timeout=_GCS_TIMEOUT_S)
            if not accepted or (node_id not in draining and node_id in _alive_nodes(gcs)):
                raise ClusterError(
                    "Ray does not drain the node",
                    value=objection or node_id,
                    expected="a node that is alive",
                    remedy="the watcher tries again until the node ends",
                )

    def _alive(self) -> set[str]:
        with self._gcs() as gcs:
            return _alive_nodes(gcs)

    @contextlib.contextmanager
    def _gcs(self) -> Iterator[Any]:
        """A client for a few calls: one that is kept ends its process when the GCS is away for a minute."""
        try:
            yield GcsClient(address=self._address)
        except (RayError, OSError, RuntimeError, ValueError) as error:
            raise ClusterError(
                "the GCS of the Ray cluster does not answer",
                value=(str(error).splitlines() or [type(error).__name__])[0],
                expected=f"it at {self._address}",
                remedy="--address is the one that `ray start --address` has; with token authentication this process"
                " needs the same token",
            ) from error


def _alive_nodes(gcs: Any) -> set[str]:  # noqa: ANN401 - Ray types no client
    nodes = gcs.get_all_node_info(timeout=_GCS_TIMEOUT_S, state_filter=GcsNodeInfo.GcsNodeState.ALIVE)
    return {node_id.hex() for node_id in nodes}


class SpotWatcher:
    """Asks the metadata server, drains the node once a notice, and tells people each thing once.

    Args:
        metadata: The metadata server.
        node: The node of this machine.
        on_rebalance: What a rebalance recommendation is worth.
        tell: Takes a line for people.
    """

    def __init__(
        self, metadata: MetadataServer, node: DrainableNode, on_rebalance: OnRebalance, tell: Callable[[str], None]
    ) -> None:
        self._metadata = metadata
        self._node = node
        self._on_rebalance = on_rebalance
        self._tell = tell
        self._told: set[str] = set()
        self._drained: set[str] = set()
        self._silent_since_s: float | None = None

    def look(self) -> bool:
        """Ask once and act; answers whether there is still a node to watch over."""
        if self._node.has_ended():
            self._tell("the raylet has ended, so there is nothing left to watch over")
            return False
        self._find_node()
        try:
            answers = [self._metadata.get(path) for path in (INTERRUPTION_PATH, REBALANCE_PATH)]
        except ClusterError as error:
            self._note_silence(error)
            return True
        self._silent_since_s = None
        verdict = judge(answers[0], answers[1], self._on_rebalance, time.time_ns() // 1_000_000)
        for remark in verdict.remarks:
            self._tell_once(remark)
        if verdict.notice is not None and verdict.notice.key not in self._drained:
            self._drain(verdict.notice)
        return True

    def _find_node(self) -> None:
        try:
            self._tell_once(f"watching over node {self._node.find()}")
        except ClusterError as error:
            self._tell_once(f"warning: {error}")

    def _drain(self, notice: Notice) -> None:
        try:
            self._node.drain(notice)
        except ClusterError as error:
            self._tell_once(f"warning: {notice.reason}, but: {error}")
            return
        self._drained.add(notice.key)
        left_s = notice.deadline_ms / 1000 - time.time()
        self._tell(f"{notice.reason}: node {self._node.find()} is draining, {left_s:.0f} s are left")

    def _note_silence(self, error: ClusterError) -> None:
        now_s = time.monotonic()
        if self._silent_since_s is None:
            self._silent_since_s = now_s
        if now_s - self._silent_since_s >= UNREACHABLE_TOLD_AFTER_S:
            self._tell_once(f"warning: {error}", about="silence")

    def _tell_once(self, line: str, about: str | None = None) -> None:
        if (about or line) not in self._told:
            self._told.add(about or line)
            self._tell(line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the arguments, and watch until the raylet ends."""
    options = _parser().parse_args(arguments)
    watcher = SpotWatcher(
        MetadataServer(options.metadata), RayNode(options.address, options.node_id), options.on_rebalance, _say
    )
    while watcher.look():
        time.sleep(options.ask_every_s)


def _say(line: str) -> None:
    sys.stderr.write(f"spot: {line}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m histoscale.cluster.spot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--address", required=True, type=_host_and_port, help="of the GCS, as for `ray start`")
    parser.add_argument("--node-id", help="in hexadecimal, where several raylets run on this machine")
    parser.add_argument(
        "--on-rebalance",
        type=OnRebalance,
        default=OnRebalance.IGNORE,
        metavar="drain|ignore",
        help="what to do on a rebalance recommendation (default: ignore)",
    )
    parser.add_argument(
        "--ask-every-s",
        type=_seconds,
        default=ASK_EVERY_S,
        metavar="S",
        help=f"seconds between two questions (default: {ASK_EVERY_S:g})",
    )
    parser.add_argument(
        "--metadata",
        default=os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", METADATA_ENDPOINT),
        metavar="URL",
        help=f"the metadata server (default: AWS_EC2_METADATA_SERVICE_ENDPOINT, or {METADATA_ENDPOINT})",
    )
    return parser


def _host_and_port(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
    return text


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 < float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected seconds above zero, got {text!r}")


if __name__ == "__main__":
    run_job(main)
