"""What an export is used for: read by strangers, probed, and handed to TRIDENT and eva."""

import importlib
import json
import pickle
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tests.unit.exporting import committed_run, exported, tiny_recipe

from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.evaluate.assess import EvaluationPlan
from histoscale.evaluate.backbone import trained_backbone
from histoscale.evaluate.comparison import evaluate_run
from histoscale.evaluate.networks import find_network
from histoscale.export.about import without_paths
from histoscale.export.marker import CARD, MARKER, WEIGHTS
from histoscale.export.run import ExportRequest, export_run
from histoscale.slides.synthetic import make_labelled_tiles
from histoscale.storage import open_store

pytestmark = pytest.mark.usefixtures("process_group")
PLAN = EvaluationPlan.parse("knn", "both", 1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def labelled(tmp_path: Path) -> str:
    make_labelled_tiles(tmp_path / "tissues", per_class=6, side_px=28)
    return str(tmp_path / "tissues")


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[Path]:
    """An export whose files are imported as a user of it imports them; other modules of these names go away."""
    exported(tmp_path, tiny_recipe())
    names = ("vit", "use_with_trident", "use_with_eva")
    paths = list(sys.path)
    sys.path.insert(0, str(tmp_path / "out"))
    yield tmp_path / "out"
    sys.path[:] = paths
    for name in names:
        sys.modules.pop(name, None)


def a_module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
    vars(sys.modules[name]).update(content)


class FakeEncoder(torch.nn.Module):
    """A fake with the constructor and the forward of TRIDENT's CustomInferenceEncoder."""

    def __init__(self, enc_name: str, model: torch.nn.Module, transforms: Any, precision: torch.dtype) -> None:
        super().__init__()
        self.enc_name, self.model, self.eval_transforms, self.precision = enc_name, model, transforms, precision

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


def test_the_file_for_trident_gives_its_encoder(monkeypatch: pytest.MonkeyPatch, beside: Path) -> None:
    a_module(monkeypatch, "trident.patch_encoder_models", CustomInferenceEncoder=FakeEncoder)
    encoder = importlib.import_module("use_with_trident").encoder("mine", torch.bfloat16)
    assert (encoder.enc_name, encoder.precision) == ("mine", torch.bfloat16)
    tile = Image.fromarray(np.full((50, 40, 3), 200, np.uint8))
    image = pickle.loads(pickle.dumps(encoder.eval_transforms))(tile)
    vit = importlib.import_module("vit")
    assert torch.equal(encoder(image[None]), vit.Vit(beside).embed(image[None]))
    assert encoder(image[None]).shape == (1, 64)


class FakeRegistry:
    """A fake of eva's registry: `register` is a decorator."""

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}

    def register(self, name: str) -> Any:
        return lambda function: self.entries.setdefault(name, function)


def test_the_files_for_eva_give_its_backbone(monkeypatch: pytest.MonkeyPatch, beside: Path) -> None:
    registry = FakeRegistry()
    a_module(monkeypatch, "eva.vision.models.networks.backbones.registry", backbone_registry=registry)
    settings = yaml.safe_load((beside / "eva.yaml").read_text())
    given = settings["backbone"]["init_args"]
    module, _, function = given["path"].rpartition(".")
    use = importlib.import_module(module)
    backbone = getattr(use, function)(**given["arguments"])
    side_px = settings["transforms"]["init_args"]["size"]
    images = torch.randn(2, 3, side_px, side_px)
    assert backbone(images).shape == (2, settings["head"]["init_args"]["in_features"])
    assert torch.equal(use.embedding(with_patch_mean=False)(images), backbone(images)[:, :32])
    use.register()
    assert registry.entries == {"histoscale/export": use.embedding}
    with pytest.raises(ValueError, match="feature maps of blocks are not given"):
        use.embedding(out_indices=1)


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
def test_an_export_is_a_network_to_evaluate(tmp_path: Path, layout: str) -> None:
    recipe = tiny_recipe()
    result = exported(tmp_path, recipe, layout)
    found = find_network(str(tmp_path / "out"))
    of_run, _ = trained_backbone(open_store(tmp_path / "run"), recipe)
    assert (found.name, found.step, found.images_seen, found.image_px) == ("out", 2, 8, 28)
    assert found.fingerprint == f"sha256:{result.marker.sha256[WEIGHTS]}"
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(found.backbone(images), of_run(images))


def test_the_card_tells_what_was_evaluated_and_at_which_step(tmp_path: Path, labelled: str) -> None:
    recipe = tiny_recipe()
    store = committed_run(tmp_path / "run", recipe, step=1)
    report = evaluate_run(store, recipe, labelled, torch.device("cpu"), PLAN)
    store = committed_run(tmp_path / "run", recipe, step=2)
    export_run(store, recipe, ExportRequest(str(tmp_path / "out")))
    card = (tmp_path / "out" / CARD).read_text()
    figure = report.figure("pretrained", "knn")
    low, high = (100 * bound for bound in figure.interval)
    assert f"| tissues | 1 | knn | both | {100 * figure.mean:.1f} [{low:.1f}, {high:.1f}] | 16.7 |" in card
    assert "Those of another step than 2 are of an earlier checkpoint" in card
    assert "How much the embedding tells of the center was not measured" in card


def with_places(tmp_path: Path) -> Recipe:
    values = tiny_recipe().model_dump(mode="json")
    values["model"]["weights"] = "/hospital/ward 7/dinov2.safetensors"
    values["evaluation"]["datasets"] = ["s3://hospital/labelled"]
    return decode_recipe(values)


@pytest.mark.parametrize("licence", [None, "CC-BY-NC-4.0"])
def test_the_card_names_origins_and_licence_and_no_place(tmp_path: Path, licence: str | None) -> None:
    recipe = with_places(tmp_path)
    store = committed_run(tmp_path / "run", recipe)
    lines = [
        "weights: /hospital/ward 7/dinov2.safetensors in meta's layout, sha256:abc",
        "forked from s3://hospital/runs/first at step 3, f@3:00000000",
    ]
    store.put("origins.json", json.dumps(lines).encode())
    store.put("index.json", json.dumps({"index": str(tmp_path / "gone"), "snapshot_id": "feed"}).encode())
    export_run(store, recipe, ExportRequest(str(tmp_path / "out"), licence=licence))
    text = "".join((tmp_path / "out" / name).read_text() for name in (CARD, "LICENSE", MARKER, "parity.json"))
    assert "hospital" not in text
    assert "ward" not in text
    assert str(tmp_path) not in text
    assert "- weights: dinov2.safetensors in meta's layout, sha256:abc" in text
    assert "forked from first at step 3" in text
    card = (tmp_path / "out" / CARD).read_text()
    assert ("None was stated" in card) == (licence is None)
    front = yaml.safe_load(re.split(r"^---$", card, flags=re.MULTILINE)[1])
    assert front.get("license_name") == licence
    assert "unknown: the index could not be read" in card
    assert "index snapshot | `feed`" in card


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("weights: /w/dinov2.pth in meta's layout", "weights: dinov2.pth in meta's layout"),
        ("teacher: heads of a at step 3 of s3://b/c/run, x", "teacher: heads of a at step 3 of run, x"),
        ("licence: CC-BY/4.0, and/or none", "licence: CC-BY/4.0, and/or none"),
        ("https://host/", "host"),
    ],
)
def test_places_become_their_last_name(line: str, told: str) -> None:
    assert without_paths(line) == told
