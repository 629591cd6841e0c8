"""Probes on features with known answers, refusals of datasets, and a report that reads back as it was written."""

import hashlib
import io
import json
import pickle
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from histoscale.checkpoint import reader
from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.retention import BEST_KEY
from histoscale.config.decode import decode_recipe, fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import CheckpointError, DatasetError
from histoscale.evaluate import backbone as backbone_module
from histoscale.evaluate import comparison as comparison_module
from histoscale.evaluate.assess import EvaluationPlan
from histoscale.evaluate.backbone import initial_backbone, trained_backbone
from histoscale.evaluate.baselines import colour_statistics
from histoscale.evaluate.comparison import evaluate_run
from histoscale.evaluate.datasets import FileTiles, LabelledTiles, decode_tile, open_dataset
from histoscale.evaluate.embed import BOTH, CLS, PATCH_MEAN, Embedder, of_kind
from histoscale.evaluate.features import extract
from histoscale.evaluate.figures import COLOUR, PRETRAINED, UNTRAINED
from histoscale.evaluate.report import (
    EvaluationReport,
    decode,
    encode,
    latest_report,
    note_best,
)
from histoscale.storage import open_store

PLAN = EvaluationPlan()
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny_recipe() -> Recipe:
    return decode_recipe(
        {
            "data": {"region_px": 64},
            "batch": {"tiles": 4, "replicas": 2},
            "model": {"arch": "vit_test14", "drop_path": 0.0},
            "heads": {"dino_prototypes": 8, "ibot_prototypes": 8, "hidden_dim": 8},
            "crops": {"global_px": 28, "local_px": 14},
            "schedule": {"images": 8},
        }
    )


def commit_of(recipe: Recipe, step: int = 7) -> Commit:
    return Commit(step, step * 4, fingerprint(recipe), f"checkpoints/step-{step:08d}.aa/", {}, 0, None, {})


def write_tile(path: Path, colour: tuple[int, int, int], side_px: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 20, (side_px, side_px, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def two_classes(folder: Path, count: int = 6) -> Path:
    for index in range(count):
        write_tile(folder / "blue" / f"{index}.png", (20, 20, 200))
        write_tile(folder / "red" / f"{index}.jpg", (200, 20, 20))
    return folder


def test_dataset_lists_classes_and_tiles_in_sorted_order(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "notes.png").write_bytes(b"outside of a class")
    (tmp_path / "red" / "notes.txt").write_text("no image")
    (tmp_path / "red" / ".hidden.png").write_bytes(b"")
    write_tile(tmp_path / "blue" / "deeper" / "x.tif", (0, 0, 255))
    dataset = open_dataset(str(tmp_path))
    assert dataset.classes == ("blue", "red")
    assert dataset.counts() == {"blue": 7, "red": 6}
    assert isinstance(dataset.source, FileTiles)
    assert [key.split("/")[0] for key in dataset.source.keys] == [dataset.classes[label] for label in dataset.labels]
    assert dataset.describe(0) == "blue #0"
    assert dataset.describe(12) == "red #5"


def test_dataset_without_tiles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist, or is empty"):
        open_dataset(str(tmp_path / "data"))
    (tmp_path / "data" / "empty").mkdir(parents=True)
    with pytest.raises(DatasetError, match="does not exist, or is empty"):
        open_dataset(str(tmp_path / "data"))
    (tmp_path / "data" / "empty" / "notes.txt").write_text("no tile")
    with pytest.raises(DatasetError, match="no labelled tiles"):
        open_dataset(str(tmp_path / "data"))


def test_dataset_of_one_class_is_refused(tmp_path: Path) -> None:
    for index in range(6):
        write_tile(tmp_path / "only" / f"{index}.png", (9, 9, 9))
    with pytest.raises(DatasetError, match=r"one class only \(got 'only'"):
        open_dataset(str(tmp_path))


def test_dataset_with_a_small_class_is_refused_with_its_count(tmp_path: Path) -> None:
    two_classes(tmp_path, count=4)
    open_dataset(str(tmp_path))
    (tmp_path / "red" / "0.jpg").unlink()
    with pytest.raises(DatasetError, match="red: 3"):
        open_dataset(str(tmp_path))


def test_unreadable_tiles_are_counted_and_named_without_their_file_names(tmp_path: Path) -> None:
    two_classes(tmp_path)
    whole = (tmp_path / "red" / "3.jpg").read_bytes()
    (tmp_path / "red" / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "blue" / "5.png").write_bytes(b"not an image")
    for index in range(12):
        (tmp_path / "red" / f"planted-name-{index:02d}.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"14 of 24 tiles cannot be read .*blue #5, red #3, .* and 4 more") as caught:
        extract(open_dataset(str(tmp_path)), {"colour": colour_statistics}, batch_tiles=5)
    assert "planted" not in str(caught.value)


def test_tiles_of_every_kind_decode_to_rgb() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for kind in ("PNG", "TIFF"):
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, kind)
        np.testing.assert_array_equal(decode_tile(data.getvalue()), pixels)
    gray = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(gray, "PNG")
    np.testing.assert_array_equal(decode_tile(gray.getvalue()), np.repeat(pixels[..., :1], 3, axis=2))
    assert decode_tile(b"") is None


def test_features_come_in_the_order_of_the_tiles_whatever_the_batch(tmp_path: Path) -> None:
    dataset = open_dataset(str(two_classes(tmp_path)))
    whole = extract(dataset, {"colour": colour_statistics}, batch_tiles=100)
    pieces = extract(dataset, {"colour": colour_statistics}, batch_tiles=5)
    one_by_one = [colour_statistics([dataset.source.read(index)[1]]) for index in range(len(dataset))]
    np.testing.assert_array_equal(whole.by_name["colour"], pieces.by_name["colour"])
    np.testing.assert_array_equal(whole.by_name["colour"], np.concatenate(one_by_one))
    assert whole.content_hash == pieces.content_hash


def test_content_hash_is_that_of_classes_labels_and_files_in_sorted_order(tmp_path: Path) -> None:
    folder = two_classes(tmp_path)
    content = hashlib.sha256(b"blue\x1fred")
    for label, name in enumerate(("blue", "red")):
        for path in sorted((folder / name).iterdir()):
            content.update(bytes(label) + hashlib.sha256(path.read_bytes()).digest())
    assert extract(open_dataset(str(folder)), {}).content_hash == content.hexdigest()[:16]


def test_content_hash_follows_content_and_not_place(tmp_path: Path) -> None:
    here = extract(open_dataset(str(two_classes(tmp_path / "a"))), {}).content_hash
    assert extract(open_dataset(str(two_classes(tmp_path / "b"))), {}).content_hash == here
    write_tile(tmp_path / "b" / "red" / "0.jpg", (0, 255, 0))
    assert extract(open_dataset(str(tmp_path / "b")), {}).content_hash != here


def test_colour_statistics_have_the_values_of_the_definition() -> None:
    tile = np.zeros((10, 10, 3), dtype=np.uint8)
    tile[:5, :, 0] = 255
    tile[..., 1] = 51
    np.testing.assert_allclose(colour_statistics([tile]), [[0.5, 0.2, 0, 0.5, 0, 0]], atol=1e-6)


def test_embedding_is_class_token_and_mean_of_patches_of_the_normalised_image() -> None:
    recipe = tiny_recipe()
    backbone = initial_backbone(recipe)
    tile = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    image = (torch.from_numpy(tile).permute(2, 0, 1) / 255.0 - mean) / std
    with torch.no_grad():
        tokens = backbone(image[None])[0]
    expected = torch.cat([tokens[0], tokens[2:].mean(0)])  # one register stands between
    found = Embedder(backbone, 28, torch.device("cpu"))([tile, tile])
    assert found.shape == (2, 64)
    np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(of_kind(found, CLS)[1], tokens[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(of_kind(found, PATCH_MEAN)[1], tokens[2:].mean(0).numpy(), atol=1e-5)
    np.testing.assert_array_equal(of_kind(found, BOTH), found)


def test_tiles_are_resized_without_aliasing_and_cut_to_a_square() -> None:
    seen: list[torch.Tensor] = []

    class Recorder(torch.nn.Module):
        prefix_tokens = 1

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images)
            return torch.zeros(len(images), 2, 4)

    stripes = np.zeros((112, 224, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # finer than the output can show: filtered, it is even grey
    Embedder(Recorder(), 28, torch.device("cpu"))([stripes])  # type: ignore[arg-type]
    assert seen[0].shape == (1, 3, 28, 28)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    assert float((seen[0] * std).std(dim=(2, 3)).max()) < 0.02


def evaluated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: int = 7, plan: EvaluationPlan = PLAN
) -> EvaluationReport:
    recipe = tiny_recipe()
    backbone = initial_backbone(recipe)
    monkeypatch.setattr(
        comparison_module, "trained_backbone", lambda store, recipe: (backbone, commit_of(recipe, step))
    )
    tiles = str(two_classes(folder / "tiles", 10))
    return evaluate_run(open_store(folder / "run"), recipe, tiles, torch.device("cpu"), plan)


def test_evaluation_is_written_into_the_run_and_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = evaluated(tmp_path, monkeypatch)
    assert (tmp_path / "run" / "evaluations" / "tiles-step-00000007.json").is_file()
    later = evaluated(tmp_path, monkeypatch, step=120)
    store = open_store(tmp_path / "run")
    assert latest_report(store, "tiles") == later
    assert latest_report(store, "til") is None
    assert decode(encode(report)) == report
    assert report.counts == {"blue": 10, "red": 10}
    # "Pretrained" is the untrained network here, so both rows must agree, and colour is all there is to see.
    assert report.figure(PRETRAINED, "knn").values == report.figure(UNTRAINED, "knn").values
    assert report.figure(COLOUR, "linear").mean == 1.0
    table = report.table()
    for words in ("20 tiles in 2 classes, chance 50.0%", "step 7", "kNN (k=20)", "linear", "100.0 [100.0, 100.0]"):
        assert words in table
    assert max(map(len, table.splitlines())) <= 100


def test_report_holds_what_was_asked_for_and_says_how_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = EvaluationPlan(("few_shot_4", "ridge"), (CLS, BOTH), 2)
    report = evaluated(tmp_path, monkeypatch, plan=plan)
    content = json.loads((tmp_path / "run" / report.key).read_text())
    assert content["protocol"].keys() == {"few_shot_4", "ridge"}
    assert "4 training tiles per class" in content["protocol"]["few_shot_4"]
    asked = {(item["features"], item["embedding"], item["probe"]) for item in content["figures"]}
    assert asked == {
        (features, embedding, probe)
        for features, kinds in ((PRETRAINED, (CLS, BOTH)), (UNTRAINED, (CLS, BOTH)), (COLOUR, ("",)))
        for embedding in kinds
        for probe in ("few_shot_4", "ridge")
    }
    assert len(report.figure(PRETRAINED, "few_shot_4", embedding=CLS).values) == 2 * 10
    assert len(report.figure(PRETRAINED, "ridge", "auroc", BOTH).values) == 2
    assert {(gain.baseline, gain.embedding) for gain in report.gains} == {
        (baseline, embedding) for baseline in (UNTRAINED, COLOUR) for embedding in (CLS, BOTH)
    }
    assert "embedding cls: class token\n" in report.table()
    assert not (tmp_path / "run" / BEST_KEY).exists()  # without kNN there is no judge
    with pytest.raises(LookupError, match="no balanced_accuracy of knn"):
        report.figure(PRETRAINED, "knn")


def test_the_best_step_is_that_of_the_highest_knn_accuracy_on_the_first_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, store = evaluated(tmp_path, monkeypatch), open_store(tmp_path / "other")

    def best_after(step: int, score: float, dataset_hash: str = "one", embedding: str = BOTH) -> int:
        knn = replace(report.figure(PRETRAINED, "knn"), values=(score,), embedding=embedding)
        note_best(store, replace(report, step=step, dataset_hash=dataset_hash, figures=(knn,)))
        return int(json.loads(store.get(BEST_KEY))["step"])

    assert json.loads(open_store(tmp_path / "run").get(BEST_KEY))["step"] == report.step
    assert [best_after(20, 0.6), best_after(40, 0.7), best_after(60, 0.65), best_after(80, 0.7)] == [20, 40, 40, 80]
    assert best_after(100, 0.9, "another") == 80
    assert best_after(100, 0.9, embedding=CLS) == 80
    content = json.loads(store.get(BEST_KEY))
    del content["embedding"]
    store.put(BEST_KEY, json.dumps(content).encode())
    assert best_after(110, 0.9, embedding=CLS) == 80
    assert best_after(120, 0.9) == 120
    store.put(BEST_KEY, b'{"step": 40}')
    assert best_after(140, 0.95) == 40


def test_report_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(evaluated(tmp_path, monkeypatch)).replace(b'"format": 2', b'"format": 1')
    with pytest.raises(DatasetError, match="another version"):
        decode(data)


def test_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        trained_backbone(open_store(tmp_path), tiny_recipe())


def test_checkpoint_of_another_network_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe()
    monkeypatch.setattr(reader, "latest_commit", lambda store: commit_of(recipe))
    monkeypatch.setattr(backbone_module, "load_teacher_backbone", lambda store, commit: {"cls_token": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"another network .*vit_test14"):
        trained_backbone(open_store(tmp_path), recipe)


def test_initial_backbone_is_the_same_each_time_and_follows_the_seed() -> None:
    recipe = tiny_recipe()
    once, again = initial_backbone(recipe).state_dict(), initial_backbone(recipe).state_dict()
    other = initial_backbone(recipe.model_copy(update={"seed": 1})).state_dict()
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(once["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_labelled_tiles_pickle_for_another_node(tmp_path: Path) -> None:
    dataset = open_dataset(str(two_classes(tmp_path)))
    copy: LabelledTiles = pickle.loads(pickle.dumps(dataset))
    assert [copy.source.read(index)[0] for index in range(len(copy))] == [
        dataset.source.read(index)[0] for index in range(len(dataset))
    ]
