"""Submitting with retries: the decisions, and whole stories told by fake clusters on a fake clock."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from ray.exceptions import AuthenticationError

from histoscale.cluster import job_server
from histoscale.cluster.job_server import RayJobServer
from histoscale.cluster.submit import (
    Clock,
    JobState,
    Log,
    Step,
    Submission,
    Submitter,
    Unreachable,
    decide,
    read_runtime_env,
)
from histoscale.errors import ClusterError

COMMAND = "python jobs/pretrain.py"
RUNNING, SUCCEEDED = JobState("RUNNING", COMMAND), JobState("SUCCEEDED", COMMAND, 0)


def failed(exit_code: int | None, message: str = "") -> JobState:
    return JobState("FAILED", COMMAND, exit_code, message)


@pytest.mark.parametrize(
    ("job", "submitted", "left", "step", "status"),
    [
        (None, False, 0, Step.SUBMIT, 0),
        (None, True, 1, Step.RETRY, 1),
        (None, True, 0, Step.GIVE_UP, 1),
        (JobState("PENDING", COMMAND), True, 0, Step.FOLLOW, 0),
        (RUNNING, True, 0, Step.FOLLOW, 0),
        (SUCCEEDED, True, 0, Step.DONE, 0),
        (JobState("STOPPED", COMMAND), True, 5, Step.DONE, 0),
        (failed(2), True, 5, Step.DONE, 2),
        (failed(127), True, 5, Step.DONE, 127),
        (failed(75), True, 5, Step.RETRY, 75),
        (failed(75), True, 0, Step.GIVE_UP, 75),
        (failed(-2), True, 5, Step.DONE, 130),
        (failed(1), True, 5, Step.RETRY, 1),
        (failed(1), True, 0, Step.GIVE_UP, 1),
        (failed(-9), True, 0, Step.GIVE_UP, 137),
        (failed(None, "the supervisor died\ntrace"), True, 1, Step.RETRY, 1),
        (failed(None), True, 0, Step.GIVE_UP, 1),
    ],
)
def test_every_state_of_a_job_has_one_next_step(
    job: JobState | None, submitted: bool, left: int, step: Step, status: int
) -> None:
    decision = decide(job, submitted, left)
    assert (decision.step, decision.status) == (step, status)
    assert "trace" not in decision.why


def test_a_log_that_is_read_from_the_start_again_is_shown_once() -> None:
    shown = list[str]()
    log = Log(shown.append)
    assert log.show("one\n", 0) == 4
    log.show("two\n", 4)
    position = log.show("one\ntw", 0)
    log.show("o\nthree\n", position)
    log.show("one\n", 0)
    assert shown == ["one\n", "two\n", "three\n"]


@dataclass
class FakeCluster:
    """No cluster: what it does at each visit is written down beforehand, in `script`.

    `"away"` refuses the connection, `"no node"` refuses to start a job, `"cut"` breaks while the job is followed, a
    JobState is what the job comes to, and `"new"` is a head that knows no job.
    """

    clock: "FakeClock"
    script: list[str | JobState]
    jobs: dict[str, JobState] = field(default_factory=dict)
    submitted: list[str] = field(default_factory=list)
    lasts_s: float = 1.0

    def connect(self) -> "FakeCluster":
        if self.script and self.script[0] == "away":
            self.script.pop(0)
            raise Unreachable("ConnectionError")
        if self.script and self.script[0] == "new":
            self.script.pop(0)
            self.jobs.clear()
        return self

    def state(self, submission_id: str) -> JobState | None:
        return self.jobs.get(submission_id)

    def submit(self, submission_id: str) -> None:
        if self.script and self.script[0] == "no node":
            self.script.pop(0)
            raise Unreachable("status 500: no agent")
        self.submitted.append(submission_id)
        self.jobs[submission_id] = RUNNING
        if self.script and self.script[0] == "no word":
            self.script.pop(0)
            raise Unreachable("timed out")

    def follow(self, submission_id: str, log: Log) -> None:
        log.show("step 1\n", 0)
        self.clock.time_s += self.lasts_s
        what = self.script.pop(0)
        if what == "cut":
            raise Unreachable("ConnectionError")
        if what == "Ctrl-C":
            raise KeyboardInterrupt
        assert isinstance(what, JobState)
        self.jobs[submission_id] = what


@dataclass
class FakeClock:
    """Time passes only when somebody waits."""

    time_s: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.time_s += seconds


@dataclass
class Story:
    """One call of submit, and what it showed."""

    clusters: dict[str, FakeCluster]
    clock: FakeClock
    retries: int = 2
    wait_s: float = 100.0
    lines: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        submission = Submission(tuple(self.clusters), COMMAND, "job", self.retries, self.wait_s)
        clock = Clock(lambda: self.clock.time_s, self.clock.sleep)
        self.submitter = Submitter(
            submission, lambda url: self.clusters[url].connect(), self.log.append, self.lines.append, clock
        )

    def run(self) -> int:
        return self.submitter.run()


def story(*script: str | JobState, retries: int = 2) -> Story:
    clock = FakeClock()
    return Story({"http://a": FakeCluster(clock, list(script))}, clock, retries)


def test_a_job_that_succeeds_is_submitted_once() -> None:
    told = story(SUCCEEDED)
    assert told.run() == 0
    assert told.clusters["http://a"].submitted == ["job"]
    assert told.lines == ["submitted job to http://a", "job job succeeded"]
    assert told.log == ["step 1\n"]


def test_a_job_that_runs_on_after_a_broken_connection_is_followed_and_not_submitted_again() -> None:
    told = story("cut", "away", "away", SUCCEEDED)
    assert told.run() == 0
    assert told.clusters["http://a"].submitted == ["job"]
    assert told.log == ["step 1\n"]
    assert "no answer from http://a (ConnectionError); waiting for http://a" in told.lines
    assert "http://a answers after 6 s" in told.lines


def test_a_job_that_died_with_its_head_is_submitted_to_the_new_one() -> None:
    told = story("cut", *["away"] * 20, "new", "no node", SUCCEEDED)
    assert told.run() == 0
    assert told.clusters["http://a"].submitted == ["job", "job-2"]
    assert told.log == ["step 1\n", "step 1\n"]
    assert any("still waiting for http://a, for 30 s now" in line for line in told.lines)


def test_a_submission_whose_answer_was_lost_is_found_again() -> None:
    told = story("no word", SUCCEEDED)
    assert told.run() == 0
    assert told.clusters["http://a"].submitted == ["job"]


def test_the_budget_ends_retries_but_work_in_between_renews_it() -> None:
    told = story(*[failed(1)] * 3)
    assert told.run() == 1
    assert told.clusters["http://a"].submitted == ["job", "job-2", "job-3"]
    assert told.lines[-1] == "gave up: 2 retries, none with 600 s of work"
    told = story(*[failed(-9)] * 9, SUCCEEDED, retries=1)
    told.clusters["http://a"].lasts_s = 601.0
    assert told.run() == 0
    told = story("cut", *["away"] * 40, "new", "cut", *["away"] * 40, "new", SUCCEEDED, retries=1)
    assert told.run() == 1, "waiting for a cluster is no work"
    told = story(failed(2))
    assert told.run() == 2
    assert told.clusters["http://a"].submitted == ["job"]


def test_a_job_that_ended_with_what_may_pass_is_submitted_again_within_the_same_budget() -> None:
    told = story(failed(75), SUCCEEDED)
    assert told.run() == 0
    assert told.clusters["http://a"].submitted == ["job", "job-2"]
    assert "job job failed with exit status 75, of what may pass by itself" in told.lines
    told = story(*[failed(75)] * 3)
    assert told.run() == 75
    assert told.lines[-1].startswith("gave up: 2 retries")


def test_another_address_is_asked_at_once_at_first_and_after_a_while_for_a_job_that_may_still_run() -> None:
    clock = FakeClock()
    one, other = FakeCluster(clock, ["away", *["away"] * 99]), FakeCluster(clock, ["cut", *["away"] * 99])
    told = Story({"http://a": one, "http://b": other}, clock)
    assert told.run() == 1
    assert other.submitted == ["job"]
    assert "submitted job to http://b" in told.lines
    assert len(other.script) < 99 - 14, "the address of the job is asked for 30 s before the other is"
    assert len(one.script) < 99
    assert told.lines[-1].startswith(
        "gave up: no answer for 100 s (ConnectionError); the job goes on where its cluster"
    )


def test_a_standby_takes_the_job_over() -> None:
    clock = FakeClock()
    one, other = FakeCluster(clock, ["cut", *["away"] * 99]), FakeCluster(clock, [SUCCEEDED])
    assert Story({"http://a": one, "http://b": other}, clock).run() == 0
    assert (one.submitted, other.submitted) == (["job"], ["job-2"])
    assert clock.time_s > 30


def test_an_address_that_never_answers_is_diagnosed() -> None:
    told = story(*["away"] * 99)
    with pytest.raises(ClusterError, match=r"no job server answers .*http://a: ConnectionError.*within 100 s"):
        told.run()


def test_an_earlier_call_with_the_same_id_is_picked_up() -> None:
    told = story(SUCCEEDED)
    told.clusters["http://a"].jobs = {"job": failed(1), "job-2": RUNNING}
    assert told.run() == 0
    assert told.clusters["http://a"].submitted == []
    told = story(SUCCEEDED)
    told.clusters["http://a"].jobs = {"job": failed(2)}
    assert told.run() == 0
    assert told.clusters["http://a"].submitted == ["job-2"]
    told = story()
    told.clusters["http://a"].jobs = {"job": JobState("RUNNING", "python other.py")}
    with pytest.raises(ClusterError, match=r"another command .*job: python other.py"):
        told.run()


def test_whoever_stops_following_learns_how_to_go_on() -> None:
    told = story("Ctrl-C")
    assert told.submitter.how_to_go_on() == "no job of it runs"
    with pytest.raises(KeyboardInterrupt):
        told.run()
    assert "`ray job stop --address http://a job` stops it" in told.submitter.how_to_go_on()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((("host:8265",), "c", "id", 0, 0.0), "no URL"),
        ((("http://h",), "c", "a/b", 0, 0.0), "no name"),
        ((("http://h",), "c", "id", -1, 0.0), "negative"),
        ((("http://h",), "c", "id", 0, float("nan")), "no duration"),
    ],
)
def test_values_that_cannot_work_are_refused(
    values: tuple[tuple[str, ...], str, str, int, float], message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        Submission(*values)


def test_the_runtime_environment_is_read_or_diagnosed(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("env_vars: {A: b}\n")
    assert read_runtime_env(str(file), str(tmp_path)) == {"env_vars": {"A": "b"}, "working_dir": str(tmp_path)}
    assert read_runtime_env(str(file), "s3://b/x.zip")["working_dir"] == "s3://b/x.zip"
    with pytest.raises(ClusterError, match="no folder"):
        read_runtime_env(str(file), str(tmp_path / "nowhere"))
    for text, message in (("[1]", "no mapping"), ("{", "cannot be read"), ("", "no mapping")):
        file.write_text(text)
        with pytest.raises(ClusterError, match=message):
            read_runtime_env(str(file), str(tmp_path))
    with pytest.raises(ClusterError, match="cannot be read"):
        read_runtime_env(str(tmp_path / "none.yaml"), str(tmp_path))


class FakeClient:
    """Not Ray's client: fails as it is told to."""

    failure: Exception | None = None

    def __init__(self, address: str, headers: dict[str, str]) -> None:
        self.headers = headers
        if address == "http://proxy":
            raise RuntimeError("Version check returned 404.")

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        if self.failure is not None:
            raise self.failure
        return SimpleNamespace(status="FAILED", entrypoint=COMMAND, driver_exit_code=2, message=None)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayJobServer]:
    monkeypatch.setattr(job_server, "_TimedClient", FakeClient)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    yield RayJobServer("http://h", COMMAND, {})
    FakeClient.failure = None


def test_what_a_job_server_says_is_sorted_into_states_waits_and_diagnoses(server: RayJobServer) -> None:
    assert server.state("job") == failed(2)
    FakeClient.failure = RuntimeError("Request failed with status code 404: no such job.")
    assert server.state("job") is None
    for failure in (
        RuntimeError("Request failed with status code 500: no agent."),
        requests.ConnectionError("refused"),
        requests.ReadTimeout("slow"),
        requests.HTTPError("502 of a proxy"),
        requests.JSONDecodeError("a page", "", 0),
        KeyError("ray_version"),
        ConnectionError("Failed to connect to Ray"),
    ):
        FakeClient.failure = failure
        with pytest.raises(Unreachable):
            server.state("job")
    for refusal in (
        RuntimeError("Request failed with status code 400: no."),
        FileNotFoundError("module"),
        ValueError("odd"),
    ):
        FakeClient.failure = refusal
        with pytest.raises(ClusterError, match="does not take the job"):
            server.state("job")
    with pytest.raises(Unreachable, match="404"):
        RayJobServer("http://proxy", COMMAND, {})
    FakeClient.failure = AuthenticationError("no token")
    with pytest.raises(ClusterError, match="refuses the token"):
        server.state("job")


def test_headers_for_a_gateway_go_with_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "_TimedClient", FakeClient)
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Gateway": "a"}')
    assert RayJobServer("http://h", COMMAND, {})._client.headers == {"X-Gateway": "a"}
    monkeypatch.delenv("RAY_JOB_HEADERS")
    assert RayJobServer("http://h", COMMAND, {})._client.headers == {}


@pytest.mark.parametrize("text", ["secret", '["secret"]', '{"secret": 1}'])
def test_headers_that_are_no_object_of_strings_are_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("RAY_JOB_HEADERS", text)
    with pytest.raises(ClusterError, match="RAY_JOB_HEADERS cannot be used") as caught:
        RayJobServer("http://h", COMMAND, {})
    assert "secret" not in str(caught.value).replace("may hold a secret", "")
