from pathlib import Path

import pytest

from histoscale.checkpoint.run_record import recorded_origins
from histoscale.cluster.run_folder import (
    DEFAULT_PRECISION,
    check_same_experiment,
    read_run,
    require_run,
    resolve_precision,
    start_run,
)
from histoscale.config.decode import decode_recipe
from histoscale.errors import RunError
from histoscale.storage import open_store

RECIPE = decode_recipe({"precision": "fp32", "batch": {"tiles": 64, "replicas": 4}})


def test_a_run_records_its_resolved_recipe(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert read_run(store) is None
    start_run(store, RECIPE, "/index", "abc", ["teacher: a run"])
    assert require_run(store) == RECIPE
    assert recorded_origins(store) == ["teacher: a run"]
    check_same_experiment(store, RECIPE, RECIPE, "abc")


def test_only_the_mapping_to_hardware_may_change(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    start_run(store, RECIPE, "/index", "abc")
    assert recorded_origins(store) == []
    moved = decode_recipe(RECIPE.model_dump(mode="json"), ["cluster.workers=3"])
    check_same_experiment(store, moved, RECIPE, "abc")
    changed = decode_recipe(RECIPE.model_dump(mode="json"), ["optim.lr=0.1"])
    with pytest.raises(RunError, match=r"another recipe.*optim.lr: 0.1 != 0.00035"):
        check_same_experiment(store, changed, RECIPE, "abc")
    with pytest.raises(RunError, match=r"another index.*snapshot abc"):
        check_same_experiment(store, RECIPE, RECIPE, "def")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(RunError, match="something else than a run"):
        read_run(open_store(tmp_path))


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder"):
        require_run(open_store(tmp_path))


def test_the_folder_of_a_quickstart_names_the_run_in_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 0")
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(RunError, match=rf"is not a run folder .*Give {tmp_path}/run"):
        require_run(open_store(tmp_path))


def test_precision_is_settled_once() -> None:
    auto = RECIPE.model_copy(update={"precision": "auto"})
    assert resolve_precision(auto, DEFAULT_PRECISION["cpu"]).precision == "fp32"
    assert resolve_precision(auto, DEFAULT_PRECISION["cuda"]).precision == "bf16"
    assert resolve_precision(RECIPE, DEFAULT_PRECISION["cuda"]).precision == "fp32"
