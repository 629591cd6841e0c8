"""A local head with Ray's own autoscaler, which starts and ends nodes of this machine."""

import contextlib
import json
import os
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from ray._private.services import get_node_ip_address
from tests.integration.jobs_at_work import REPOSITORY
from tests.integration.local_nodes import HEAD, INSTANCE, NODE_TYPE

from histoscale.cluster.job import ENVIRONMENT
from histoscale.cluster.local import HeadSize, LocalHead, _free_ports

_STORE_BYTES = 150_000_000


@dataclass(frozen=True)
class NodeType:
    """What a node of a type offers, and how many there may be."""

    cpus: int
    most: int


@contextlib.contextmanager
def autoscaled_head(folder: Path, types: Mapping[str, NodeType], idle_s: float) -> Iterator[LocalHead]:
    """A head without CPUs; nodes come when they are asked for, and go after `idle_s` without work.

    Args:
        folder: For the autoscaler's configuration.
        types: Of nodes, by name; a node has a resource of the name of its type.
        idle_s: Seconds.
    """
    (port,) = _free_ports(1)
    config = folder / "autoscaler.yaml"
    config.write_text(yaml.safe_dump(_configuration(f"{get_node_ip_address()}:{port}", types, idle_s)))  # type: ignore[no-untyped-call]
    environment = {**os.environ, **ENVIRONMENT, "OMP_WAIT_POLICY": "PASSIVE"}  # waiting must not spin on two cores
    environment |= {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    environment |= {INSTANCE: HEAD, NODE_TYPE: HEAD, "PYTHONPATH": f"{REPOSITORY / 'platform'}{os.pathsep}{REPOSITORY}"}
    options = [f"--port={port}", f"--autoscaling-config={config}"]
    with LocalHead(HeadSize(cpus=0, object_store_bytes=_STORE_BYTES), environment, options=options) as head:
        yield head


def _configuration(address: str, types: Mapping[str, NodeType], idle_s: float) -> dict[str, object]:
    nodes = {
        name: {
            "resources": {"CPU": kind.cpus, "object_store_memory": _STORE_BYTES, name: 1},
            "min_workers": 0,
            "max_workers": kind.most,
            "node_config": {},
        }
        for name, kind in types.items()
    }
    head = {HEAD: {"resources": {"CPU": 0}, "max_workers": 0, "node_config": {}}}
    provider = {"type": "external", "module": "tests.integration.local_nodes.LocalNodes", "head_address": address}
    provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
    return {
        "cluster_name": "local",
        "max_workers": sum(kind.most for kind in types.values()),
        "idle_timeout_minutes": idle_s / 60.0,
        "provider": provider,
        "auth": {},
        **{f"{whose}setup_commands": [] for whose in ("", "head_", "worker_")},
        "cluster_synced_files": [],
        "available_node_types": {**head, **nodes},
        "head_node_type": HEAD,
    }


def nodes_of(head: LocalHead) -> Counter[str]:
    """Living nodes by their type, the head left out, as the head's own API tells."""
    request = urllib.request.Request(
        f"{head.address}/api/v0/nodes?detail=1",
        headers={"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        rows = json.load(answer)["data"]["result"]["result"]
    kinds = (kind for row in rows if row["state"] == "ALIVE" for kind in row["resources_total"])
    return Counter(kind for kind in kinds if kind in ("trainer", "reader"))


def processes_of_node(head: LocalHead, node: str) -> list[psutil.Process]:
    """Everything that runs on a node; its name is the type and a number."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            environment = process.environ()
            ours = environment.get("RAY_AUTH_TOKEN") == head.environment["RAY_AUTH_TOKEN"]
            if ours and environment.get(INSTANCE) == node:
                found.append(process)
    return found
