"""Networks of every kind of place, set beside a run on the same tiles."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.unit.test_evaluate import commit_of, tiny_recipe, two_classes

from histoscale.checkpoint.run_record import INDEX_KEY
from histoscale.config.archs import ARCHS
from histoscale.config.decode import dump_recipe, fingerprint
from histoscale.errors import ModelError
from histoscale.evaluate import comparison as comparison_module
from histoscale.evaluate import networks as networks_module
from histoscale.evaluate.assess import EvaluationPlan
from histoscale.evaluate.backbone import initial_backbone
from histoscale.evaluate.comparison import Comparison, evaluate_into, overlap_notes
from histoscale.evaluate.datasets import open_dataset
from histoscale.evaluate.figures import COLOUR, PRETRAINED, UNTRAINED
from histoscale.evaluate.networks import PUBLISHED_PX, Network, find_network, require_names, untrained_like
from histoscale.evaluate.report import decode, encode
from histoscale.models import VisionTransformer
from histoscale.models.weights import initialise
from histoscale.storage import open_store

ARCH = ARCHS["vit_test14"]
CPU = torch.device("cpu")


def weights_file(path: Path, seed: int = 3) -> Path:
    backbone = VisionTransformer(ARCH, PUBLISHED_PX)
    initialise(backbone, seed, ARCH.init_std)
    save_file(backbone.state_dict(), path)
    return path


def test_a_file_of_weights_is_a_network_of_its_arch(tmp_path: Path) -> None:
    file = weights_file(tmp_path / "theirs.safetensors")
    network = find_network(f"vit_test14={file}")
    assert (network.name, network.arch, network.image_px, network.step) == ("theirs", ARCH, PUBLISHED_PX, 0)
    assert network.fingerprint.startswith("sha256:")
    again = VisionTransformer(ARCH, PUBLISHED_PX)
    initialise(again, 3, ARCH.init_std)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(network.backbone.state_dict()[name], tensor, rtol=0, atol=0)


def test_a_run_is_a_network_at_its_newest_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe()
    (tmp_path / "old-run").mkdir()
    (tmp_path / "old-run" / "recipe.yaml").write_text(dump_recipe(recipe))
    backbone = initial_backbone(recipe)
    monkeypatch.setattr(networks_module, "trained_backbone", lambda store, recipe: (backbone, commit_of(recipe, 9)))
    network = find_network(str(tmp_path / "old-run"))
    assert (network.name, network.step, network.images_seen, network.image_px) == ("old-run", 9, 36, 28)
    assert network.fingerprint == fingerprint(recipe)


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("nowhere", r"there is no network to evaluate .*expected a run folder, an export, or ARCH=FILE"),
        ("vit_huge=weights.safetensors", r"the shape of the weights is not known .*vit_test14"),
    ],
)
def test_what_is_no_network_is_refused(tmp_path: Path, place: str, match: str) -> None:
    arch, separator, file = place.partition("=")
    with pytest.raises(ModelError, match=match):
        find_network(f"{arch}={tmp_path / file}" if separator else str(tmp_path / arch))


def test_an_untrained_twin_has_the_shape_and_nothing_else(tmp_path: Path) -> None:
    network = find_network(f"vit_test14={weights_file(tmp_path / 'theirs.safetensors')}")
    twin = untrained_like(network)
    shapes = {name: tensor.shape for name, tensor in twin.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in network.backbone.state_dict().items()}
    assert not torch.equal(twin.patch_embed.proj.weight, network.backbone.patch_embed.proj.weight)
    torch.testing.assert_close(untrained_like(network).pos_embed, twin.pos_embed, rtol=0, atol=0)


def named(name: str) -> Network:
    return Network(name, VisionTransformer(ARCH, 28).eval(), ARCH, 28, "f" * 16)


@pytest.mark.parametrize("names", [("a", "a"), (UNTRAINED,), (PRETRAINED,), (COLOUR,)])
def test_names_that_cannot_be_told_apart_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match="two networks of one name"):
        require_names([named(name) for name in names])


def test_networks_beside_are_asked_about_the_same_tiles_and_have_gains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    backbone = initial_backbone(recipe)
    monkeypatch.setattr(comparison_module, "trained_backbone", lambda store, recipe: (backbone, commit_of(recipe)))
    tiles = str(two_classes(tmp_path / "tiles", 10))
    beside = [find_network(f"vit_test14={weights_file(tmp_path / 'theirs.safetensors')}"), named("zeros")]
    store = open_store(tmp_path / "run")
    comparison = Comparison.of_run(store, recipe, CPU, beside)
    report = evaluate_into(store, comparison, open_dataset(tiles), EvaluationPlan(("knn",)))
    assert decode(store.get(report.key)) == report == decode(encode(report))
    assert [gain.baseline for gain in report.gains if gain.metric == "accuracy"] == [
        UNTRAINED, "theirs", "zeros", COLOUR,
    ]  # fmt: skip
    for gain in report.gains:
        other = report.figure(gain.baseline, "knn", gain.metric)
        assert gain.difference == pytest.approx(report.figure(PRETRAINED, "knn", gain.metric).mean - other.mean)
    assert "theirs" in report.table()
    assert max(map(len, report.table().splitlines())) <= 100


def test_any_network_is_judged_like_a_run(tmp_path: Path) -> None:
    network = find_network(f"vit_test14={weights_file(tmp_path / 'theirs.safetensors')}")
    said: list[str] = []
    comparison = Comparison.of_network(network, CPU, tell=said.append)
    dataset = open_dataset(str(two_classes(tmp_path / "tiles", 10)))
    report = comparison.evaluate(dataset, EvaluationPlan(("knn",)), ["by the way"])
    assert (report.fingerprint, report.step, report.notes) == (network.fingerprint, 0, ("by the way",))
    assert report.figure(PRETRAINED, "knn").mean > 0.5
    assert np.isfinite(report.figure(UNTRAINED, "knn").mean)


def test_overlap_is_not_looked_for_where_there_is_nothing_to_look_in(tmp_path: Path) -> None:
    dataset = open_dataset(str(two_classes(tmp_path / "tiles", 10)))
    assert dataset.groups is None
    assert overlap_notes(open_store(tmp_path), dataset) == ()


@pytest.mark.parametrize("damage", [b"{", b"[]", b'{"index": "/index"}'])
def test_a_damaged_record_of_the_index_is_a_note_and_no_end(tmp_path: Path, damage: bytes) -> None:
    dataset = open_dataset(str(two_classes(tmp_path / "tiles", 10)))
    store = open_store(tmp_path / "run")
    store.put(INDEX_KEY, damage)
    (note,) = overlap_notes(store, replace(dataset, groups=["patient"] * len(dataset)))
    assert "could not be told: index.json of run" in note
