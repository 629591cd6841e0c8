"""Nodes for Ray's autoscaler that are processes of this machine: each is the `ray start --block` of a rented node."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from histoscale.cluster.local import _free_ports

HEAD = "head"
INSTANCE = "RAY_CLOUD_INSTANCE_ID"  # by these two Ray's autoscaler knows which of its instances a raylet is
NODE_TYPE = "RAY_NODE_TYPE_NAME"
_END_S = 10.0


class LocalNodes(NodeProvider):
    """What a cloud is to the autoscaler; lives in its process, and so do the nodes below it.

    Args:
        provider_config: Holds `head_address`, where nodes join.
        cluster_name: Unused.
    """

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._started = 0
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._tags = {
            HEAD: {
                TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
                TAG_RAY_USER_NODE_TYPE: HEAD,
                TAG_RAY_NODE_NAME: HEAD,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
        }

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        living = [HEAD, *(node_id for node_id, process in self._nodes.items() if process.poll() is None)]
        return [node_id for node_id in living if tag_filters.items() <= self._tags[node_id].items()]

    def is_running(self, node_id: str) -> bool:
        return node_id in self.non_terminated_nodes({})

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self._tags[node_id]

    def internal_ip(self, node_id: str) -> str:
        return node_id

    external_ip = internal_ip

    def create_node_with_resources_and_labels(
        self,
        node_config: Mapping[str, Any],
        tags: Mapping[str, str],
        count: int,
        resources: Mapping[str, float],
        labels: Mapping[str, str],
    ) -> None:
        for _ in range(count):
            self._started += 1
            node_id = f"{tags[TAG_RAY_USER_NODE_TYPE]}-{self._started}"
            self._nodes[node_id] = self._start(node_id, tags[TAG_RAY_USER_NODE_TYPE], dict(resources))
            self._tags[node_id] = {**tags, TAG_RAY_NODE_NAME: node_id, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}

    def _start(self, node_id: str, node_type: str, resources: dict[str, float]) -> "subprocess.Popen[bytes]":
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        words += [f"--address={self.provider_config['head_address']}", f"--num-cpus={resources.pop('CPU', 0):g}"]
        words += [f"--object-store-memory={resources.pop('object_store_memory'):.0f}"]
        words += [f"--dashboard-agent-listen-port={_free_ports(1)[0]}", f"--resources={json.dumps(resources)}"]
        environment = {**os.environ, INSTANCE: node_id, NODE_TYPE: node_type}
        return subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def terminate_node(self, node_id: str) -> None:
        process = self._nodes[node_id]
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
