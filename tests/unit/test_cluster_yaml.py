"""The cluster that a team rents: valid to Ray, guarded by a token, no work on the head, every spot node watched."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from histoscale.cluster.spot import _parser

ROOT = Path(__file__).parents[2]
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return values


def commands(cluster: dict[str, Any], *lists: str) -> list[list[str]]:
    """The simple commands of some lists of shell lines, as words."""
    lines = [part for name in lists for line in cluster[name] for part in re.split(r";|&&", line)]
    return [shlex.split(line.replace("2>&1 &", "")) for line in lines if line.strip()]


def test_ray_takes_it(cluster: dict[str, Any]) -> None:
    config = prepare_config(cluster)
    config.setdefault("cluster_synced_files", [])
    validate_config(config)
    config["available_node_types"]["head"]["resources"]["CPU"] = 0.5
    with pytest.raises(Exception, match=r"0\.5"):
        validate_config(config)


def test_the_head_has_no_work_and_stays(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]


def test_spot_comes_before_what_is_dear(cluster: dict[str, Any]) -> None:
    spot, dear = (cluster["available_node_types"][f"trainer-{name}"] for name in ("spot", "on-demand"))
    assert spot["priority"] > dear["priority"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert dear["node_config"]["InstanceMarketOptions"] == {}
    assert {**spot["node_config"], "InstanceMarketOptions": {}} == dear["node_config"]


def test_every_ray_starts_with_options_that_it_has_and_asks_for_the_token(cluster: dict[str, Any]) -> None:
    known = {name for option in ray_start.params for name in option.opts}
    for name in STARTS:
        (line,) = (line for line in cluster[name] if "ray start" in line)
        assert "RAY_AUTH_MODE=token" in line
        (start,) = (words for words in commands({name: [line]}, name) if words[:2] == ["ray", "start"])
        assert {word.split("=")[0] for word in start[2:]} <= known
    (head,) = (words for words in commands(cluster, STARTS[0]) if words[:2] == ["ray", "start"])
    assert "--dashboard-host=127.0.0.1" in head
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_every_worker_watches_for_the_end_of_its_node(cluster: dict[str, Any]) -> None:
    (line,) = (line for line in cluster[STARTS[1]] if "histoscale.cluster.spot" in line)
    assert "RAY_AUTH_MODE=token" in line
    (watch,) = (words for words in commands({"one": [line]}, "one") if "histoscale.cluster.spot" in words)
    options = watch[watch.index("histoscale.cluster.spot") + 1 : watch.index(">")]
    _parser().parse_args([word.replace("$RAY_HEAD_IP", "10.0.0.1") for word in options])


def test_nodes_install_what_is_pinned(cluster: dict[str, Any]) -> None:
    assert any("-c ~/histoscale/constraints.txt" in line for line in cluster["setup_commands"])
    assert (ROOT / "constraints.txt").exists()


def test_there_is_no_secret_in_it() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|aws_secret|[0-9a-f]{40,}|BEGIN [A-Z ]*PRIVATE KEY", text, re.IGNORECASE)
