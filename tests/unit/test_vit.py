"""The vision transformer by itself: masks, stochastic depth, attention, dtypes."""

import math
import shutil

import pytest
import torch

from histoscale.config.archs import ARCHS, Arch
from histoscale.models.vit import Block, SwiGlu, VisionTransformer, attend
from histoscale.models.weights import initialise

ARCH = Arch(patch_px=14, depth=2, width=24, heads=3, registers=2, layer_scale=0.5)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def small_vit(drop_path: float = 0.0) -> VisionTransformer:
    vit = VisionTransformer(ARCH, 56, drop_path)
    initialise(vit, seed=3)
    return vit


@pytest.mark.parametrize(("name", "millions"), [("vit_s14", 21.62), ("vit_l14_reg4", 303.24), ("vit_h14_reg4", 631.24)])
def test_parameter_counts_of_the_named_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        vit = VisionTransformer(ARCHS[name], 224)
    assert sum(parameter.numel() for parameter in vit.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_softmax_of_scaled_products(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator).to(dtype) for _ in range(3))
    got = attend(q, k, v)
    for image in range(2):
        for head in range(3):
            scores = q[image, head].double() @ k[image, head].double().T / math.sqrt(8)
            weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
            expected = weights @ v[image, head].double()
            assert (got[image, head].double() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 0.03)


def test_the_first_half_of_the_packed_layer_is_the_gate() -> None:
    layer = SwiGlu(4, 12)
    x = torch.randn(3, 4)
    packed = layer.fc1(x)
    gate, value = packed[:, :6], packed[:, 6:]
    expected = layer.fc2(gate * torch.sigmoid(gate) * value)
    torch.testing.assert_close(layer(x), expected)


def test_hidden_patches_leave_no_trace_of_their_pixels() -> None:
    vit, token = small_vit().eval(), torch.full((1, 24), 0.3)
    images = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    changed = images.clone()
    changed[:, :, 14:28, 14:28] += 1.0  # patch 5 of the 4 x 4 grid
    with torch.no_grad():
        assert torch.equal(vit(images, mask, token), vit(changed, mask, token))
        assert not torch.equal(vit(images), vit(changed))
        assert not torch.equal(vit(images, mask, token), vit(images))


def test_stochastic_depth_keeps_the_expected_output_and_acts_only_in_training() -> None:
    block = Block(ARCH, drop_path=0.4, qk_norm=False)
    spans = [(3, 7), (2, 5)]
    x = torch.randn(31, 24, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    with torch.no_grad():
        full = block._attended(x, spans)
        block.eval()
        assert torch.equal(block._add(x, spans, block._attended), x + full)
        block.train()
        changes = torch.stack([block._add(x, spans, block._attended) - x for _ in range(4000)])
    torch.testing.assert_close(changes.mean(dim=0), full, atol=0.05 * full.abs().max().item(), rtol=0.0)
    draws = changes[:, :21].unflatten(1, (3, 7))
    dropped = (draws.abs().amax(dim=(2, 3)) == 0).double()
    assert dropped.mean().item() == pytest.approx(0.4, abs=0.01)
    assert (dropped.mean(dim=0) - 0.4).abs().max() < 0.03


def test_images_of_several_sizes_in_one_forward_equal_one_by_one() -> None:
    vit, token = small_vit().eval(), torch.full((1, 24), 0.3)
    generator = torch.Generator().manual_seed(1)
    large, small = torch.randn(2, 3, 56, 56, generator=generator), torch.randn(3, 3, 28, 42, generator=generator)
    mask = torch.rand(2, 16, generator=generator) < 0.5
    with torch.no_grad():
        together = vit([large, small], mask, token)
        torch.testing.assert_close(together, [vit(large, mask, token), vit(small)], atol=1e-6, rtol=1e-5)


def test_checkpointed_activations_change_neither_output_nor_gradient() -> None:
    images = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    gradients = []
    for checkpointing in (False, True):
        vit = small_vit(drop_path=0.5).train()
        vit.checkpointing = checkpointing
        torch.manual_seed(0)
        vit([images, images[:2]])[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in vit.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler"),
            ],
        ),
    ],
)
def test_compiled_blocks_compute_the_same(backend: str) -> None:
    images = torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    outputs = []
    for compiled in (False, True):
        vit = small_vit(drop_path=0.3).train()
        if compiled:
            vit.blocks[-1].compile(backend=backend)  # one is slow enough
        torch.manual_seed(0)
        outputs.append([vit([images, images[:3]])[0] for _ in range(2)])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def test_stochastic_depth_follows_the_default_generator() -> None:
    vit = small_vit(drop_path=0.5).train()
    images = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(vit(images))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("images", [1, 2])
def test_every_parameter_has_a_gradient_under_the_strongest_stochastic_depth(images: int) -> None:
    vit = small_vit(drop_path=0.99).train()
    vit(torch.randn(images, 3, 56, 56)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in vit.parameters())


def test_bf16_follows_fp32() -> None:
    vit = small_vit().eval()
    images = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = vit(images)
        got = vit.bfloat16()(images.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).abs().max() < 0.1
