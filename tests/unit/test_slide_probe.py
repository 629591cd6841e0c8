"""Attention pooling: equal to a loop, better than the mean where few tiles tell, and honest about its labels."""

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from tests.unit.embeddings_on_disk import SNAPSHOT, a_spec, indexed, write_files

from histoscale.cluster.slide_tasks import SlideTask, do_task
from histoscale.embeddings.abmil import Abmil, GatedAttention
from histoscale.embeddings.bags import drawn_rows, load_bags
from histoscale.embeddings.files import SlideEmbedding
from histoscale.embeddings.folder import begin
from histoscale.embeddings.heatmap import draw_heatmap
from histoscale.embeddings.labels import SlideLabels, read_labels
from histoscale.embeddings.names import read_names, resolver
from histoscale.embeddings.progress import CountedSteps
from histoscale.embeddings.slide_probe import ABMIL, MEAN, ProbePlan, probe_slides
from histoscale.errors import DatasetError, EmbeddingError
from histoscale.evaluate.metrics import AUROC
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store

CPU = torch.device("cpu")
PLANTED = 3


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def quiet(what: str, done: int, total: int) -> None:
    pass


def ids(count: int) -> list[str]:
    return [f"{number:032x}" for number in range(count)]


def planted(
    slides: int = 60, tiles: int = 60, width: int = 16
) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Slides of which every second one has three tiles with a signal that drowns in the mean."""
    draw = np.random.default_rng(3)
    labels = np.arange(slides) % 2
    features = {}
    for name, label in zip(ids(slides), labels, strict=True):
        rows = draw.standard_normal((tiles, width))
        rows += draw.standard_normal(width) * 0.7  # what slides differ by, as stain does
        if label:
            rows[:PLANTED, :4] = 4.0 + 0.3 * draw.standard_normal((PLANTED, 4))
        features[name] = rows
    return features, labels


def test_the_pooled_bag_equals_a_loop_over_its_tiles() -> None:
    torch.manual_seed(0)
    net = GatedAttention(5, 3, hidden=7, attention=4).eval()
    tiles = torch.randn(6, 5)
    scores, hidden = [], []
    for tile in tiles:
        h = torch.clamp(net.project.weight @ tile + net.project.bias, min=0)
        tanh = torch.tanh(net.tanh_of.weight @ h + net.tanh_of.bias)
        gate = 1 / (1 + torch.exp(-(net.gate_of.weight @ h + net.gate_of.bias)))
        scores.append(((net.score_of.weight[0] * tanh * gate).sum() + net.score_of.bias[0]).item())
        hidden.append(h)
    exponents = np.exp(np.array(scores))
    weights = exponents / exponents.sum()
    bag = sum(weight * h for weight, h in zip(weights, hidden, strict=True))
    found, found_weights = net.pool(tiles)
    torch.testing.assert_close(found, bag.float(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_weights.detach().numpy(), weights, rtol=1e-5)
    torch.testing.assert_close(net(tiles)[0], net.classify.weight @ found + net.classify.bias)


def test_the_same_seed_fits_the_same_network_and_leaves_the_generator_alone() -> None:
    features, labels = planted(12, 10)
    bags, rows = list(features.values()), np.arange(12)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two = (Abmil(epochs=2).fit(bags, labels, rows[:8], rows[8:], 1, CPU) for _ in range(2))
    np.testing.assert_array_equal(one.tell(bags[0])[0], two.tell(bags[0])[0])
    assert torch.equal(before, torch.get_rng_state())


def test_few_telling_tiles_are_found_by_attention_and_less_by_the_mean(tmp_path: Path) -> None:
    features, labels = planted()
    write_files(tmp_path, features)
    store = open_store(tmp_path)
    truth = SlideLabels(tuple(ids(60)), ("a", "b"), labels, None, None, 2)
    plan = ProbePlan("task", seeds=2, max_tiles=50, heatmaps=True)
    report = probe_slides(store, truth, plan, CPU, quiet)
    attention, mean = report.figure(ABMIL, AUROC), report.figure(MEAN, AUROC)
    assert attention.mean > 0.95
    assert attention.mean > mean.mean + 0.05
    (gain,) = [each for each in report.gains if each.metric == AUROC]
    assert gain.difference == pytest.approx(attention.mean - mean.mean)
    assert "2 labelled slides have no embeddings" in report.table()
    told = json.loads((tmp_path / "probes" / "task" / "report.json").read_text())
    assert told["embeddings"] == a_spec().fingerprint
    assert told["counts"] == {"a": 30, "b": 30}
    shares = []
    for name, label in zip(ids(60), labels, strict=True):
        with h5py.File(tmp_path / "probes" / "task" / "attention" / f"{name}.h5") as file:
            weights = file["attention"][:]
            assert file["coords"].shape == (60, 2)
            assert weights.sum() == pytest.approx(1.0, abs=1e-4)
            if label and file.attrs["held_out"]:
                shares.append(weights[:PLANTED].sum())
        image = Image.open(tmp_path / "probes" / "task" / "heatmaps" / f"{name}.png")
        assert max(image.size) == 1024
    assert np.mean(shares) > 3 * PLANTED / 60


def test_groups_are_never_divided_and_classes_of_one_group_are_refused(tmp_path: Path) -> None:
    features, labels = planted(12, 5, 4)
    write_files(tmp_path, features)
    groups = np.array([f"p{number // 6}" for number in range(12)])
    truth = SlideLabels(tuple(ids(12)), ("a", "b"), np.sort(labels), groups, None, 0)
    with pytest.raises(DatasetError, match="classes have too few groups"):
        probe_slides(open_store(tmp_path), truth, ProbePlan("task"), CPU, quiet)


def test_tiles_are_drawn_by_the_slide_alone_and_widths_must_agree(tmp_path: Path) -> None:
    rows = drawn_rows("a", 100, 10)
    assert len(set(rows.tolist())) == 10
    assert rows.tolist() == sorted(rows.tolist())
    np.testing.assert_array_equal(rows, drawn_rows("a", 100, 10))
    assert rows.tolist() != drawn_rows("b", 100, 10).tolist()
    np.testing.assert_array_equal(drawn_rows("a", 4, 10), np.arange(4))
    write_files(tmp_path, {"0" * 32: np.ones((12, 3)), "1" * 32: np.ones((3, 4))})
    with pytest.raises(EmbeddingError, match="of another width"):
        load_bags(open_store(tmp_path), ["0" * 32, "1" * 32], 5, quiet)
    bags = load_bags(open_store(tmp_path), ["0" * 32], 5, quiet)
    assert (bags.bags[0].shape, bags.means.tolist(), bags.tiles.tolist()) == ((5, 3), [[1.0] * 3], [12])


def labels_of(text: str, patients: dict[str, str] | None = None, known: int = 6, embedded: int = 6) -> SlideLabels:
    names = ids(known)
    return read_labels(text.encode(), lambda one: (one,) if one in names else (), set(names[:embedded]), patients or {})


def test_labels_are_sorted_by_slide_with_groups_and_parts() -> None:
    first, second, third, fourth, *_ = ids(6)
    text = f"slide_id,label,group,split\n{fourth},b,p,test\n{first},a,,train\n{third},b,p,train\n{second},a,q,test\n"
    found = labels_of(text)
    assert found.slide_ids == (first, second, third, fourth)
    assert found.classes == ("a", "b")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.groups is not None
    assert len(set(found.groups.tolist())) == 3
    assert found.parts is not None
    assert found.parts.tolist() == ["train", "test", "train", "test"]
    plain = f"slide,label\n{first},a\n{second},a\n{third},b\n{fourth},b\n"
    assert labels_of(plain).groups is None
    by_patient = labels_of(plain, {first: "x", second: "x"}).groups
    assert by_patient is not None
    assert by_patient[0] == by_patient[1] != by_patient[2]
    assert labels_of(plain + f"{ids(6)[5]},a\n", embedded=5).without_file == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id\n{0}\n", "no column label"),
        ("name,label\n{0},a\n", "no column slide_id or slide"),
        ("slide_id,label\nMustermann,a\n", "line 2: no such slide"),
        ("slide_id,label\n{0},a\n{0},b\n", "line 3: slide given before"),
        ("slide_id,label\n{0},\n", "line 2: no label"),
        ("slide_id,label,split\n{0},a,dev\n", "line 2: split is none of train, val, test"),
        ('slide_id,label\n"{0},a\n', "not CSV in UTF-8"),
        ("slide_id,label\n{0},a\n{1},a\n", "not of two classes"),
        ("slide_id,label\n{0},a\n{1},a\n{2},b\n", r"1 of 2 classes have one slide, .*got 'b'"),
    ],
)
def test_faults_of_labels_are_told_by_line_without_names(text: str, message: str) -> None:
    with pytest.raises(EmbeddingError, match=message) as caught:
        labels_of(text.format(*ids(6)))
    assert "Mustermann" not in str(caught.value)


def test_slides_go_by_their_names_in_the_index_and_reports_hold_none(tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    made = make_slides(slides / "a", count=4)
    make_slides(slides / "b", count=1)
    catalogue = indexed(slides, tmp_path / "index")
    names = read_names(open_store(tmp_path / "index"))
    resolve = resolver(names, catalogue.has)
    assert len(made) == 4
    path = "a/synthetic-001.svs"
    (one,) = resolve(path)
    assert catalogue.has(one)
    assert (
        resolve(one)
        == resolve(f"{slides}/{path}")
        == resolve("synthetic-001.svs")
        == resolve("synthetic-001")
        == (one,)
    )
    assert len(resolve("synthetic-000.svs")) == 2
    assert resolve("nobody") == ()
    write_files(
        tmp_path / "files", {catalogue.slide_id(row): np.random.default_rng(row).random((4, 3)) for row in range(5)}
    )
    csv = tmp_path / "labels.csv"
    csv.write_text("slide,label\n" + "".join(f"a/synthetic-00{n}.svs,{'xy'[n % 2]}\n" for n in range(4)))
    task = SlideTask(str(tmp_path / "files"), str(csv), str(tmp_path / "index"), ProbePlan("t", seeds=1), 0, 0, 0)
    lines = do_task(task, CPU, quiet)
    assert lines[-1] == f"report: {tmp_path}/files/probes/t/report.json"
    assert not [
        path for path in (tmp_path / "files").rglob("*") if path.is_file() and b"synthetic-" in path.read_bytes()
    ]
    csv.write_text("slide,label\nsynthetic-000.svs,x\n")
    with pytest.raises(EmbeddingError, match="line 2: 2 slides have this name: give the path or the id"):
        do_task(task, CPU, quiet)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "../x"}, "--name is no name"),
        ({"name": "x", "seeds": 0}, "needs a split and a tile"),
        ({"name": "x", "max_tiles": 0}, "needs a split and a tile"),
    ],
)
def test_plans_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EmbeddingError, match=message):
        ProbePlan(**arguments)


def test_the_picture_has_a_tile_where_it_lies_in_the_colour_of_its_rank() -> None:
    coords = np.array([[0, 0], [512, 0], [0, 256]])
    slide = SlideEmbedding("a", np.zeros((3, 1)), coords, 256, (1024, 512))
    picture = draw_heatmap(slide, np.array([0.2, 0.7, 0.1], np.float32))
    assert picture.shape == (512, 1024, 3)
    assert picture[10, 10].tolist() == [204, 71, 120]
    assert picture[10, 600].tolist() == [240, 249, 33]
    assert picture[300, 10].tolist() == [13, 8, 135]
    assert picture[400, 900].tolist() == [255, 255, 255]
    one = draw_heatmap(SlideEmbedding("a", np.zeros((1, 1)), coords[:1], 256, (1024, 512)), np.ones(1, np.float32))
    assert one[0, 0].tolist() == [13, 8, 135]


def test_counts_become_lines_now_and_then() -> None:
    lines: list[str] = []
    now = [0.0]
    steps = CountedSteps(lines.append, lambda: now[0])
    for done in range(1, 11):
        now[0] += 1.0
        steps.tell("slides read", done, 10)
    assert lines == [
        "slides read: 6 of 10, 1.20 per s, 3.3 s left",
        "slides read: 10 of 10, 1.11 per s",
    ]


def test_a_folder_that_holds_no_embeddings_is_told(tmp_path: Path) -> None:
    task = SlideTask(str(tmp_path), str(tmp_path / "x.csv"), None, ProbePlan("t"), 0, 0, 0)
    with pytest.raises(EmbeddingError, match="holds no embeddings"):
        do_task(task, CPU, quiet)
    begin(open_store(tmp_path), a_spec(), SNAPSHOT)
    buffer = io.StringIO("slide_id,label\n")
    (tmp_path / "x.csv").write_text(buffer.getvalue())
    with pytest.raises(EmbeddingError, match="not of two classes"):
        do_task(task, CPU, quiet)
