"""Operations of a step against a count of every product that the network makes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.errors import RecipeError
from histoscale.models import build_ssl_net
from histoscale.models.feature_net import build_feature_net
from histoscale.train.flops import step_flops_per_tile


@pytest.mark.parametrize("arch", ["vit_test14", "vit_s14_reg4"])
@pytest.mark.parametrize("shared", [False, True])
def test_it_equals_what_torch_counts(arch: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shallow = ARCHS[arch].__class__(**{**vars(ARCHS[arch]), "depth": 2})
    monkeypatch.setitem(ARCHS, arch, shallow)
    recipe = Recipe.model_validate(
        {
            "model": {"arch": arch, "drop_path": 0.0},
            "heads": {"dino_prototypes": 64, "ibot_prototypes": 48, "hidden_dim": 32, "shared": shared},
            "crops": {"global_px": 56, "local_px": 28, "local_count": 3},
            "loss": {"mask_ratio": [0.5, 0.5]},
        }
    )
    tiles, patches = 2, 16
    mask = torch.zeros(2 * tiles, patches, dtype=torch.bool)
    mask[:tiles, : patches // 2] = True
    # In bf16 attention is two products, which the counter sees; it does not know the CPU's fused kernel.
    large, small = torch.randn(2 * tiles, 3, 56, 56).bfloat16(), torch.randn(3 * tiles, 3, 28, 28).bfloat16()
    student, teacher = build_ssl_net(recipe).bfloat16(), build_ssl_net(recipe).bfloat16().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        seen, out = teacher(large, None, mask, hide_masked=False), student(large, small, mask)
        logits = [net[name] @ net[f"{name}_prototypes"].T for net in (seen, out) for name in ("dino", "ibot")]
        sum(each.sum() for each in [*logits, out["cls"]]).backward()
    counted = counter.get_total_flops() / tiles
    assert step_flops_per_tile(recipe, shallow) == pytest.approx(counted, rel=1e-6)


DISTILLED = {
    "model": {"arch": "vit_test14", "drop_path": 0.0},
    "heads": {"dino_prototypes": 64, "ibot_prototypes": 48, "hidden_dim": 32},
    "crops": {"global_px": 56, "local_px": 28, "local_count": 3},
    "distill": {"teacher": "s3://bucket/run"},
}


def counted_step(teacher: torch.nn.Module, student: torch.nn.Module, tiles: int, heads: bool) -> float:
    """What torch counts of a distilled step, for each tile: everything but the losses."""
    large, small = torch.randn(2 * tiles, 3, 56, 56).bfloat16(), torch.randn(3 * tiles, 3, 28, 28).bfloat16()
    every = torch.ones(2 * tiles, 16, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        if heads:
            with torch.no_grad():
                seen = teacher(large, None, every, hide_masked=False)
                for name in ("dino", "ibot"):
                    _ = seen[name] @ seen[f"{name}_prototypes"].T
            out = student(large, small, every, hide_masked=False)
            logits = [out[name] @ out[f"{name}_prototypes"].T for name in ("dino", "ibot")]
            sum(each.sum() for each in logits).backward()
        else:
            with torch.no_grad():
                teacher(large)
            out = student(large)
            (out["cls_features"].sum() + out["patch_features"].sum()).backward()
    return counter.get_total_flops() / tiles


def test_a_step_distilled_from_features_equals_what_torch_counts() -> None:
    values = {**DISTILLED, "distill": {**DISTILLED["distill"], "mode": "features"}}
    values["crops"] = {**DISTILLED["crops"], "local_count": 0}
    recipe = Recipe.model_validate(values)
    teacher = recipe.model_copy(update={"model": recipe.model.model_copy(update={"arch": "vit_micro14"})})
    looks, student = build_ssl_net(teacher).backbone.bfloat16(), build_feature_net(recipe, 128).bfloat16()
    counted = counted_step(looks, student, 2, heads=False)
    assert step_flops_per_tile(recipe, ARCHS["vit_test14"], teacher) == pytest.approx(counted, rel=1e-6)


def test_a_step_distilled_from_heads_equals_what_torch_counts() -> None:
    recipe = Recipe.model_validate(DISTILLED)
    teacher = recipe.model_copy(update={"model": recipe.model.model_copy(update={"arch": "vit_micro14"})})
    looks, student = build_ssl_net(teacher).bfloat16(), build_ssl_net(recipe).bfloat16()
    counted = counted_step(looks, student, 2, heads=True)
    assert step_flops_per_tile(recipe, ARCHS["vit_test14"], teacher) == pytest.approx(counted, rel=1e-6)


def test_a_distilled_step_without_its_teacher_is_not_counted() -> None:
    with pytest.raises(RecipeError, match=r"depends on its teacher \(got 'distill\.mode=heads'.*Give it"):
        step_flops_per_tile(Recipe.model_validate(DISTILLED), ARCHS["vit_test14"])
