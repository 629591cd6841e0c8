"""The suites that come with histoscale, their strict decoding, and which tasks a folder of datasets can run."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from tests.unit import datasets_on_disk as disk
from tests.unit.test_datasets_hest import write_hest

from histoscale.errors import RecipeError
from histoscale.evaluate.datasets import LAYOUTS
from histoscale.evaluate.datasets.layout import Published
from histoscale.evaluate.suite import Suite, load_suite, resolve

FOLDER = Path(__file__).parents[2] / "jobs" / "suites"
VIRCHOW2 = FOLDER / "virchow2.yaml"
# What the paper gives as the averages of its own figures.
AVERAGES = {
    "cls_mean": {
        "in": {"Virchow2G": 0.970, "Virchow2": 0.966, "Virchow": 0.944, "H-optimus-0": 0.950, "UNI": 0.943},
        "out": {"Virchow2G": 0.894, "Virchow2": 0.885, "Virchow": 0.877, "H-optimus-0": 0.875, "UNI": 0.872},
    },
    "cls": {
        "in": {"Virchow2G": 0.971, "Virchow2": 0.966, "Virchow": 0.941, "H-optimus-0": 0.944, "UNI": 0.943},
        "out": {"Virchow2G": 0.887, "Virchow2": 0.886, "Virchow": 0.867, "H-optimus-0": 0.874, "UNI": 0.866},
    },
}
ROUNDING = 0.0011  # figures of three digits, and their average as well


def smaller() -> dict[str, Any]:
    return {
        name: replace(layout, published=dict.fromkeys(layout.published, Published()))
        for name, layout in LAYOUTS.items()
    }


@pytest.fixture
def virchow2() -> Suite:
    return load_suite(VIRCHOW2)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_every_suite_decodes(path: Path) -> None:
    assert load_suite(path).name == path.stem


def test_virchow2_has_twelve_tasks_of_which_three_are_private(virchow2: Suite) -> None:
    assert len(virchow2.tasks) == 12
    assert [task.name for task in virchow2.tasks if task.private] == ["panmsk-20x", "panmsk-10x", "panmsk-5x"]
    assert {task.metric for task in virchow2.tasks if task.name != "hest"} == {"weighted_f1"}
    assert all(task.table for task in virchow2.tasks)


@pytest.mark.parametrize("embedding", ["cls_mean", "cls"])
def test_figures_average_to_the_papers_averages(virchow2: Suite, embedding: Any) -> None:
    for model in ("Virchow2G", "Virchow2", "Virchow", "H-optimus-0", "UNI"):
        inside = [task.published[embedding][model] for task in virchow2.tasks if task.private]
        outside = [t.published[embedding][model] for t in virchow2.tasks if not t.private and t.metric != "pearson"]
        assert len(outside) == 8
        assert np.mean(inside) == pytest.approx(AVERAGES[embedding]["in"][model], abs=ROUNDING)
        assert np.mean(outside) == pytest.approx(AVERAGES[embedding]["out"][model], abs=ROUNDING)
        hest = virchow2.tasks[-1]
        assert len(hest.subtasks) == 10
        mean = np.mean([subtask.published[embedding][model] for subtask in hest.subtasks])
        assert mean == pytest.approx(hest.published[embedding][model], abs=ROUNDING)


def test_sizes_are_those_that_the_layouts_check_where_papers_agree(virchow2: Suite) -> None:
    tiles = {task.name: task.tiles for task in virchow2.tasks}
    for name in ("pcam", "mhist", "camelyon17-wilds"):
        assert tiles[name] == sum(LAYOUTS[name].published[""].parts.values())
    assert tiles["tcga-tils"] == LAYOUTS["tcga-tils"].published[""].total
    assert tiles["crc"] == LAYOUTS["crc"].published[""].parts["train"]


def test_a_suite_never_changes(virchow2: Suite) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        virchow2.name = "other"  # type: ignore[misc]


def values() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(VIRCHOW2.read_text())
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["tasks"][3].update(metrik=1), r"tasks\.3\.metrik is not a field \(nearest: tasks\.3\.metric\)"),
        (lambda v: v.update(sources="x"), r"sources is not a field \(nearest: source\)"),
        (
            lambda v: v["tasks"][11]["subtasks"][0].update(fold="x"),
            r"0\.fold is not a field \(nearest: .*folder",
        ),
        (lambda v: v["tasks"][3].update(metric="f1"), r"tasks\.3\.metric = 'f1'"),
        (lambda v: v["tasks"][3].update(layout="pcm"), r"layout 'pcm' is not known \(nearest: pcam\)"),
        (lambda v: v["tasks"][3].pop("folder"), "a private task has neither layout nor folder"),
        (lambda v: v["tasks"][0].update(layout="pcam"), "a private task has neither layout nor folder"),
        (lambda v: v["tasks"][11].update(metric="weighted_f1"), "subtasks and the metric pearson are those of"),
        (lambda v: v["tasks"][11].pop("subtasks"), "subtasks and the metric pearson are those of"),
        (lambda v: v["tasks"].append(copy.deepcopy(v["tasks"][3])), "tasks of the same name: pcam"),
        (lambda v: v["tasks"][3]["published"]["cls"].update(UNI=93.4), r"published\.cls\.UNI = 93\.4"),
        (lambda v: v.update(tasks=[]), "tasks = "),
    ],
)
def test_a_suite_that_is_not_valid_is_refused_by_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    content = values()
    change(content)
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=message):
        load_suite(tmp_path / "suite.yaml")


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    content = values() | {"colour": 1, "name": "a b"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=r"has 2 problems: .*name = 'a b'.*colour is not a field"):
        load_suite(tmp_path / "suite.yaml")


def test_what_is_no_suite_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"suite .*none.yaml cannot be read: No such file .*See jobs/suites"):
        load_suite(tmp_path / "none.yaml")
    (tmp_path / "suite.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read: not a text file"):
        load_suite(tmp_path / "suite.yaml")
    (tmp_path / "suite.yaml").write_text("- a list")
    with pytest.raises(RecipeError, match=r"is not a suite \(got 'list'"):
        load_suite(tmp_path / "suite.yaml")
    (tmp_path / "suite.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="is not valid YAML"):
        load_suite(tmp_path / "suite.yaml")


def test_a_folder_of_datasets_runs_what_it_has_and_says_why_not_the_rest(tmp_path: Path, virchow2: Suite) -> None:
    disk.write_mhist(tmp_path / "mhist")
    disk.write_crc(tmp_path / "crc")
    disk.write_tils(tmp_path / "tcga-tils")
    (tmp_path / "tcga-tils" / "images-tcga-tils-metadata.csv").unlink()
    write_hest(tmp_path / "hest" / "IDC")
    write_hest(tmp_path / "hest" / "LUNG")
    found = {item.task.name: item for item in resolve(virchow2, str(tmp_path), smaller())}
    assert [name for name, item in found.items() if item.uri] == ["crc", "mhist", "hest"]
    assert found["mhist"].uri == str(tmp_path / "mhist")
    assert found["mhist"].reason == found["crc"].reason == ""
    assert found["panmsk-20x"].reason == "the dataset is private"
    assert found["pcam"].reason == "there is no folder pcam"
    assert "no NCT-CRC-HE-100K-NONORM/ADI" in found["crc-nonorm"].reason
    assert "no images-tcga-tils-metadata.csv" in found["tcga-tils"].reason
    assert [subtask.name for subtask in found["hest"].subtasks] == ["IDC", "LUAD"]
    assert "HCC: hest HCC: the dataset is incomplete" in found["hest"].reason
    assert "IDC: hest IDC:" not in found["hest"].reason


def test_hest_without_any_task_cannot_be_run(tmp_path: Path, virchow2: Suite) -> None:
    (tmp_path / "hest").mkdir()
    hest = resolve(virchow2, str(tmp_path))[-1]
    assert (hest.uri, hest.subtasks) == (None, ())
    assert "IDC: hest IDC: the dataset is incomplete" in hest.reason
