from typing import Any

import pytest

from histoscale.cluster import resources
from histoscale.cluster.resources import needed_resources, resolve_device, wait_for_resources
from histoscale.config.running import ClusterSection
from histoscale.errors import ClusterError

CLUSTER = ClusterSection(workers=3, cpus_per_worker=2, readers=4, start_timeout_s=0.2)


class FakeCluster:
    """Stands for Ray's answers: what is there grows with each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: dict[str, float]) -> None:
        self._answers = list(answers)
        self.requests: list[list[dict[str, float]]] = []
        monkeypatch.setattr(resources, "_resources", self._look)
        monkeypatch.setattr(resources, "request_resources", self._request)

    def _look(self) -> dict[str, float]:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]

    def _request(self, *, bundles: list[Any]) -> None:
        self.requests.append(bundles)


def test_workers_readers_and_planner_are_counted() -> None:
    assert needed_resources(CLUSTER, "cpu") == {"CPU": 11.0}
    assert needed_resources(CLUSTER, "cuda") == {"CPU": 11.0, "GPU": 3.0}


def test_the_device_is_what_the_recipe_says_or_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch, {"CPU": 8.0, "GPU": 2.0})
    assert resolve_device(ClusterSection()) == "cuda"
    assert resolve_device(ClusterSection(device="cpu")) == "cpu"
    FakeCluster(monkeypatch, {"CPU": 8.0})
    assert resolve_device(ClusterSection()) == "cpu"


def test_what_is_missing_is_asked_of_the_autoscaler_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, {"CPU": 4.0}, {"CPU": 4.0}, {"CPU": 12.0})
    told: list[str] = []
    wait_for_resources(CLUSTER, "cpu", told.append, poll_s=0.01)
    assert told == ["waiting up to 0.2 s for 7 CPU more"]
    assert cluster.requests == [[{"CPU": 2.0}] * 3 + [{"CPU": 1.0}] * 5, []]


def test_a_cluster_that_stays_too_small_is_a_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch, {"CPU": 4.0})
    with pytest.raises(ClusterError, match=r"too small.*7 CPU missing.*11 CPU"):
        wait_for_resources(CLUSTER, "cpu", lambda line: None, poll_s=0.01)


def test_readers_go_first_where_the_trainers_gpus_are(monkeypatch: pytest.MonkeyPatch) -> None:
    label = "ray.io/accelerator-type"
    nodes = [
        {"Alive": True, "Labels": {label: "H100"}},
        {"Alive": True, "Labels": {label: "A100"}},
        {"Alive": False, "Labels": {label: "T4"}},
        {"Alive": True, "Labels": {}},
    ]
    monkeypatch.setattr(resources.ray, "nodes", lambda: nodes)
    assert resources.trainer_nodes("cuda") == {label: "in(A100,H100)"}
    assert resources.trainer_nodes("cpu") == {}
    monkeypatch.setattr(resources.ray, "nodes", lambda: nodes[2:])
    assert resources.trainer_nodes("cuda") == {}
