"""An export equals other implementations, loads by the text of its card, and never overwrites something else."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.exporting import committed_run, exported, teacher_of, tiny_recipe

from histoscale.config.archs import ARCHS
from histoscale.errors import CheckpointError, ExportError, ModelError
from histoscale.evaluate.backbone import initial_backbone, trained_backbone
from histoscale.export import marker as marker_module
from histoscale.export import parity as parity_module
from histoscale.export.exported import load_export, read_export
from histoscale.export.huggingface_layout import load_in_transformers
from histoscale.export.marker import CARD, CONFIG, MARKER, PENDING, WEIGHTS
from histoscale.export.parity import MAX_DIFFERENCE, PLAIN, compare, images_of, implementations_of, is_usable, prove
from histoscale.export.run import ExportRequest, export_run
from histoscale.export.shipped.vit import Vit
from histoscale.export.tiles import procedural_tiles, tiles_of_folder
from histoscale.export.timm_import import import_timm
from histoscale.export.timm_layout import load_in_timm, timm_model
from histoscale.models import VisionTransformer
from histoscale.storage import open_store
from histoscale.storage.local import LocalStore

needs_timm = pytest.mark.skipif(not is_usable("timm"), reason="timm does not import here")
needs_transformers = pytest.mark.skipif(not is_usable("transformers"), reason="transformers does not import here")
LAYOUTS = [pytest.param("timm", marks=needs_timm), pytest.param("huggingface", marks=needs_transformers)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


pytestmark = pytest.mark.usefixtures("process_group")


def thin(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An arch of the same parts, an eighth as wide and two blocks deep."""
    large = ARCHS[name]
    mlp_width = None if large.mlp_width is None else large.mlp_width // 8
    monkeypatch.setitem(ARCHS, name, replace(large, depth=2, width=large.width // 8, heads=4, mlp_width=mlp_width))


def test_trained_backbone_is_the_teacher_of_the_newest_commit(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    store = committed_run(tmp_path, recipe)
    backbone, commit = trained_backbone(store, recipe)
    expected = teacher_of(recipe).backbone.state_dict()
    assert (commit.step, commit.images_seen) == (2, 8)
    assert not backbone.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone.state_dict().items())


def test_trained_backbone_of_another_recipe_is_refused(tmp_path: Path) -> None:
    store = committed_run(tmp_path, tiny_recipe())
    for step in (None, 2):
        with pytest.raises(CheckpointError, match="recipe"):
            trained_backbone(store, tiny_recipe(seed=1), step)


def test_the_step_that_is_asked_for_is_exported_or_named_as_absent(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    for step in (1, 2):
        store = committed_run(tmp_path / "run", recipe, step)
    result = export_run(store, recipe, ExportRequest(str(tmp_path / "out"), step=1))
    assert result.marker.step == 1
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 \(got 'checkpoints of steps 1, 2'"):
        export_run(store, recipe, ExportRequest(str(tmp_path / "other"), step=7))
    assert not (tmp_path / "other" / MARKER).exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("arch", "qk_norm"),
    [
        *(
            (name, False)
            for name in ("vit_test14", "vit_micro14", "vit_ti14", "vit_ti16", "vit_s14_reg4", "vit_h14_reg4")
        ),
        *((name, False) for name in ("vit_giant14", "vit_gigantic14_reg8")),
        ("vit_test14", True),
    ],
)
def test_every_implementation_equals_ours_on_all_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, arch: str, qk_norm: bool
) -> None:
    if layout == "huggingface" and (qk_norm or arch == "vit_gigantic14_reg8"):
        pytest.skip("refused: see below")
    if ARCHS[arch].width > 192:
        thin(monkeypatch, arch)
    recipe = tiny_recipe(arch, qk_norm=qk_norm, patches=3)
    result = exported(tmp_path, recipe, layout)
    rows = result.parity.rows
    library = "timm" if layout == "timm" else "transformers"
    assert {row.implementation.split()[0] for row in rows} == {library, PLAIN.split()[0]}
    assert {row.precision for row in rows} == {"fp32", "bf16"}
    patch_px = ARCHS[arch].patch_px
    assert {row.image_px for row in rows} == {3 * patch_px, 5 * patch_px}
    registers = {"register"} if ARCHS[arch].registers else set()
    assert {row.tokens for row in rows} == {"class", "patch"} | registers
    # These weights are so large that twelve blocks make 4e-5 of rounding; the fp64 below leaves no room for more.
    assert all(row.relative <= 1e-4 for row in rows if row.precision == "fp32")
    assert all(row.cosine > 0.999999 for row in rows if row.precision == "fp32")
    # Rounding shows in bf16, so the networks were really cast.
    assert max(row.largest for row in rows if row.precision == "bf16") > 1e-3
    ours, export = load_export(open_store(tmp_path / "out"))
    assert result.parameters == sum(parameter.numel() for parameter in ours.parameters())
    images = torch.randn(2, 3, 2 * patch_px, 3 * patch_px)
    wanted, _ = trained_backbone(open_store(tmp_path / "run"), recipe)
    with torch.inference_mode():
        assert torch.allclose(ours(images), wanted(images), atol=1e-4, rtol=1e-4)
        exact = wanted.double()(images.double())
        for other in implementations_of(tmp_path / "out", layout)[0].values():
            assert ((other.double()(images.double()) - exact).abs().max() / exact.abs().max()) <= 1e-6
    assert export.marker == result.marker


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
def test_parity_sees_one_changed_weight(tmp_path: Path, layout: str) -> None:
    recipe = tiny_recipe()
    exported(tmp_path, recipe, layout)
    backbone, _ = trained_backbone(open_store(tmp_path / "run"), recipe)
    weights = load_file(tmp_path / "out" / WEIGHTS)
    name = "blocks.1.mlp.fc2.bias" if layout == "timm" else "encoder.layer.1.mlp.fc2.bias"
    for value in (0.1, float("nan")):
        weights[name][3] += value
        save_file(weights, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
        others, _ = implementations_of(tmp_path / "out", layout)
        images = images_of(procedural_tiles(28, "a test").tiles, 28)
        assert not any(row.largest < 0.01 for row in compare(backbone, others, images) if row.tokens == "class")
        with pytest.raises(ExportError, match="computes something else than the network that was trained"):
            prove(tmp_path / "out", layout, backbone, 28, procedural_tiles(28, "a test"))


def test_nothing_is_written_where_an_implementation_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_module, "MAX_DIFFERENCE", 0.0)
    with pytest.raises(ExportError, match="expected a difference of tokens of at most 0"):
        exported(tmp_path, tiny_recipe())
    assert not list((tmp_path / "out").glob("*"))


@needs_timm
@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_arch_has_the_shapes_of_the_timm_model_it_names(qk_norm: bool) -> None:
    timm = import_timm()
    for name, arch in ARCHS.items():
        timm_name, arguments = timm_model(arch, 28, qk_norm)
        if "mlp_layer" in arguments:
            arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
        with torch.device("meta"):
            theirs = timm.create_model(timm_name, pretrained=False, **arguments | {"img_size": 2 * arch.patch_px})
            ours = VisionTransformer(arch, 2 * arch.patch_px, qk_norm=qk_norm).state_dict()
        assert {key: tensor.shape for key, tensor in theirs.state_dict().items()} == {
            key: tensor.shape for key, tensor in ours.items()
        }, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", ["vit_test14", "vit_h14"])
def test_the_code_of_the_card_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, layout: str
) -> None:
    monkeypatch.setitem(ARCHS, arch, replace(ARCHS[arch], depth=2, width=32, heads=2))
    exported(tmp_path, tiny_recipe(arch), layout)
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / CARD).read_text(), re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        program = (
            "from histoscale.export.timm_import import name_operators_of_torchvision\nname_operators_of_torchvision()\n"
            + code
            + "\nprint(tuple(embedding.shape))"
        )
        ran = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path / "out", capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip() == "(1, 64)"


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
def test_export_works_without_the_library_and_says_what_was_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(parity_module, "is_usable", lambda library: False)
    result = exported(tmp_path, tiny_recipe(), layout)
    assert {row.implementation for row in result.parity.rows} == {PLAIN}
    library = "timm" if layout == "timm" else "transformers"
    assert f"{library} does not import here" in (tmp_path / "out" / CARD).read_text()
    assert any("was not compared" in line for line in result.parity.lines())


@pytest.mark.parametrize(("load", "name"), [(load_in_timm, "timm"), (load_in_transformers, "transformers")])
def test_a_missing_library_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=f"{name} is not installed"):
        load(tmp_path)


def test_the_marker_names_the_model_and_the_checksum_of_every_file(tmp_path: Path) -> None:
    recipe, out = tiny_recipe(), tmp_path / "out"
    result = exported(tmp_path, recipe, licence="CC-BY-4.0")
    marker = json.loads((out / MARKER).read_text())
    assert (marker["format"], marker["step"], marker["images_seen"], marker["licence"]) == (2, 2, 8, "CC-BY-4.0")
    assert set(marker["sha256"]) == {path.name for path in out.iterdir()} - {MARKER}
    for name, sha256 in marker["sha256"].items():
        assert sha256 == hashlib.sha256((out / name).read_bytes()).hexdigest()
    assert json.loads((out / "parity.json").read_text())["rows"][0]["precision"] == "fp32"
    assert result.marker.version == f"{marker['recipe']}@2-{marker['sha256'][WEIGHTS][:12]}"
    assert f"`{result.marker.version}`" in (out / CARD).read_text()


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no such export format \(got 'onnx'; expected timm or huggingface\)"):
        export_run(open_store(tmp_path), tiny_recipe(), ExportRequest(str(tmp_path / "out"), "onnx"))


def test_a_later_export_takes_the_place_of_one_of_the_same_model(tmp_path: Path) -> None:
    recipe, request = tiny_recipe(), ExportRequest(str(tmp_path / "out"))
    for step in (1, 2):
        export_run(committed_run(tmp_path / "run", recipe, step), recipe, request)
    assert read_export(open_store(tmp_path / "out")).marker.step == 2


@pytest.mark.parametrize("changed", [{"seed": 1}, {"layout": "huggingface"}])
def test_the_export_of_another_model_is_left_alone(tmp_path: Path, changed: dict[str, Any]) -> None:
    exported(tmp_path, tiny_recipe())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    recipe = tiny_recipe(seed=changed.get("seed", 0))
    store = committed_run(tmp_path / "second", recipe)
    with pytest.raises(ExportError, match="holds the export of another model"):
        export_run(store, recipe, ExportRequest(str(tmp_path / "out"), changed.get("layout", "timm")))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "years of work"},
        {CONFIG: '{"architecture": "resnet50"}', WEIGHTS: "theirs"},
        {MARKER: "no JSON"},
        {MARKER: "5"},
        {MARKER: '{"format": 1}'},
        {WEIGHTS: "theirs"},
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    recipe = tiny_recipe()
    store = committed_run(tmp_path / "run", recipe)
    (tmp_path / "out").mkdir()
    for name, text in files.items():
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(ExportError, match="holds something else"):
        export_run(store, recipe, ExportRequest(str(tmp_path / "out")))
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == files


def test_a_file_of_somebody_in_an_export_is_left_alone(tmp_path: Path) -> None:
    exported(tmp_path, tiny_recipe())
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match=r"something else than an export \(got 'thesis.txt'"):
        export_run(open_store(tmp_path / "run"), tiny_recipe(), ExportRequest(str(tmp_path / "out")))


@pytest.mark.parametrize("already", [False, True])
def test_an_interrupted_export_is_none_and_the_same_command_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, already: bool
) -> None:
    recipe, out = tiny_recipe(), open_store(tmp_path / "out")
    if already:
        exported(tmp_path, recipe)
    upload = LocalStore.upload

    def torn(store: LocalStore, path: Path, key: str) -> None:
        if key == WEIGHTS:
            raise KeyboardInterrupt
        upload(store, path, key)

    monkeypatch.setattr(LocalStore, "upload", torn)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path, recipe)
    monkeypatch.setattr(LocalStore, "upload", upload)
    with pytest.raises(ModelError, match="is no export of ours"):
        read_export(out)
    other = tiny_recipe(seed=1)
    with pytest.raises(ExportError, match="another model"):
        export_run(committed_run(tmp_path / "second", other), other, ExportRequest(out.uri))
    exported(tmp_path, recipe)
    assert load_export(out)[1].marker.step == 2
    assert not (tmp_path / "out" / PENDING).exists()
    assert marker_module.read_marker(out) is not None


@pytest.mark.parametrize("layout", ["timm", "huggingface"])
@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape", "outside"])
def test_a_tensor_that_does_not_fit_is_named_by_every_loader(tmp_path: Path, layout: str, damage: str) -> None:
    exported(tmp_path, tiny_recipe(), layout)
    weights, name = load_file(tmp_path / "out" / WEIGHTS), "norm.bias" if layout == "timm" else "layernorm.bias"
    if damage == "missing":
        del weights[name]
    elif damage == "shape":
        weights[name] = weights[name][:5].clone()
    else:
        weights["head.weight" if damage == "outside" else "blocks.7.surplus"] = torch.zeros(3)
    save_file(weights, tmp_path / "out" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tensors of model\.safetensors do not fit"):
        Vit(tmp_path / "out")
    with pytest.raises(ModelError, match=r"norm\.bias|blocks\.7\.surplus|head\.weight"):
        load_export(open_store(tmp_path / "out"))
    if is_usable("transformers" if layout == "huggingface" else "timm"):
        backbone, _ = trained_backbone(open_store(tmp_path / "run"), tiny_recipe())
        with pytest.raises(ExportError, match="does not load"):
            prove(tmp_path / "out", layout, backbone, 28, procedural_tiles(28, "a test"))


def test_weights_that_were_exchanged_are_refused(tmp_path: Path) -> None:
    exported(tmp_path, tiny_recipe())
    weights = load_file(tmp_path / "out" / WEIGHTS)
    weights["norm.bias"] += 1.0
    save_file(weights, tmp_path / "out" / WEIGHTS)
    with pytest.raises(ModelError, match="are not those of the export"):
        load_export(open_store(tmp_path / "out"))


def test_the_tiles_of_a_folder_are_what_is_compared(tmp_path: Path, shared_data: Path) -> None:
    data = shared_data / "tiles"
    shown = tiles_of_folder(open_store(data))
    assert len(shown.tiles) == 16
    assert str(data) not in shown.source
    recipe = tiny_recipe()
    store = committed_run(tmp_path / "run", recipe)
    result = export_run(store, recipe, ExportRequest(str(tmp_path / "out")), lambda commit: shown)
    assert f"16 tiles: {shown.source}" in (tmp_path / "out" / CARD).read_text()
    assert result.parity.largest < MAX_DIFFERENCE
    assert images_of(shown.tiles, 28).shape == (16, 3, 28, 28)


@pytest.mark.parametrize(("content", "message"), [(None, "there are no tiles"), (b"no image", "cannot be decoded")])
def test_folders_without_tiles_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ExportError, match=message):
        tiles_of_folder(open_store(tmp_path))


def test_initial_backbone_is_not_what_is_exported(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    exported(tmp_path, recipe)
    weights, initial = load_file(tmp_path / "out" / WEIGHTS), initial_backbone(recipe).state_dict()
    assert weights.keys() == initial.keys()
    assert not any(torch.equal(weights[name], initial[name]) for name in initial)


def test_the_shipped_code_needs_nothing_of_ours(tmp_path: Path) -> None:
    exported(tmp_path, tiny_recipe())
    program = "import sys; sys.modules['histoscale'] = None; from vit import Vit; print(Vit('.').depth)"
    paths = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "out", capture_output=True, text=True, check=True, env=paths
    )
    assert ran.stdout.strip() == "2"
