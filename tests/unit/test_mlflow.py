"""What an MLflow server is told of a run, by the real client; against a real server where one is installed."""

import importlib.util
import json
import os
import secrets
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.conftest import REPOSITORY
from tests.unit.run_folders import RECIPE, STEPS, commit_of, evaluation, write_evaluations, write_run

from histoscale.cluster import tracking
from histoscale.cluster.tracking import tracked
from histoscale.config.decode import decode_recipe, dump_recipe, fingerprint, recorded_recipe
from histoscale.config.recipe import Recipe
from histoscale.config.running import TrackingSection
from histoscale.errors import RecipeError, RunError
from histoscale.observe import mlflow_sink
from histoscale.observe.mlflow_sink import STATE_KEY, MlflowSink, read_sent, require_client
from histoscale.storage import Store, open_store

SERVER = REPOSITORY / ".mlflow-venv" / "bin" / "mlflow"
SECTION = TrackingSection(mlflow="http://127.0.0.1:9")
needs_client = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="no mlflow-skinny here")


class Recorder:
    """A server without a network: keeps all that it is sent, and fails when it is told to; a fake."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int, int]] = []
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.runs: list[str] = []
        self.status = ""
        self.deleted: set[str] = set()
        self.away = False
        self.answers = True

    def _come(self) -> None:
        if self.away:
            raise ConnectionRefusedError("nobody listens")

    def get_experiment_by_name(self, name: str) -> Any:
        self._come()
        return SimpleNamespace(experiment_id="1")

    def create_run(self, experiment_id: str, start_time: int, run_name: str) -> Any:
        self._come()
        self.runs.append(f"run-{len(self.runs)}")
        return SimpleNamespace(info=SimpleNamespace(run_id=self.runs[-1]))

    def get_run(self, run_id: str) -> Any:
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST

        self._come()
        if run_id not in self.runs:
            raise MlflowException("gone", RESOURCE_DOES_NOT_EXIST if run_id != "forbidden" else PERMISSION_DENIED)
        stage = "deleted" if run_id in self.deleted else "active"
        return SimpleNamespace(info=SimpleNamespace(lifecycle_stage=stage))

    def update_run(self, run_id: str, status: str) -> None:
        self._come()
        self.status = status

    def set_terminated(self, run_id: str, status: str) -> None:
        self._come()
        self.status = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> None:
        self._come()
        assert len(metrics) <= 1000
        assert len(params) <= 100
        self.points += [(one.key, one.value, one.timestamp, one.step) for one in metrics]
        self.params |= {one.key: one.value for one in params}
        self.tags |= {one.key: one.value for one in tags}
        if not self.answers:
            raise ConnectionResetError("the answer is lost")


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets up to which step a run is committed."""
    step = 0

    def commit(upto: int) -> None:
        nonlocal step
        step = upto

    found = lambda _: commit_of(RECIPE, step) if step else None  # noqa: E731
    monkeypatch.setattr(mlflow_sink, "latest_commit", found)
    monkeypatch.setattr(tracking, "latest_commit", found)
    return commit


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = open_store(tmp_path / "run")
    write_run(found)
    return found


def steps_of(points: list[tuple[str, float, int, int]], name: str = "loss/total") -> list[int]:
    return [step for key, _, _, step in points if key == name]


@needs_client
def test_only_committed_steps_are_sent_and_each_once(store: Store, committed: Callable[[int], None]) -> None:
    server = Recorder()
    sink = MlflowSink(store, SECTION, server)
    sink.send(RECIPE)
    assert (server.runs, store.exists(STATE_KEY)) == ([], False)
    committed(20)
    sink.send(RECIPE)
    assert steps_of(server.points) == list(range(20))
    committed(STEPS)
    sink.send(RECIPE)
    sink.send(RECIPE)
    again = MlflowSink(store, SECTION, server)  # of the next job
    again.send(RECIPE)
    assert steps_of(server.points) == list(range(STEPS))
    assert steps_of(server.points, "evaluate/crc/both/knn_balanced_accuracy") == [20, STEPS]
    assert server.runs == ["run-0"]
    assert server.status == "RUNNING"
    assert server.params["optim.lr"] == str(RECIPE.optim.lr)
    assert server.params["distill"] == "null"
    assert server.tags["histoscale.index_snapshot"] == "abc"
    assert server.tags["histoscale.recipe"] == fingerprint(RECIPE)
    assert server.tags["histoscale.code"] == f"source {'c' * 12}, commit {'c' * 12} and changes"
    again.end("FINISHED")
    assert server.status == "FINISHED"


@needs_client
def test_what_is_sent_again_for_want_of_an_answer_is_the_same(store: Store, committed: Callable[[int], None]) -> None:
    server, sink = Recorder(), None
    committed(20)
    sink = MlflowSink(store, SECTION, server)
    sink.send(RECIPE)
    committed(STEPS)
    server.answers = False
    with pytest.raises(ConnectionResetError):
        sink.send(RECIPE)
    server.answers = True
    MlflowSink(store, SECTION, server).send(RECIPE)
    assert len(server.points) > len(set(server.points))
    assert steps_of(sorted(set(server.points), key=lambda point: point[3])) == list(range(STEPS))


@needs_client
def test_a_run_that_the_server_no_longer_has_is_told_anew(store: Store, committed: Callable[[int], None]) -> None:
    server = Recorder()
    committed(20)
    MlflowSink(store, SECTION, server).send(RECIPE)
    server.deleted = {"run-0"}
    MlflowSink(store, SECTION, server).send(RECIPE)
    server.runs.clear()
    MlflowSink(store, SECTION, server).send(RECIPE)
    other = TrackingSection(mlflow=SECTION.mlflow, experiment="other")
    MlflowSink(store, other, server).send(RECIPE)
    assert steps_of(server.points) == 4 * list(range(20))
    sent = read_sent(store)
    assert sent is not None
    assert (sent.experiment, sent.steps) == ("other", 20)


@needs_client
def test_another_refusal_of_the_server_is_no_new_run(store: Store, committed: Callable[[int], None]) -> None:
    from mlflow.exceptions import MlflowException

    committed(20)
    state = {"uri": SECTION.mlflow, "experiment": "histoscale", "run_id": "forbidden", "steps": 0, "evaluations": []}
    store.put(STATE_KEY, json.dumps(state).encode())
    with pytest.raises(MlflowException, match="gone"):
        MlflowSink(store, SECTION, Recorder()).send(RECIPE)


@needs_client
def test_a_server_that_is_away_is_told_of_once_and_gets_all_when_it_is_back(
    store: Store, committed: Callable[[int], None]
) -> None:
    server, told = Recorder(), list[str]()
    server.away = True
    committed(20)
    with tracked(store, SECTION, told.append, lambda: False, every_s=0.01, client_of=lambda _: server):
        wait_until(lambda: len(told) > 0)
        time.sleep(0.2)
        assert len(told) == 1
        assert told[0].startswith(
            "warning: MLflow at http://127.0.0.1:9 is not told of the run for now: nobody listens"
        )
        server.away = False
        wait_until(lambda: len(server.points) > 0)
        committed(STEPS)
    assert told[1:] == ["MLflow answers again, and was told what it lacked"]
    assert steps_of(server.points) == list(range(STEPS))
    assert server.status == "KILLED"


@needs_client
def test_the_end_of_a_run_waits_for_no_server(
    store: Store, committed: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "LAST_S", 0.1)
    committed(20)
    told: list[str] = []
    asked = threading.Event()

    def hangs(uri: str) -> Any:
        asked.set()
        time.sleep(5.0)
        raise ConnectionError

    with tracked(store, SECTION, told.append, lambda: False, every_s=0.01, client_of=hangs):
        asked.wait()
        begun_s = time.monotonic()
    assert time.monotonic() - begun_s < 2.0
    assert told == ["warning: MLflow lacks the end of the run; the same command again sends what is missing"]


@needs_client
def test_how_a_run_has_ended_is_told_and_who_lost_it_tells_nothing(
    store: Store, committed: Callable[[int], None]
) -> None:
    server = Recorder()
    committed(100)
    with pytest.raises(RuntimeError), tracked(store, SECTION, print, lambda: True, client_of=lambda _: server):
        raise RuntimeError
    assert server.runs == []
    with tracked(store, SECTION, print, lambda: False, client_of=lambda _: server):
        pass
    assert server.status == "FINISHED"
    committed(20)
    with pytest.raises(RuntimeError), tracked(store, SECTION, print, lambda: False, client_of=lambda _: server):
        raise RuntimeError
    assert server.status == "FAILED"


@needs_client
def test_a_run_without_a_recipe_and_an_evaluation_of_another_version_are_no_matter(
    store: Store, committed: Callable[[int], None], tmp_path: Path
) -> None:
    with tracked(open_store(tmp_path / "new"), SECTION, pytest.fail, lambda: False, every_s=0.01):
        time.sleep(0.1)
    server = Recorder()
    store.put("evaluations/old-step-00000001.json", b'{"format": 1}')
    committed(20)
    MlflowSink(store, SECTION, server).send(RECIPE)
    sent = read_sent(store)
    assert sent is not None
    assert "evaluations/old-step-00000001.json" in sent.evaluations


def test_without_a_server_nothing_is_done(tmp_path: Path) -> None:
    with tracked(open_store(tmp_path), TrackingSection(), pytest.fail, lambda: False):
        pass
    require_client(TrackingSection())


def test_a_missing_client_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_sink, "PACKAGE", "mlflow_that_nobody_has")
    with pytest.raises(RunError, match=r"not installed here .*pip install 'histoscale\[mlflow\]'"):
        require_client(SECTION)


@pytest.mark.parametrize("uri", ["/data/mlruns", "sqlite:///a.db", "http://", "https://user:secret@server"])
def test_only_a_server_without_credentials_in_its_name_is_taken(uri: str) -> None:
    with pytest.raises(RecipeError, match=r"tracking: mlflow must") as refused:
        decode_recipe({"tracking": {"mlflow": uri}})
    assert "secret" not in str(refused.value)


def test_tracking_is_no_part_of_the_experiment_and_older_runs_have_none() -> None:
    tracked_recipe = Recipe.model_validate({**RECIPE.model_dump(), "tracking": {"mlflow": "http://server:5000"}})
    assert fingerprint(tracked_recipe) == fingerprint(RECIPE)
    lines = dump_recipe(RECIPE).splitlines()
    start = lines.index("tracking:")
    older = "\n".join(lines[:start] + lines[start + 3 :])
    assert recorded_recipe(older.encode(), "recipe.yaml") == RECIPE


def test_a_damaged_record_is_a_diagnosis(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert read_sent(store) is None
    store.put(STATE_KEY, b'{"uri": "http://server"}')
    with pytest.raises(RunError, match=r"mlflow.json of run .* is damaged"):
        read_sent(store)


def wait_until(true: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.02)


@contextmanager
def mlflow_server(database: Path, port: int) -> Iterator[None]:
    """A real server on loopback; killed at the end."""
    command = [str(SERVER), "server", "--backend-store-uri", f"sqlite:///{database}", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("PYTHONPATH", None)
    log = (database.parent / f"server-{secrets.token_hex(3)}.log").open("w")
    with subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True) as process:
        try:
            wait_until(lambda: healthy(port), 400.0)
            yield
        finally:
            os.killpg(process.pid, 9)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@needs_client
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not SERVER.exists(), reason=f"no MLflow server at {SERVER}: a venv with `pip install mlflow` brings one"
)
def test_a_real_server_that_is_killed_in_between_ends_with_every_step_once(
    store: Store, committed: Callable[[int], None], tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    section, told = TrackingSection(mlflow=f"http://127.0.0.1:{port}"), list[str]()
    committed(20)
    with tracked(store, section, told.append, lambda: False, every_s=0.2):
        with mlflow_server(tmp_path / "mlflow.db", port):
            wait_until(lambda: (sent := read_sent(store)) is not None and len(sent.evaluations) == 2)
        before = read_sent(store)
        assert before is not None
        committed(STEPS)
        write_evaluations(store, evaluation(40, 0.65))
        wait_until(lambda: bool(told) and "is not told of the run for now" in told[-1])
        store.put(STATE_KEY, json.dumps({**vars(before), "steps": 10}).encode())  # as if an answer had been lost
    assert told[-1].startswith("warning: MLflow lacks the end of the run")
    committed(100)
    with mlflow_server(tmp_path / "mlflow.db", port):
        with tracked(store, section, told.append, lambda: False):
            pass
        client = MlflowClient(section.mlflow)
        run = client.get_run(before.run_id)
        history = client.get_metric_history(before.run_id, "loss/total")
        figures = client.get_metric_history(before.run_id, "evaluate/crc/both/knn_balanced_accuracy")
    assert sorted(point.step for point in history) == list(range(STEPS))
    assert sorted(point.step for point in figures) == [20, 40, STEPS]
    assert run.info.status == "FINISHED"
    assert run.data.params["batch.tiles"] == "4096"
    assert run.data.tags["histoscale.index_snapshot"] == "abc"
