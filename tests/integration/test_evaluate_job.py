"""The evaluation as a job: what goes wrong on the node where it runs reaches the user as one line."""

import subprocess
import sys
from pathlib import Path

from histoscale.cluster.run_folder import RECIPE_KEY
from histoscale.config.decode import dump_recipe
from histoscale.config.recipe import Recipe

ROOT = Path(__file__).parents[2]


def test_diagnosis_of_the_task_is_the_last_line_and_the_status_is_two(tmp_path: Path) -> None:
    (tmp_path / RECIPE_KEY).write_text(dump_recipe(Recipe()))
    command = [sys.executable, "jobs/evaluate.py", "--run", str(tmp_path), "--dataset", str(tmp_path / "nowhere")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("error: the dataset has no labelled tiles (got ")
    assert "Traceback" not in ran.stderr
