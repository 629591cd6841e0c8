"""Operations of a step against a count of every product that the network makes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.errors import RecipeError
from histoscale.models import build_ssl_net
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


def test_a_distilled_step_is_not_counted_as_one_of_pretraining() -> None:
    recipe = Recipe.model_validate(
        {"model": {"arch": "vit_s14", "drop_path": 0.0}, "distill": {"teacher": "s3://bucket/run"}}
    )
    with pytest.raises(RecipeError, match=r"pretraining alone \(got 'distill\.mode=heads'.*Leave the section out"):
        step_flops_per_tile(recipe, ARCHS["vit_s14"])
