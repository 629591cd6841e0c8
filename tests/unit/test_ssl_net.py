"""Student and teacher: outputs, gradient paths, determinism of the initial weights."""

from typing import Any

import pytest
import torch

from histoscale.config.recipe import Recipe
from histoscale.models import SSLNet, build_ssl_net
from histoscale.objectives import Assignment, dino_losses, ibot_loss, kde_loss

TILES, LOCALS = 3, 2


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def targets_of(rows: int, prototypes: int) -> Assignment:
    features, others = torch.randn(rows, 8), torch.randn(prototypes, 8)
    unit = torch.nn.functional.normalize
    return Assignment(unit(features, dim=-1), unit(others, dim=-1), 0.05, torch.zeros(prototypes))


def tiny_recipe(seed: int = 0, shared: bool = False, **model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "seed": seed,
            "data": {"region_px": 98},
            "batch": {"tiles": 12, "replicas": 4},
            "model": {"arch": "vit_test14", "drop_path": 0.0} | model,
            "heads": {
                "shared": shared,
                "dino_prototypes": 40,
                "ibot_prototypes": 24,
                "hidden_dim": 20,
                "dino_bottleneck_dim": 12,
                "ibot_bottleneck_dim": 10,
            },
            "crops": {"global_px": 56, "local_px": 28, "local_count": LOCALS},
            "schedule": {"images": 120},
        }
    )


def crops(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(2 * TILES, 16, dtype=torch.bool)
    mask[1, [2, 3]] = mask[4, [0, 7, 15]] = True
    return (
        torch.randn(2 * TILES, 3, 56, 56, generator=generator),
        torch.randn(LOCALS * TILES, 3, 28, 28, generator=generator),
        mask,
    )


def weights(net: SSLNet) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


def test_outputs_are_those_of_backbone_and_heads_one_by_one() -> None:
    net = build_ssl_net(tiny_recipe()).eval()
    global_crops, local_crops, mask = crops()
    with torch.no_grad():
        out = net(global_crops, local_crops, mask)
        tokens = net.backbone(global_crops, mask, net.mask_token)
        local_tokens = net.backbone(local_crops)
        patches = [tokens[image, 2 + patch] for image, patch in mask.nonzero().tolist()]
        torch.testing.assert_close(out["cls"], tokens[:, 0])
        torch.testing.assert_close(out["dino"][:6], net.dino_head(tokens[:, 0])[0])
        torch.testing.assert_close(out["dino"][6:], net.dino_head(local_tokens[:, 0])[0])
        torch.testing.assert_close(out["ibot"], net.ibot_head(torch.stack(patches))[0])
    shapes = {name: tuple(tensor.shape) for name, tensor in out.items()}
    assert shapes == {
        "cls": (6, 32),
        "dino": (12, 12),
        "dino_prototypes": (40, 12),
        "ibot": (5, 10),
        "ibot_prototypes": (24, 10),
    }


def test_a_shared_head_projects_class_tokens_and_patches() -> None:
    net = build_ssl_net(tiny_recipe(shared=True)).eval()
    global_crops, local_crops, mask = crops()
    with torch.no_grad():
        out = net(global_crops, local_crops, mask)
        patches = net.backbone(global_crops, mask, net.mask_token)[:, 2:][mask]
        torch.testing.assert_close(out["ibot"], net.dino_head(patches)[0])
    assert not any(name.startswith("ibot_head") for name, _ in net.named_parameters())
    assert out["ibot_prototypes"] is out["dino_prototypes"]


def test_the_teacher_sees_the_patches_that_the_student_does_not() -> None:
    net = build_ssl_net(tiny_recipe()).eval()
    global_crops, _, mask = crops()
    with torch.no_grad():
        teacher = net(global_crops, None, mask, hide_masked=False)
        tokens = net.backbone(global_crops)
        torch.testing.assert_close(teacher["cls"], tokens[:, 0])
        torch.testing.assert_close(teacher["ibot"], net.ibot_head(tokens[:, 2:][mask])[0])
        assert not torch.allclose(teacher["ibot"], net(global_crops, None, mask)["ibot"])


def test_logits_are_cosines_whatever_the_norm_of_the_prototypes() -> None:
    net = build_ssl_net(tiny_recipe()).eval()
    features = torch.randn(7, net.backbone.cls_token.shape[-1])
    with torch.no_grad():
        before = torch.matmul(*(part if index == 0 else part.T for index, part in enumerate(net.dino_head(features))))
        net.dino_head.prototypes.weight *= torch.rand(40, 1) + 0.5
        projected, prototypes = net.dino_head(features)
        torch.testing.assert_close(projected @ prototypes.T, before)
        bottleneck = net.dino_head.mlp(features)
        cosine = torch.nn.functional.cosine_similarity(
            bottleneck[:, None], net.dino_head.prototypes.weight[None], dim=-1
        )
    torch.testing.assert_close(before, cosine)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", ["some", "none"])
@pytest.mark.parametrize("with_locals", [True, False])
@pytest.mark.parametrize("drop_path", [0.0, 0.9])
def test_every_parameter_gets_a_gradient_whatever_is_masked(
    masked: str, with_locals: bool, drop_path: float, shared: bool
) -> None:
    net = build_ssl_net(tiny_recipe(drop_path=drop_path, shared=shared)).train()
    global_crops, local_crops, mask = crops()
    mask = mask if masked == "some" else torch.zeros_like(mask)
    count = LOCALS if with_locals else 0
    out = net(global_crops, local_crops if with_locals else None, mask)
    loss = dino_losses(out["dino"], out["dino_prototypes"], targets_of(2 * TILES, 40), count, 0.1)[0]
    loss = loss + kde_loss(out["cls"][:TILES], 5.0)
    targets = targets_of(len(out["ibot"]), 40 if shared else 24)
    loss = loss + ibot_loss(out["ibot"], out["ibot_prototypes"], targets, mask, 0.1)
    loss.backward()
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(bool(parameter.grad.isfinite().all()) for parameter in net.parameters())
    idle = {name for name, parameter in net.named_parameters() if not bool(parameter.grad.any())}
    unmasked = {"mask_token"} | {name for name, _ in net.named_parameters() if name.startswith("ibot_head")}
    assert (unmasked <= idle) if masked != "some" else not (unmasked & idle)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights(build_ssl_net(tiny_recipe()))
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    second = weights(build_ssl_net(tiny_recipe(drop_path=0.3)))
    torch.manual_seed(1)
    third = weights(build_ssl_net(tiny_recipe(seed=1)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = [name for name in first if first[name].ndim >= 2 and name != "mask_token"]
    assert drawn
    assert not any(torch.equal(first[name], third[name]) for name in drawn)


def test_no_two_parameters_share_their_draws() -> None:
    net = weights(build_ssl_net(tiny_recipe()))
    first, second = (net[f"backbone.blocks.{block}.attn.qkv.weight"] for block in range(2))
    assert not torch.equal(first, second)


def test_initial_weights_have_their_distributions() -> None:
    net = build_ssl_net(tiny_recipe(arch="vit_ti14"))
    for name, values in weights(net).items():
        if name.endswith("gamma"):
            assert bool((values == 1e-5).all())
        elif "norm" in name and name.endswith("weight"):
            assert bool((values == 1.0).all())
        elif name.endswith("bias") or name == "mask_token":
            assert not bool(values.any())
        elif name.endswith("cls_token"):
            assert 0.0 < values.abs().max() < 1e-5
        else:
            assert values.std().item() == pytest.approx(0.02, rel=0.1), name
            assert values.mean().abs() < 0.005


def test_small_archs_draw_matrices_by_their_fan_in() -> None:
    net = build_ssl_net(tiny_recipe(arch="vit_micro14"))
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.15), name


def test_bf16_student_gives_finite_losses_in_fp32() -> None:
    net = build_ssl_net(tiny_recipe()).bfloat16().train()
    global_crops, local_crops, mask = crops()
    out = net(global_crops.bfloat16(), local_crops.bfloat16(), mask)
    loss = dino_losses(out["dino"], out["dino_prototypes"], targets_of(6, 40), LOCALS, 0.1)[0]
    loss = loss + ibot_loss(out["ibot"], out["ibot_prototypes"], targets_of(5, 24), mask, 0.1)
    loss = loss + kde_loss(out["cls"][:TILES], 5.0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in net.parameters())
