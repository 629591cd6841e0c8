import json
import os
from pathlib import Path

import pytest
import ray
import yaml
from ray.exceptions import AuthenticationError, RaySystemError

from histoscale.cluster.control import ControlLine, Wish
from histoscale.cluster.job import ENVIRONMENT, connect, inside_a_job, job_name, location, run_job
from histoscale.cluster.worker import _require_the_run
from histoscale.errors import ClusterError, RecipeError, RunError, StorageError

ROOT = Path(__file__).parents[2]


def test_a_diagnosis_is_the_last_line_and_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise RecipeError("the recipe is odd", remedy="make it even")

    with pytest.raises(SystemExit) as exit_:
        run_job(main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: the recipe is odd. Make it even."


def test_what_may_pass_by_itself_has_an_exit_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise StorageError("the server is away", remedy="see to it", transient=True)

    with pytest.raises(SystemExit) as exit_:
        run_job(main)
    assert exit_.value.code == 75
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: the server is away. See to it. This may pass by itself: run the same command again."


def test_an_interrupt_ends_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        run_job(main)
    assert exit_.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_relative_places_are_refused_inside_a_submitted_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert location("somewhere", "--out") == str(Path.cwd() / "somewhere")
    assert location("s3://bucket/prefix/", "--out") == "s3://bucket/prefix"
    assert location("file:///a%20b", "--out") == "/a b"
    for text in ("gs://bucket/prefix", "https://host/x"):
        with pytest.raises(StorageError, match="no store has the URI"):
            location(text, "--out")
    config = {"metadata": {"job_submission_id": "raysubmit_x"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))
    assert inside_a_job()
    assert job_name() == "raysubmit_x"
    assert location("/data/run", "--out") == "/data/run"
    with pytest.raises(ClusterError, match="--out is a relative path"):
        location("somewhere", "--out")


def test_the_runtime_environment_is_the_one_of_the_library() -> None:
    runtime = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())
    assert runtime["env_vars"] == ENVIRONMENT
    assert runtime["py_modules"] == ["platform/histoscale"]


def refuse_with(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def refuse(**_: object) -> None:
        raise failure

    monkeypatch.setattr(ray, "init", refuse)


@pytest.mark.parametrize("failure", [ConnectionError(), RuntimeError("no head"), RaySystemError("broken")])
def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    refuse_with(monkeypatch, failure)
    with pytest.raises(ClusterError, match=r"does not answer.*127\.0\.0\.1:1"):
        connect()


@pytest.mark.parametrize("address", ["127.0.0.1:1", ""])
def test_a_token_that_is_refused_is_told_with_where_it_belongs(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(os, "environ", {"RAY_ADDRESS": address})
    refuse_with(monkeypatch, AuthenticationError("no token"))
    with pytest.raises(ClusterError, match=r"refuses the token .*RAY_AUTH_TOKEN_PATH.*RAY_AUTH_MODE=token"):
        connect()


@pytest.mark.parametrize("failure", [Exception("a trace\nThe node timed out"), OSError("The node timed out")])
def test_a_cluster_that_cannot_be_started_here_is_a_diagnosis(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    monkeypatch.setattr(os, "environ", {})
    refuse_with(monkeypatch, failure)
    with pytest.raises(
        ClusterError, match=rf"cannot be started .*{type(failure).__name__}: The node timed out.*process ids"
    ):
        connect()


def test_a_run_that_was_taken_over_is_abandoned() -> None:
    line = ControlLine(None)
    _require_the_run(line, "/run")
    line.wish = Wish.ABANDON
    with pytest.raises(RunError, match="/run was taken over by another job"):
        _require_the_run(line, "/run")
