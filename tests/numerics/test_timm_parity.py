"""The backbone against timm, with timm's own weights."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch

from histoscale.config.archs import ARCHS, Arch
from histoscale.errors import ExportError
from histoscale.export.timm_import import import_timm
from histoscale.models import VisionTransformer

S_FEW = replace(ARCHS["vit_s14"], depth=2)
S_REGISTERS = replace(ARCHS["vit_s14_reg4"], depth=2, layer_scale=0.5)
B_FEW = replace(ARCHS["vit_b14_reg4"], depth=2, layer_scale=0.5)
B16_FEW = replace(ARCHS["vit_b16"], depth=1, layer_scale=0.5)
H_FEW = replace(ARCHS["vit_h14_reg4"], depth=1, layer_scale=0.5)
# The sizes between have nothing new but their widths; these are the odd ones, thinner.
G_THIN = replace(ARCHS["vit_gigantic14_reg8"], depth=2, width=208, heads=2, mlp_width=1024, layer_scale=0.5)


def timm_vit(arch: Arch, image_px: int = 224, qk_norm: bool = False) -> torch.nn.Module:
    timm = import_timm()
    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU} if arch.ffn == "swiglu" else {}
    first_layer = arch.ffn_hidden * (2 if gated else 1)
    return timm.models.vision_transformer.VisionTransformer(
        img_size=image_px,
        patch_size=arch.patch_px,
        embed_dim=arch.width,
        depth=arch.depth,
        num_heads=arch.heads,
        mlp_ratio=first_layer / arch.width,
        reg_tokens=arch.registers,
        init_values=arch.layer_scale,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
        qk_norm=qk_norm,
        **gated,
    )


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize(
    ("arch", "image_px", "qk_norm"),
    [
        *((arch, side_px, False) for arch in (S_FEW, S_REGISTERS, B_FEW, G_THIN) for side_px in (224, 98, 392)),
        *((B16_FEW, side_px, False) for side_px in (224, 96)),
        *((H_FEW, side_px, qk_norm) for side_px in (224, 98) for qk_norm in (False, True)),
        *((arch, side_px, True) for arch in (S_FEW, B_FEW) for side_px in (224, 98)),
    ],
)
def test_every_token_equals_timms_with_the_same_weights(arch: Arch, image_px: int, qk_norm: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = timm_vit(arch, qk_norm=qk_norm).eval(), VisionTransformer(arch, 224, qk_norm=qk_norm).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            # Of order one after every layer, and nothing at its neutral value, so that no difference can hide.
            norm_weight = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(norm_weight, parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, image_px, image_px)
    with torch.no_grad():
        expected, got = theirs.forward_features(images), ours(images)
    assert got.shape == (2, 1 + arch.registers + (image_px // arch.patch_px) ** 2, arch.width)
    assert (got - expected).abs().max() <= 1e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("name", list(ARCHS))
def test_parameters_have_timms_names_and_shapes(name: str, qk_norm: bool) -> None:
    with torch.device("meta"):
        theirs = timm_vit(ARCHS[name], qk_norm=qk_norm)
        ours = VisionTransformer(ARCHS[name], 224, qk_norm=qk_norm)
    expected = [(key, parameter.shape) for key, parameter in theirs.named_parameters()]
    assert [(key, parameter.shape) for key, parameter in ours.named_parameters()] == expected


def count(width: int, depth: int, packed: int, hidden: int, tokens: int, registers: int, scaled: bool) -> int:
    """Parameters of a ViT with patches of 14 px, term by term."""
    attention = width * 3 * width + 3 * width + width * width + width
    mlp = width * packed + packed + hidden * width + width
    block = attention + mlp + 2 * 2 * width + (2 * width if scaled else 0)
    return depth * block + 3 * 14 * 14 * width + width + (1 + registers + tokens) * width + 2 * width


@pytest.mark.parametrize(
    ("name", "counted", "exact"),
    [
        ("vit_s14", count(384, 12, 1536, 1536, 257, 0, False), 21_619_584),
        ("vit_h14_reg4", count(1280, 32, 6832, 3416, 261, 4, True), 631_239_424),
        ("vit_giant14_reg4", count(1536, 40, 8192, 4096, 261, 4, True), 1_134_781_952),
        ("vit_gigantic14_reg8", count(1664, 48, 10928, 5464, 265, 8, True), 1_843_732_352),
    ],
)
def test_sizes_have_the_counts_that_are_published_or_inferred(name: str, counted: int, exact: int) -> None:
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in VisionTransformer(ARCHS[name], 224).parameters())
    assert parameters == counted == exact


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("vit_s14_scaled", "vit_small_patch14_dinov2"),
        ("vit_b14", "vit_base_patch14_dinov2"),
        ("vit_l14", "vit_large_patch14_dinov2"),
        ("vit_giant14", "vit_giant_patch14_dinov2"),
    ],
)
def test_the_plain_sizes_are_those_of_timms_dinov2(name: str, published: str) -> None:
    with torch.device("meta"):
        theirs = import_timm().create_model(published, img_size=224, num_classes=0).state_dict()
        ours = VisionTransformer(ARCHS[name], 224).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_the_virchow2_size_is_timms_factory_call_of_its_model_card() -> None:
    timm = import_timm()
    with torch.device("meta"):
        theirs = timm.create_model(
            "vit_huge_patch14_224",
            img_size=224,
            init_values=1e-5,
            num_classes=0,
            reg_tokens=4,
            mlp_ratio=5.3375,
            global_pool="",
            dynamic_img_size=True,
            mlp_layer=timm.layers.SwiGLUPacked,
            act_layer=torch.nn.SiLU,
        )
        ours = VisionTransformer(ARCHS["vit_h14_reg4"], 224)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert sum(parameter.numel() for parameter in ours.parameters()) == 631_239_424


def test_a_missing_timm_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match="pip install 'timm"):
        import_timm()


def test_importing_twice_gives_the_same_module() -> None:
    assert import_timm() is import_timm() is sys.modules["timm"]
