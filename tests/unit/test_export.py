"""An export equals timm's own model, loads by the text of its card, and never overwrites something else."""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from histoscale.checkpoint.fragments import EMA, MASTER, Fragment
from histoscale.checkpoint.writer import Snapshot, write_checkpoint
from histoscale.config.archs import ARCHS
from histoscale.config.decode import decode_recipe, fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import CheckpointError, ExportError
from histoscale.evaluate.backbone import initial_backbone, trained_backbone
from histoscale.export import timm_layout
from histoscale.export.timm_import import import_timm
from histoscale.export.timm_layout import (
    CARD,
    CONFIG,
    MAX_DIFFERENCE,
    WEIGHTS,
    export_run,
    load_in_timm,
    parity,
    require_equal,
    timm_is_usable,
    timm_model,
)
from histoscale.models import SSLNet, VisionTransformer, build_ssl_net
from histoscale.storage import Store, open_store

ROOT = Path(__file__).parents[2]
needs_timm = pytest.mark.skipif(not timm_is_usable(), reason="timm does not import here")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


pytestmark = pytest.mark.usefixtures("process_group")


def tiny_recipe(arch: str = "vit_test14", seed: int = 0, qk_norm: bool = False) -> Recipe:
    patch_px = ARCHS[arch].patch_px
    return decode_recipe(
        {
            "seed": seed,
            "data": {"region_px": 64},
            "batch": {"tiles": 4, "replicas": 2},
            "model": {"arch": arch, "drop_path": 0.1, "qk_norm": qk_norm},
            "heads": {"dino_prototypes": 8, "ibot_prototypes": 8, "hidden_dim": 8},
            "crops": {"global_px": 2 * patch_px, "local_px": patch_px},
            "schedule": {"images": 8},
        }
    )


def teacher_of(recipe: Recipe) -> SSLNet:
    """A net whose every parameter is far from its initial value."""
    net = build_ssl_net(recipe)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return net


def committed_run(folder: Path, recipe: Recipe, step: int = 2) -> Store:
    """A run with a real commit in which the student differs from the teacher."""
    teacher = dict(teacher_of(recipe).named_parameters())
    fragments = {
        name: Fragment(
            0,
            tensor.numel(),
            tuple(tensor.shape),
            {
                MASTER: torch.zeros(tensor.numel()),
                "exp_avg": torch.zeros(tensor.numel()),
                "exp_avg_sq": torch.zeros(tensor.numel()),
                EMA: tensor.detach().flatten(),
            },
        )
        for name, tensor in teacher.items()
    }
    snapshot = Snapshot(
        step=step,
        images_seen=step * recipe.batch.tiles,
        fingerprint=fingerprint(recipe),
        fragments=fragments,
        shapes={name: tuple(tensor.shape) for name, tensor in teacher.items()},
        records=[],
        written_by={},
    )
    store = open_store(folder)
    write_checkpoint(store, snapshot, keep_last=2)
    return store


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
    with pytest.raises(CheckpointError, match="recipe"):
        trained_backbone(store, tiny_recipe(seed=1))


@needs_timm
@pytest.mark.parametrize(
    ("arch", "qk_norm"),
    [("vit_test14", False), ("vit_micro14", False), ("vit_ti14", False), ("vit_ti16", False), ("vit_test14", True)],
)
def test_export_equals_timm_on_all_tokens(tmp_path: Path, arch: str, qk_norm: bool) -> None:
    recipe = tiny_recipe(arch, qk_norm=qk_norm)
    result = export_run(committed_run(tmp_path / "run", recipe), recipe, str(tmp_path / "out"))
    assert result.step == 2
    assert result.difference is not None
    assert result.difference <= 1e-5
    assert result.parameters == sum(tensor.numel() for tensor in load_file(tmp_path / "out" / WEIGHTS).values())


@needs_timm
def test_parity_sees_one_changed_weight(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    store = committed_run(tmp_path / "run", recipe)
    export_run(store, recipe, str(tmp_path / "out"))
    backbone, _ = trained_backbone(store, recipe)
    weights = load_file(tmp_path / "out" / WEIGHTS)
    weights["blocks.1.mlp.fc2.bias"][3] += 0.1
    save_file(weights, tmp_path / "out" / WEIGHTS)
    difference = parity(tmp_path / "out", backbone, 28)
    assert difference > MAX_DIFFERENCE
    with pytest.raises(ExportError, match="something else than ours"):
        require_equal(difference)
    with pytest.raises(ExportError, match="something else than ours"):
        require_equal(float("nan"))


@needs_timm
@pytest.mark.parametrize("arch", ["vit_h14_reg4", "vit_giant14", "vit_gigantic14_reg8"])
def test_swiglu_export_equals_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    large = ARCHS[arch]
    mlp_width = None if large.mlp_width is None else large.mlp_width // 8
    monkeypatch.setitem(ARCHS, arch, replace(large, depth=2, width=large.width // 8, heads=4, mlp_width=mlp_width))
    recipe = tiny_recipe(arch)
    result = export_run(committed_run(tmp_path / "run", recipe), recipe, str(tmp_path / "out"))
    assert result.difference is not None
    assert result.difference <= 1e-5
    assert "mlp_layer=timm.layers.SwiGLUPacked" in (tmp_path / "out" / CARD).read_text()


@needs_timm
@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_arch_has_the_shapes_of_the_timm_model_it_names(qk_norm: bool) -> None:
    timm = import_timm()
    for name, arch in ARCHS.items():
        timm_name, arguments = timm_model(tiny_recipe(name, qk_norm=qk_norm))
        if "mlp_layer" in arguments:
            arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
        with torch.device("meta"):
            theirs = timm.create_model(timm_name, pretrained=False, **arguments).state_dict()
            ours = VisionTransformer(arch, 2 * arch.patch_px, qk_norm=qk_norm).state_dict()
        assert {key: tensor.shape for key, tensor in theirs.items()} == {
            key: tensor.shape for key, tensor in ours.items()
        }, name


@needs_timm
@pytest.mark.parametrize("arch", ["vit_test14", "vit_h14"])
def test_the_code_of_the_card_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    monkeypatch.setitem(ARCHS, arch, replace(ARCHS[arch], depth=2, width=32, heads=2))
    recipe = tiny_recipe(arch)
    export_run(committed_run(tmp_path / "run", recipe), recipe, str(tmp_path / "out"))
    card = (tmp_path / "out" / CARD).read_text()
    assert fingerprint(recipe) in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    program = (
        "from histoscale.export.timm_import import import_timm\nimport_timm()\n"
        + code[1]
        + "\nprint(tuple(embedding.shape))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "(1, 64)"


def test_export_works_without_timm_and_says_that_nothing_was_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ExportError("timm is not installed")

    monkeypatch.setattr(timm_layout, "import_timm", missing)
    recipe = tiny_recipe()
    result = export_run(committed_run(tmp_path / "run", recipe), recipe, str(tmp_path / "out"))
    assert result.difference is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([WEIGHTS, CONFIG, CARD])
    with pytest.raises(ExportError, match="not installed"):
        load_in_timm(tmp_path / "out")


def test_config_names_recipe_and_step_and_the_checksum_of_the_weights(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    export_run(committed_run(tmp_path / "run", recipe), recipe, str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    ours = config["histoscale"]
    assert (ours["recipe"], ours["step"], ours["images_seen"]) == (fingerprint(recipe), 2, 8)
    assert ours["sha256"][WEIGHTS] == hashlib.sha256((tmp_path / "out" / WEIGHTS).read_bytes()).hexdigest()
    assert config["pretrained_cfg"]["input_size"] == [3, 28, 28]


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no such export format \(got 'onnx'; expected timm\)"):
        export_run(open_store(tmp_path), tiny_recipe(), str(tmp_path / "out"), "onnx")


def test_an_export_is_overwritten_by_a_later_one(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    export_run(committed_run(tmp_path / "run", recipe, step=1), recipe, str(tmp_path / "out"))
    export_run(committed_run(tmp_path / "run", recipe, step=2), recipe, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["histoscale"]["step"] == 2


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "years of work"},
        {CONFIG: '{"architecture": "resnet50"}', WEIGHTS: "theirs"},
        {CONFIG: "no JSON"},
        {CONFIG: "5"},
        {WEIGHTS: "theirs"},
        {CONFIG: '{"histoscale": {}}', "thesis.txt": "years of work"},
    ],
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, files: dict[str, str]) -> None:
    recipe = tiny_recipe()
    store = committed_run(tmp_path / "run", recipe)
    (tmp_path / "out").mkdir()
    for name, text in files.items():
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(ExportError, match="holds something else"):
        export_run(store, recipe, str(tmp_path / "out"))
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == files


def test_the_card_and_the_configuration_tell_what_the_run_learnt_from(tmp_path: Path) -> None:
    recipe, origin = tiny_recipe(), "weights: /w/dinov2.pth in meta's layout, sha256:abc"
    export_run(committed_run(tmp_path / "run", recipe), recipe, str(tmp_path / "out"), origins=[origin])
    assert f"\n| learnt from | {origin} |\n| input |" in (tmp_path / "out" / CARD).read_text()
    ours = json.loads((tmp_path / "out" / CONFIG).read_text())["histoscale"]
    assert (ours["origins"], ours["teacher"]) == ([origin], None)


def test_initial_backbone_is_not_what_is_exported(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    export_run(committed_run(tmp_path / "run", recipe), recipe, str(tmp_path / "out"))
    exported, initial = load_file(tmp_path / "out" / WEIGHTS), initial_backbone(recipe).state_dict()
    assert exported.keys() == initial.keys()
    assert not any(torch.equal(exported[name], initial[name]) for name in initial)
