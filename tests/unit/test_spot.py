"""Notices of AWS, asked of a fake metadata server on 127.0.0.1 and acted on by a fake node."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.fake_metadata import FakeMetadataServer

from histoscale.cluster import spot
from histoscale.cluster.spot import INTERRUPTION_PATH, REBALANCE_PATH, MetadataServer, RayNode, SpotWatcher
from histoscale.cluster.spot_notice import Answer, Notice, OnRebalance, judge
from histoscale.errors import ClusterError

NOW_MS = 1_790_000_000_000
NONE = Answer(404, "")
INTERRUPTION = {"action": "terminate", "time": "2026-09-21T13:35:20Z"}
INTERRUPTION_MS = 1_789_997_720_000
REBALANCE = {"noticeTime": "2026-09-21T13:00:00Z"}


def answer(fields: object) -> Answer:
    return Answer(200, json.dumps(fields))


def test_no_notice_is_no_reason() -> None:
    assert judge(NONE, NONE, OnRebalance.DRAIN, NOW_MS).notice is None
    assert judge(NONE, NONE, OnRebalance.DRAIN, NOW_MS).remarks == ()


def test_an_interruption_has_the_deadline_of_its_notice_and_outranks_a_recommendation() -> None:
    verdict = judge(answer(INTERRUPTION), answer(REBALANCE), OnRebalance.DRAIN, NOW_MS)
    assert verdict.notice is not None
    assert verdict.notice.deadline_ms == INTERRUPTION_MS
    assert verdict.notice.reason == "spot interruption: terminate at 2026-09-21T13:35:20Z"


@pytest.mark.parametrize("time_", [None, "soon", "2026-09-21T13:35:20", 7])
def test_an_interruption_without_a_readable_time_still_drains_and_is_told(time_: object) -> None:
    verdict = judge(answer({"action": "stop", "time": time_}), NONE, OnRebalance.IGNORE, NOW_MS)
    assert verdict.notice is not None
    assert verdict.notice.deadline_ms == NOW_MS + 120_000
    assert "no readable time" in verdict.remarks[0]


def test_a_recommendation_drains_only_where_that_is_wanted() -> None:
    drained = judge(NONE, answer(REBALANCE), OnRebalance.DRAIN, NOW_MS)
    assert drained.notice is not None
    assert drained.notice.deadline_ms == NOW_MS + 120_000
    later = judge(NONE, answer(REBALANCE), OnRebalance.DRAIN, NOW_MS + 2000)
    assert later.notice is not None
    assert later.notice.key == drained.notice.key
    ignored = judge(NONE, answer(REBALANCE), OnRebalance.IGNORE, NOW_MS)
    assert ignored.notice is None
    assert "recommends leaving this instance since 2026-09-21T13:00:00Z" in ignored.remarks[0]


@pytest.mark.parametrize("body", ["", "{", "[1]", '"terminate"', "<html>", "\ufffd"])
def test_garbage_is_a_warning_and_no_notice(body: str) -> None:
    verdict = judge(Answer(200, body), NONE, OnRebalance.DRAIN, NOW_MS)
    assert verdict.notice is None
    assert verdict.remarks[0].startswith("warning: the interruption notice is no JSON object")


def test_an_odd_status_is_a_warning() -> None:
    verdict = judge(NONE, Answer(503, ""), OnRebalance.DRAIN, NOW_MS)
    assert verdict.remarks == (
        "warning: asked for the rebalance recommendation, the metadata server answers status 503",
    )


@pytest.fixture
def fake() -> Iterator[FakeMetadataServer]:
    server = FakeMetadataServer()
    yield server
    server.stop()


def test_one_token_serves_until_it_is_refused(fake: FakeMetadataServer) -> None:
    metadata = MetadataServer(fake.url)
    assert metadata.get(INTERRUPTION_PATH) == NONE
    fake.announce(INTERRUPTION_PATH, INTERRUPTION)
    assert metadata.get(INTERRUPTION_PATH) == answer(INTERRUPTION)
    assert fake.tokens_given == 1
    assert fake.lives == ["21600"]
    fake.token = "token-2"
    assert metadata.get(INTERRUPTION_PATH) == answer(INTERRUPTION)
    assert fake.tokens_given == 2


def test_a_server_without_tokens_a_slow_one_and_none_at_all_do_not_answer(fake: FakeMetadataServer) -> None:
    fake.token_status = 403
    with pytest.raises(ClusterError, match=r"does not answer \(got 'status 403 in place of a token'.*HopLimit"):
        MetadataServer(fake.url).get(INTERRUPTION_PATH)
    fake.token_status, fake.token = 200, "no\nheader"
    with pytest.raises(ClusterError, match="does not answer"):
        MetadataServer(fake.url).get(INTERRUPTION_PATH)
    fake.token, fake.delay_s = "token", 0.3
    with pytest.raises(ClusterError, match="timed out"):
        MetadataServer(fake.url, timeout_s=0.05).get(INTERRUPTION_PATH)
    with pytest.raises(ClusterError, match="refused"):
        MetadataServer("http://127.0.0.1:1").get(INTERRUPTION_PATH)
    with pytest.raises(ClusterError, match="unknown url type"):
        MetadataServer("nowhere").get(INTERRUPTION_PATH)


@dataclass
class FakeNode:
    """Not Ray: takes note of the drains, and can refuse them."""

    drained: list[Notice] = field(default_factory=list)
    lost: bool = False
    ended: bool = False

    def find(self) -> str:
        if self.lost:
            raise ClusterError("no raylet here")
        return "abc"

    def has_ended(self) -> bool:
        return self.ended

    def drain(self, notice: Notice) -> None:
        self.find()
        self.drained.append(notice)


def test_one_notice_drains_once_and_a_later_one_again(fake: FakeMetadataServer) -> None:
    node, lines = FakeNode(), list[str]()
    watcher = SpotWatcher(MetadataServer(fake.url), node, OnRebalance.DRAIN, lines.append)
    assert watcher.look()
    assert lines == ["watching over node abc"]
    fake.announce(REBALANCE_PATH, REBALANCE)
    assert all(watcher.look() for _ in range(3))
    fake.announce(INTERRUPTION_PATH, INTERRUPTION)
    assert all(watcher.look() for _ in range(3))
    assert [notice.key.split()[0] for notice in node.drained] == ["rebalance", "interruption"]
    assert node.drained[1].deadline_ms == INTERRUPTION_MS
    assert len(lines) == 3
    node.ended = True
    assert not watcher.look()
    assert "nothing left to watch over" in lines[-1]


def test_a_drain_that_fails_is_told_once_and_tried_again(fake: FakeMetadataServer) -> None:
    node, lines = FakeNode(lost=True), list[str]()
    watcher = SpotWatcher(MetadataServer(fake.url), node, OnRebalance.IGNORE, lines.append)
    fake.announce(INTERRUPTION_PATH, INTERRUPTION)
    fake.answers[REBALANCE_PATH] = (200, b"garbage")
    assert all(watcher.look() for _ in range(3))
    assert [line.split(":")[0] for line in lines] == ["warning"] * 3  # no node, garbage, no drain
    node.lost = False
    watcher.look()
    assert len(node.drained) == 1


def test_a_metadata_server_that_stays_silent_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list[str]()
    watcher = SpotWatcher(MetadataServer("http://127.0.0.1:1"), FakeNode(), OnRebalance.IGNORE, lines.append)
    assert watcher.look()
    assert len(lines) == 1
    monkeypatch.setattr(spot, "UNREACHABLE_TOLD_AFTER_S", 0.0)
    assert all(watcher.look() for _ in range(3))
    assert len(lines) == 2
    assert "off AWS this watcher is of no use" in lines[1].lower().replace("aws", "AWS")


def proc_of(folder: Path, raylets: dict[str, int]) -> Path:
    for node_id, pid in raylets.items():
        (folder / str(pid)).mkdir()
        (folder / str(pid) / "cmdline").write_bytes(f"/x/raylet\0--node_id={node_id}\0--gcs=y\0".encode())
    (folder / "7").mkdir()
    (folder / "7" / "cmdline").write_bytes(b"/bin/sh\0--node_id=other\0")
    (folder / "8").mkdir()
    return folder


def test_the_node_is_the_one_raylet_of_the_cluster_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proc = proc_of(tmp_path, {"aa": 11, "bb": 12, "cc": 13})
    assert spot.local_raylets(proc) == {"aa": 11, "bb": 12, "cc": 13}
    alive = {"aa", "bb", "zz"}
    monkeypatch.setattr(RayNode, "_alive", lambda self: alive)
    with pytest.raises(ClusterError, match=r"2 raylets of the cluster run on this machine \(got 'aa, bb'.*--node-id"):
        RayNode("h:1", proc=proc).find()
    with pytest.raises(ClusterError, match=r"no raylets .*got 'cc'.*ray start"):
        RayNode("h:1", "cc", proc).find()
    alive.remove("bb")
    node = RayNode("h:1", proc=proc)
    assert not node.has_ended()
    assert node.find() == "aa"
    assert not node.has_ended()
    (proc / "11" / "cmdline").unlink()
    assert node.has_ended()


class FakeGcs:
    """Not Ray's control store: answers what it was told to."""

    accepted, draining, alive, failure = True, {"aa": 5}, {b"\xaa"}, None

    def __init__(self, address: str) -> None:
        if self.failure is not None:
            raise self.failure

    def drain_node(self, *arguments: object, timeout: float) -> tuple[bool, str]:
        return self.accepted, "" if self.accepted else "busy"

    def get_all_node_info(self, timeout: float, state_filter: int) -> dict[bytes, None]:
        return dict.fromkeys(self.alive)

    def get_draining_nodes(self, timeout: float) -> dict[str, int]:
        return self.draining


def test_a_drain_that_ray_does_not_take_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    notice = Notice("key", "reason", NOW_MS)
    monkeypatch.setattr(RayNode, "find", lambda self: "aa")
    monkeypatch.setattr(spot, "GcsClient", FakeGcs)
    node = RayNode("h:1")
    node.drain(notice)
    monkeypatch.setattr(FakeGcs, "draining", {})
    with pytest.raises(ClusterError, match=r"does not drain the node .got 'aa'"):
        node.drain(notice)
    monkeypatch.setattr(FakeGcs, "alive", set())
    node.drain(notice)
    monkeypatch.setattr(FakeGcs, "accepted", False)
    with pytest.raises(ClusterError, match=r"does not drain the node .got 'busy'"):
        node.drain(notice)
    monkeypatch.setattr(FakeGcs, "failure", ConnectionError("gone"))
    with pytest.raises(ClusterError, match=r"GCS of the Ray cluster does not answer .got 'gone'"):
        node.drain(notice)


@pytest.mark.parametrize(
    "words",
    [["--address", "head"], ["--address", "http://h:1"], ["--ask-every-s", "0"], ["--on-rebalance", "perhaps"]],
)
def test_bad_arguments_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        spot.main(["--address", "head:6379", *words])
    assert exit_.value.code == 2
    assert words[1] in capsys.readouterr().err
