"""The Hugging Face layout against transformers: names, sizes, images of other sizes, and what prepares an image."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.unit.exporting import exported, tiny_recipe

from histoscale.config.archs import ARCHS
from histoscale.errors import ExportError
from histoscale.export.huggingface_layout import huggingface_files, load_in_transformers, require_huggingface_fit
from histoscale.export.marker import CONFIG, WEIGHTS, Marker
from histoscale.export.parity import images_of, is_usable
from histoscale.export.shipped.vit import Vit, preprocess
from histoscale.models import VisionTransformer
from histoscale.models.huggingface import from_huggingface, to_huggingface
from histoscale.models.published import load_published, resample_positions

pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.skipif(not is_usable("transformers"), reason="transformers does not import here"),
]
FITTING = [name for name in ARCHS if name != "vit_gigantic14_reg8"]


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


def marker(arch: str, image_px: int = 224) -> Marker:
    return Marker("huggingface", arch, image_px, False, "r", "s", 1, 4, None, None, (), {})


@pytest.mark.parametrize("name", FITTING)
def test_every_arch_has_the_names_and_shapes_of_transformers(name: str) -> None:
    import transformers

    arch = replace(ARCHS[name], depth=2)
    config = json.loads(huggingface_files(arch, marker(name))[CONFIG])
    with torch.device("meta"):
        theirs = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**config))
    ours = to_huggingface(dict(VisionTransformer(arch, 224).state_dict()), gated=arch.ffn == "swiglu")
    assert sum(t.numel() for t in ours.values()) == sum(p.numel() for p in theirs.parameters())
    assert config["image_size"] == 224


@pytest.mark.parametrize("name", FITTING)
def test_the_names_lead_back_to_the_same_network(name: str) -> None:
    arch = replace(ARCHS[name], depth=2, width=32, heads=2, mlp_width=None)
    backbone = VisionTransformer(arch, 5 * arch.patch_px)
    draw = torch.Generator().manual_seed(1)
    state = {key: torch.randn(tensor.shape, generator=draw) for key, tensor in backbone.state_dict().items()}
    back = from_huggingface(to_huggingface(state, arch.ffn == "swiglu"), arch.layer_scale is not None)
    at = state["pos_embed"]
    expected = dict(state) | {"pos_embed": torch.cat([at[:, :1], at[:, 1 + arch.registers :]], dim=1)}
    if arch.registers:
        expected["reg_token"] = state["reg_token"] + at[:, 1 : 1 + arch.registers]
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)


def test_factors_that_are_not_one_are_kept_where_ours_has_no_layer_scale(tmp_path: Path) -> None:
    exported(tmp_path, tiny_recipe("vit_micro14", patches=3), "huggingface")
    weights = load_file(tmp_path / "out" / WEIGHTS)
    weights["encoder.layer.1.layer_scale1.lambda1"][3] = 0.5
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(Exception, match=r"no place for the tensor blocks\.1\.ls1\.gamma"):
        load_published(str(tmp_path / "w.safetensors"), ARCHS["vit_micro14"], 42)


@pytest.mark.parametrize("arch", ["vit_test14", "vit_micro14"])
@pytest.mark.parametrize("shape_px", [(42, 42), (28, 56), (70, 98), (28, 63)])
def test_images_of_any_size_give_the_same_tokens(tmp_path: Path, arch: str, shape_px: tuple[int, int]) -> None:
    exported(tmp_path, tiny_recipe(arch, patches=3), "huggingface")
    state = load_published(str(tmp_path / "out" / WEIGHTS), ARCHS[arch], 42).state
    ours = VisionTransformer(ARCHS[arch], 42).eval()
    ours.load_state_dict(state)
    images = torch.randn(2, 3, shape_px[0], shape_px[1] // 14 * 14)
    with torch.inference_mode():
        wanted = ours(images)
        for other in (load_in_transformers(tmp_path / "out"), Vit(tmp_path / "out")):
            assert ((other(images) - wanted).abs().max() / wanted.abs().max()) <= 1e-5


def test_the_model_without_registers_would_resample_positions_otherwise(tmp_path: Path) -> None:
    """Why an arch without registers is exported for the model with registers, zero of them."""
    import transformers

    exported(tmp_path, tiny_recipe("vit_micro14", patches=4), "huggingface")
    out = tmp_path / "out"
    weights = load_file(out / WEIGHTS)
    del weights["embeddings.register_tokens"]
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    ours = load_in_transformers_as(out, "dinov2", transformers)
    state = load_published(str(out / WEIGHTS), ARCHS["vit_micro14"], 56).state
    backbone = VisionTransformer(ARCHS["vit_micro14"], 56).eval()
    backbone.load_state_dict(state)
    with torch.inference_mode():
        for side_px, same in ((56, True), (28, False)):
            images = torch.randn(1, 3, side_px, side_px)
            difference = (ours(pixel_values=images).last_hidden_state - backbone(images)).abs().max()
            assert (difference <= 1e-4) == same, (side_px, difference)


def test_positions_with_metas_offset_are_others() -> None:
    """Why weights of Meta's code without registers give other tokens at other sizes: scales are not exact there."""
    rows = torch.randn(1, 1 + 16, 8, generator=torch.Generator().manual_seed(3))
    exact = resample_positions(rows, 1, 4, 7)[:, 1:]
    plane = rows[:, 1:].transpose(1, 2).reshape(1, 8, 4, 4)
    for offset, same in ((0.0, True), (0.1, False)):
        scale = (7 + offset) / 4
        resampled = F.interpolate(plane, scale_factor=(scale, scale), mode="bicubic", antialias=True)
        assert ((resampled.flatten(2).transpose(1, 2) - exact).abs().max() <= 1e-5) == same


def load_in_transformers_as(folder: Path, model_type: str, transformers: object) -> torch.nn.Module:
    config = json.loads((folder / CONFIG).read_text()) | {"model_type": model_type, "architectures": ["Dinov2Model"]}
    (folder / CONFIG).write_text(json.dumps(config))
    model = transformers.Dinov2Model.from_pretrained(folder)  # type: ignore[attr-defined]
    return model.eval()


@pytest.mark.parametrize("shape_px", [(80, 80), (42, 42), (120, 90), (30, 31)])
def test_every_preprocessing_is_that_of_our_evaluation(tmp_path: Path, shape_px: tuple[int, int]) -> None:
    import transformers

    exported(tmp_path, tiny_recipe(patches=3), "huggingface")
    tile = np.asarray(Image.effect_noise(shape_px[::-1], 90).convert("RGB"))
    wanted = images_of([tile], 42)[0]
    assert torch.equal(preprocess(Vit(tmp_path / "out"), Image.fromarray(tile)), wanted)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    got = processor(Image.fromarray(tile), return_tensors="pt")["pixel_values"][0]
    assert got.shape == wanted.shape
    if shape_px[0] == shape_px[1]:  # it crops what was resized, we resize what was cropped
        assert (got - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("arch", "qk_norm", "message"),
    [
        ("vit_test14", True, r"vit_test14 with norms of queries and keys"),
        ("vit_gigantic14_reg8", False, r"an MLP of width 5464, which no whole mlp_ratio gives at width 1664"),
        ("vit_gigantic14_reg8", True, r"queries and keys \(model.qk_norm\) and an MLP of width"),
    ],
)
def test_what_does_not_fit_is_named(arch: str, qk_norm: bool, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        require_huggingface_fit(arch, qk_norm)


def test_a_backbone_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot hold this backbone"):
        exported(tmp_path, tiny_recipe(qk_norm=True), "huggingface")
    assert not (tmp_path / "out").exists()
