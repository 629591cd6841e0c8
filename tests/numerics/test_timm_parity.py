"""The backbone against timm, with timm's own weights."""

import importlib.util
import sys

import pytest
import torch

from histoscale.config.archs import ARCHS, Arch
from histoscale.errors import ExportError
from histoscale.export.timm_import import import_timm
from histoscale.models import VisionTransformer

S_LIKE = Arch(patch_px=14, depth=3, width=96, heads=3, registers=0, layer_scale=None)
S_SCALED = Arch(patch_px=14, depth=3, width=96, heads=3, registers=4, layer_scale=0.5)
H_LIKE = Arch(patch_px=14, depth=2, width=160, heads=2, registers=4, mlp_ratio=5.3375, ffn="swiglu", layer_scale=0.5)


def timm_vit(arch: Arch, image_px: int = 224) -> torch.nn.Module:
    timm = import_timm()
    gated = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU} if arch.ffn == "swiglu" else {}
    return timm.models.vision_transformer.VisionTransformer(
        img_size=image_px,
        patch_size=arch.patch_px,
        embed_dim=arch.width,
        depth=arch.depth,
        num_heads=arch.heads,
        mlp_ratio=arch.mlp_ratio,
        reg_tokens=arch.registers,
        init_values=arch.layer_scale,
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
        **gated,
    )


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.mark.parametrize("arch", [S_LIKE, S_SCALED, H_LIKE], ids=["s", "s-registers-scale", "h-swiglu"])
@pytest.mark.parametrize("image_px", [224, 98, 392])
def test_every_token_equals_timms_with_the_same_weights(arch: Arch, image_px: int) -> None:
    torch.manual_seed(0)
    theirs, ours = timm_vit(arch).eval(), VisionTransformer(arch, 224).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, image_px, image_px)
    with torch.no_grad():
        expected, got = theirs.forward_features(images), ours(images)
    assert got.shape == (2, 1 + arch.registers + (image_px // 14) ** 2, arch.width)
    assert (got - expected).abs().max() <= 1e-5
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", list(ARCHS))
def test_parameters_have_timms_names_and_shapes(name: str) -> None:
    with torch.device("meta"):
        theirs, ours = timm_vit(ARCHS[name]), VisionTransformer(ARCHS[name], 224)
    expected = [(key, parameter.shape) for key, parameter in theirs.named_parameters()]
    assert [(key, parameter.shape) for key, parameter in ours.named_parameters()] == expected


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
