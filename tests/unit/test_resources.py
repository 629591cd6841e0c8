import pytest

from histoscale.cluster import resources
from histoscale.cluster.resources import needed_resources, resolve_device, wait_for_resources
from histoscale.config.running import ClusterSection
from histoscale.errors import ClusterError

CLUSTER = ClusterSection(workers=3, cpus_per_worker=2, readers=4, start_timeout_s=0.2)


class FakeCluster:
    """Stands for Ray's answers: what is there, and whether a placement group has its room, at each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, there: dict[str, float], *ready: bool) -> None:
        self._ready = list(ready)
        self.asked: list[dict[str, float]] = []
        self.removed = False
        monkeypatch.setattr(resources, "_resources", lambda: there)
        monkeypatch.setattr(resources, "placement_group", self._ask)
        monkeypatch.setattr(resources, "remove_placement_group", self._remove)

    def _ask(self, bundles: list[dict[str, float]], strategy: str) -> "FakeCluster":
        self.asked = bundles
        return self

    def _remove(self, group: "FakeCluster") -> None:
        self.removed = group is self

    def wait(self, timeout_s: float) -> bool:
        return self._ready.pop(0) if self._ready else False


def test_workers_readers_and_planner_are_counted() -> None:
    assert needed_resources(CLUSTER, "cpu") == {"CPU": 11.0}
    assert needed_resources(CLUSTER, "cuda") == {"CPU": 11.0, "GPU": 3.0}


def test_the_device_is_what_the_recipe_says_or_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch, {"CPU": 8.0, "GPU": 2.0})
    assert resolve_device(ClusterSection(), "auto") == "cuda"
    assert resolve_device(ClusterSection(device="cpu"), "bf16") == "cpu"
    FakeCluster(monkeypatch, {"CPU": 8.0})
    assert resolve_device(ClusterSection(), "auto") == "cpu"


def test_a_cluster_without_a_node_is_told_the_device_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch, {"memory": 1.0})
    assert resolve_device(ClusterSection(device="cuda"), "bf16") == "cuda"
    with pytest.raises(ClusterError, match=r"tells what to train on.*cluster.device=auto.*--set cluster.device=cuda"):
        resolve_device(ClusterSection(), "auto")


def test_a_run_in_bf16_is_not_left_to_cpus_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch, {"CPU": 8.0})
    with pytest.raises(ClusterError, match=r"no node with a GPU.*bf16.*--set cluster.device=cuda, or =cpu"):
        resolve_device(ClusterSection(), "bf16")
    assert resolve_device(ClusterSection(device="cpu"), "bf16") == "cpu"


def test_room_that_is_there_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, {"CPU": 12.0}, True)
    told: list[str] = []
    wait_for_resources(CLUSTER, "cpu", told.append, poll_s=0.01)
    assert (told, cluster.removed) == ([], True)


def test_room_is_asked_for_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, {"CPU": 4.0}, False, False, True)
    told: list[str] = []
    wait_for_resources(CLUSTER, "cpu", told.append, poll_s=0.01)
    assert told == ["waiting up to 0.2 s for 7 CPU more: the run begins with 3 x (2 CPU) and 5 x (1 CPU)"]
    assert cluster.asked == [{"CPU": 2.0}] * 3 + [{"CPU": 1.0}] * 5
    assert cluster.removed


def test_room_that_others_have_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch, {"CPU": 12.0}, False, True)
    told: list[str] = []
    wait_for_resources(CLUSTER, "cpu", told.append, poll_s=0.01)
    assert told == ["waiting up to 0.2 s for room that others have: the run begins with 3 x (2 CPU) and 5 x (1 CPU)"]


def test_a_cluster_that_stays_too_small_is_a_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(monkeypatch, {"CPU": 4.0})
    with pytest.raises(ClusterError, match=r"too small.*7 CPU more missing.*3 x \(2 CPU\) and 5 x \(1 CPU\)") as it:
        wait_for_resources(CLUSTER, "cpu", lambda line: None, poll_s=0.01)
    assert it.value.transient
    assert cluster.removed


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
