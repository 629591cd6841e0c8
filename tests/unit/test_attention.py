"""The attention that pictures show is the one that the network uses."""

import pytest
import torch

from histoscale.config.archs import ARCHS
from histoscale.models.attention import attention_weights, class_attention
from histoscale.models.vit import Attention, VisionTransformer

ARCH = ARCHS["vit_test14"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_weights_reproduce_what_the_layer_puts_out(qk_norm: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(32, 4, qk_norm)
    x_BTD = torch.randn(3, 7, 32)
    weights_BHTT = attention_weights(layer, x_BTD, queries=7)
    v_BHTC = layer.qkv(x_BTD)[..., 64:].view(3, 7, 4, 8).transpose(1, 2)
    mixed_BTD = layer.proj((weights_BHTT @ v_BHTC).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixed_BTD.flatten(0, 1), layer(x_BTD.flatten(0, 1), [(3, 7)]))
    torch.testing.assert_close(attention_weights(layer, x_BTD, queries=1), weights_BHTT[:, :, :1])


@pytest.mark.parametrize("image_px", [56, 70])
def test_the_class_token_is_asked_in_the_last_block_without_changing_the_pass(image_px: int) -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(ARCH, 56).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, image_px, image_px)
    seen = {}
    layer = backbone.blocks[-1].attn
    watch = layer.register_forward_hook(lambda _, inputs, output: seen.update(inputs=inputs[0], output=output))
    with torch.no_grad():
        tokens_BTD, attention_BHN = class_attention(backbone, images)
        watch.remove()
        torch.testing.assert_close(tokens_BTD, backbone(images), rtol=0.0, atol=0.0)
        patches = (image_px // 14) ** 2
        assert attention_BHN.shape == (2, ARCH.heads, patches)
        x_BTD = seen["inputs"].view(2, -1, ARCH.width)
        weights_BHTT = attention_weights(layer, x_BTD, queries=x_BTD.shape[1])
        torch.testing.assert_close(attention_BHN, weights_BHTT[:, :, 0, -patches:])
        v_BHTC = layer.qkv(x_BTD)[..., 2 * ARCH.width :].view(2, -1, ARCH.heads, ARCH.width // ARCH.heads)
        first = layer.proj(torch.einsum("bht,bthc->bhc", weights_BHTT[:, :, 0], v_BHTC).flatten(1))
    torch.testing.assert_close(first, seen["output"].view(2, -1, ARCH.width)[:, 0])
    assert layer._forward_pre_hooks == {}
