"""Running a suite on small datasets: every task that is there, kept as it is done, and the table."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tests.unit.test_datasets_hest import write_hest
from tests.unit.test_evaluate import two_classes
from tests.unit.test_networks import ARCH

from histoscale.errors import DatasetError, RecipeError
from histoscale.evaluate.comparison import Comparison
from histoscale.evaluate.figures import COLOUR, PRETRAINED, UNTRAINED
from histoscale.evaluate.networks import Network
from histoscale.evaluate.report import decode
from histoscale.evaluate.suite import Suite, load_suite
from histoscale.evaluate.suite_run import SuiteReport, decode_suite, encode_suite, run_suite
from histoscale.evaluate.suite_table import published_of, score_of, suite_table
from histoscale.models import VisionTransformer
from histoscale.models.weights import initialise
from histoscale.storage import Store, open_store

CONTENT = {
    "name": "own",
    "source": "the laboratory",
    "tasks": [
        {"name": "colours", "title": "Colours", "layout": "folders", "folder": "colours", "metric": "weighted_f1",
         "protocol": "ridge", "published": {"cls": {"Famous": 0.9}, "cls_mean": {"Famous": 0.8}}},
        {"name": "gone", "title": "Gone", "layout": "folders", "folder": "gone", "metric": "weighted_f1",
         "protocol": "knn", "note": "never there"},
        {"name": "genes", "title": "Genes", "layout": "hest", "folder": "hest", "metric": "pearson",
         "protocol": "random_forest",
         "published": {"cls": {"Famous": 0.5}, "cls_mean": {"Famous": 0.5}},
         "subtasks": [
            {"name": "A", "folder": "IDC", "published": {"cls": {"Famous": 0.2}, "cls_mean": {"Famous": 0.3}}},
            {"name": "B", "folder": "none", "published": {"cls": {"Famous": 0.8}, "cls_mean": {"Famous": 0.7}}},
         ]},
    ],
}  # fmt: skip


def comparison(said: list[str], fingerprint: str = "f" * 16) -> Comparison:
    torch.set_num_threads(1)
    backbone = VisionTransformer(ARCH, 28).eval()
    initialise(backbone, 5, ARCH.init_std)
    network = Network(PRETRAINED, backbone, ARCH, 28, fingerprint, step=30, images_seen=120)
    return Comparison.of_network(network, torch.device("cpu"), tell=said.append)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(CONTENT))
    return load_suite(tmp_path / "own.yaml")


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    two_classes(tmp_path / "data" / "colours", 10)
    write_hest(tmp_path / "data" / "hest" / "IDC")
    return tmp_path / "data"


def run(suite: Suite, datasets: Path, store: Store, said: list[str], fingerprint: str = "f" * 16) -> SuiteReport:
    return run_suite(suite, str(datasets), comparison(said, fingerprint), store, seeds=2, jobs=1)


def test_every_task_that_is_there_is_measured_and_the_rest_says_why_not(
    tmp_path: Path, suite: Suite, datasets: Path
) -> None:
    store, said = open_store(tmp_path / "out"), []  # type: tuple[Store, list[str]]
    report = run(suite, datasets, store, said)
    assert decode_suite(store.get(report.key)) == report == decode_suite(encode_suite(report))
    assert {score.task for score in report.scores} == {"colours", "genes/A"}
    assert {score.features for score in report.scores if score.task == "colours"} == {PRETRAINED, UNTRAINED, COLOUR}
    assert {score.features for score in report.scores if score.task == "genes/A"} == {PRETRAINED, UNTRAINED}
    assert all(score.low <= score.value <= score.high for score in report.scores)
    assert dict(report.reasons)["gone"] == "there is no folder gone"
    assert "B: hest none" in dict(report.reasons)["genes"]
    whole = decode(store.get("evaluations/own.colours-step-00000030.json"))
    ours = score_of(suite.tasks[0], "cls", PRETRAINED, report)
    assert ours is not None
    assert ours.value == whole.figure(PRETRAINED, "ridge", "weighted_f1", "cls").mean
    assert whole.probes == ("ridge",)


def test_what_is_measured_is_not_measured_again_unless_the_network_is_another(
    tmp_path: Path, suite: Suite, datasets: Path
) -> None:
    store = open_store(tmp_path / "out")
    first = run(suite, datasets, store, [])
    two_classes(datasets / "gone", 10)
    said: list[str] = []
    second = run(suite, datasets, store, said)
    assert [line for line in said if "kept" in line] == ["colours: kept from before", "genes/A: kept from before"]
    assert second.scores[: len(first.scores)] == first.scores
    assert second.has("gone")
    assert "gone" not in dict(second.reasons)
    said = []
    run(suite, datasets, store, said, "e" * 16)
    assert "colours: begins" in said


def test_a_dataset_that_breaks_while_it_is_read_is_a_reason_and_not_the_end(
    tmp_path: Path, suite: Suite, datasets: Path
) -> None:
    (datasets / "colours" / "red" / "0.jpg").write_bytes(b"no image")
    report = run(suite, datasets, open_store(tmp_path / "out"), [])
    assert "1 of 20 tiles cannot be read" in dict(report.reasons)["colours"]
    assert report.has("genes/A")


def test_the_table_has_the_papers_figures_beside_ours(tmp_path: Path, suite: Suite, datasets: Path) -> None:
    report = run(suite, datasets, open_store(tmp_path / "out"), [])
    lines = list(suite_table(suite, report))
    assert lines[0] == "suite own (the laboratory): 2 of 3 tasks; step 30"
    assert max(map(len, lines)) <= 100
    at = lines.index("embedding cls")
    assert lines[at + 1].split()[-1] == "Famous"
    assert [line.split()[-1] for line in lines[at + 2 : at + 5]] == ["0.900", "0.200", "0.550"]
    assert lines[at + 4].startswith("mean of these")
    assert "gone: there is no folder gone" in lines
    genes = suite.tasks[2]
    assert published_of(genes, "cls", report) == {"Famous": 0.2}  # of the part that was measured
    assert score_of(suite.tasks[1], "cls", PRETRAINED, report) is None


def test_a_suite_of_which_nothing_is_there_still_says_so(tmp_path: Path, suite: Suite) -> None:
    (tmp_path / "empty").mkdir()
    report = run(suite, tmp_path / "empty", open_store(tmp_path / "out"), [])
    lines = list(suite_table(suite, report))
    assert lines[0].startswith("suite own (the laboratory): 0 of 3 tasks")
    assert "colours: there is no folder colours" in lines


@pytest.mark.parametrize("damage", [b"{", b"[]", json.dumps({"format": 99}).encode(), b'{"format": 1}'])
def test_a_damaged_report_is_refused(damage: bytes) -> None:
    with pytest.raises(DatasetError, match="the report of a suite is damaged"):
        decode_suite(damage)


@pytest.mark.parametrize("protocol", ["random_forest", "guess"])
def test_a_protocol_that_does_not_give_the_metric_is_refused(tmp_path: Path, protocol: str) -> None:
    content = {**CONTENT, "tasks": [{**CONTENT["tasks"][0], "protocol": protocol}]}  # type: ignore[dict-item]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=f"protocol '{protocol}' does not give weighted_f1"):
        load_suite(tmp_path / "own.yaml")
