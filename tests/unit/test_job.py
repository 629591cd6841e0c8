import json
from pathlib import Path

import pytest
import yaml

from histoscale.cluster.failures import diagnosis_in
from histoscale.cluster.job import ENVIRONMENT, inside_a_job, job_name, location, run_job
from histoscale.errors import ClusterError, RecipeError

ROOT = Path(__file__).parents[2]


def test_a_diagnosis_is_the_last_line_and_exit_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise RecipeError("the recipe is odd", remedy="make it even")

    with pytest.raises(SystemExit) as exit_:
        run_job(main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: the recipe is odd. Make it even."


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


def test_a_diagnosis_is_found_wherever_it_is_wrapped() -> None:
    diagnosis = RecipeError("odd")
    outer = RuntimeError("outer")
    outer.__cause__ = ValueError("middle")
    outer.__cause__.__context__ = diagnosis
    assert diagnosis_in(outer) is diagnosis
    assert diagnosis_in(RuntimeError("none")) is None
    assert diagnosis_in(None) is None
