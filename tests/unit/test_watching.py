"""What the driver does while workers run: wishes passed on, the silent ended, notices heeded; no actor, all by hand."""

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from histoscale.cluster import watching
from histoscale.cluster.control import Member, Progress, Told, Wish
from histoscale.cluster.watching import Watched, _Watch
from histoscale.observe.timeline import Kind


@dataclass
class Remote:
    """A method of an actor that is none."""

    call: Any

    def remote(self, *arguments: Any) -> Any:
        return self.call(*arguments)


@dataclass
class FakeControl:
    """The run's control without an actor; fails as often as it is told to."""

    told: list[Told] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    wishes: list[Wish] = field(default_factory=list)
    restarts: list[tuple[Kind, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.want = Remote(self.wishes.append)
        self.drain = Remote(self._drain)
        self.ask_restart = Remote(lambda kind, reason: self.restarts.append((kind, reason)))

    def _drain(self, silence_s: float) -> Told:
        if self.failures:
            raise self.failures.pop(0)
        return self.told.pop(0) if self.told else Told([], [], [], [], [])


@dataclass
class Scene:
    """A watch over a fake control."""

    control: FakeControl
    lines: list[str] = field(default_factory=list)
    lost: bool = False
    error: Exception | None = None

    def __post_init__(self) -> None:
        bad_slides: Any = SimpleNamespace(error=self.error, take=lambda faults: None)
        timeline: Any = SimpleNamespace(tell=lambda event: None)
        lease: Any = SimpleNamespace(lost=self.lost)
        self.watch = _Watch(self.control, Watched(lease, bad_slides, 20.0, timeline, self.lines.append))


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: dict[str, Any] = {"killed": [], "draining": {}}
    monkeypatch.setattr(watching.ray, "get", lambda answer: answer)
    monkeypatch.setattr(watching.ray, "kill", seen["killed"].append)
    monkeypatch.setattr(watching, "state", SimpleNamespace(get_draining_nodes=lambda: seen["draining"]))
    return seen


def actor(name: str) -> Any:
    return SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: name))


def step(number: int) -> Progress:
    return Progress(number, 100, {"loss": 1.0}, 1e-3, 10.0, 0.0)


@pytest.mark.parametrize("failure", [RayError("the control is away"), OSError("broken pipe"), RuntimeError("no GCS")])
def test_a_look_that_fails_is_warned_of_once_and_the_next_one_is_as_good(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    control = FakeControl([Told([step(1)], [], [], [], [])], [failure, failure])
    scene = Scene(control)
    for _ in range(3):
        scene.watch.look_again(stop_asked=True)
    assert caplog.text.count("the workers cannot be looked at, and are tried again") == 1
    assert control.wishes == [Wish.COMMIT_AND_STOP]
    assert any(line.startswith("step 1/100") for line in scene.lines)
    control.failures.append(failure)
    scene.watch.look_again(stop_asked=True)
    assert caplog.text.count("the workers cannot be looked at, and are tried again") == 2


def test_a_failure_of_another_kind_is_not_hidden() -> None:
    with pytest.raises(KeyError):
        Scene(FakeControl(failures=[KeyError("a defect")])).watch.look_again(stop_asked=False)


def test_a_wish_is_passed_on_once() -> None:
    for scene, wish in (
        (Scene(FakeControl(), lost=True), Wish.ABANDON),
        (Scene(FakeControl(), error=ValueError()), Wish.COMMIT_AND_STOP),
    ):
        for _ in range(3):
            scene.watch.look_again(stop_asked=False)
        assert scene.control.wishes == [wish]
        assert scene.lines == [f"asking the workers to {wish.value}"]


def test_a_silent_worker_is_ended_once(no_ray: dict[str, Any]) -> None:
    silent = Member(1, "node", actor("a"))
    scene = Scene(FakeControl([Told([], [], [], [silent], [silent])] * 3))
    for _ in range(3):
        scene.watch.look_again(stop_asked=False)
    assert no_ray["killed"] == [silent.actor]
    assert scene.lines == ["worker 1 has given no sign of life for 20 s and is ended"]


def test_workers_that_live_and_take_no_step_are_told_of_now_and_then() -> None:
    quiet = [60.0, 119.0, 125.0, 200.0, 260.0, 500.0, 530.0, 10.0, 130.0]
    scene = Scene(FakeControl([Told([], [], [], [], [], quiet_s) for quiet_s in quiet]))
    for _ in quiet:
        scene.watch.look_again(stop_asked=False)
    assert [line.split(",")[0] for line in scene.lines] == [f"no step for {s} s" for s in (125, 260, 530, 130)]


def test_a_notice_for_a_node_of_the_run_is_heeded_once(no_ray: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_NODES_EVERY_S", 0.0)
    no_ray["draining"] = {"mine" * 8: 0, "another": 0}
    here = Member(0, "mine" * 8, actor("a"))
    scene = Scene(FakeControl([Told([], [], [], [here], [])] * 3))
    for _ in range(3):
        scene.watch.look_again(stop_asked=False)
    assert scene.control.restarts == [(Kind.PREEMPTION_NOTICE, "node minemine is taken away")]


def test_what_was_told_last_is_shown_when_all_is_over(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(FakeControl([Told([step(4), step(5)], [], [], [], [])]))
    with caplog.at_level(logging.WARNING):
        scene.watch.look_again(stop_asked=True, last=True)
    assert [line.split(" | ")[0] for line in scene.lines] == ["step 4/100", "step 5/100"]
    assert scene.control.wishes == []
