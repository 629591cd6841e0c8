"""Options of jobs that would change nothing are refused, in one line and before anything is read."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_directly(script: str, *arguments: str) -> tuple[int, str]:
    """Exit status and last line of a job that is run without a cluster."""
    command = [sys.executable, f"jobs/{script}", *arguments]
    environment = {"PYTHONPATH": "platform", "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "option", [["--sidecar", "a.csv"], ["--strata", "a.csv"], ["--pattern", "(?P<a>.*)"], ["--report"]]
)
def test_exclusions_are_given_alone(option: list[str]) -> None:
    status, line = run_directly("index.py", "/nowhere", "--out", "/nowhere", "--exclude", "b.csv", *option)
    assert status == 2
    assert line.startswith(
        f"error: --exclude indexes nothing and has no use for {option[0]} (got '--exclude {option[0]}'"
    )


@pytest.mark.parametrize(
    ("mode", "option", "expected"),
    [
        (["--replay", "/nowhere", "--index", "/nowhere"], ["--slides", "1"], "--index, --device, --set"),
        (["--replay", "/nowhere", "--index", "/nowhere"], ["--workers", "2"], "--index, --device, --set"),
        (["--replay", "/nowhere", "--index", "/nowhere"], ["--blocks", "500"], "--index, --device, --set"),
        (["--replay", "/nowhere", "--index", "/nowhere"], ["--recipe", "x"], "--index, --device, --set"),
        (["--simulate", "--recipe", "x"], ["--device", "auto"], "--recipe, --slides, --workers, --blocks, --set"),
        (["--simulate", "--recipe", "x"], ["--index", "x"], "--recipe, --slides, --workers, --blocks, --set"),
    ],
)
def test_the_doctor_takes_the_options_of_what_it_does(mode: list[str], option: list[str], expected: str) -> None:
    status, line = run_directly("doctor.py", *mode, *option)
    assert status == 2
    assert line == (
        f"error: {mode[0]} has no use for {option[0]} (got '{' '.join(option)}'; expected {expected}). "
        f"Leave {option[0]} out."
    )


def test_the_doctor_says_what_it_needs() -> None:
    assert run_directly("doctor.py", "--simulate") == (2, "doctor.py: error: --simulate needs --recipe")
    assert run_directly("doctor.py", "--replay", "x") == (2, "doctor.py: error: --replay needs --index")
