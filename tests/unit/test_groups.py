"""Parameter groups against a rule written out name by name."""

import pytest

from histoscale.config.archs import ARCHS
from histoscale.config.recipe import OptimSection, Recipe
from histoscale.models import build_ssl_net
from histoscale.train.groups import parameter_groups


def net_and_names() -> tuple[object, dict[int, str]]:
    recipe = Recipe.model_validate(
        {
            "model": {"arch": "vit_test14"},
            "heads": {"dino_prototypes": 8, "ibot_prototypes": 8, "hidden_dim": 8},
        }
    )
    net = build_ssl_net(recipe)
    return net, {id(parameter): name for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_every_parameter_is_in_the_group_of_its_rule(layer_decay: float) -> None:
    net, names = net_and_names()
    groups = parameter_groups(net, OptimSection(layer_decay=layer_decay, patch_embed_lr=0.2))
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert set(found) == set(names.values())
    assert sum(len(group["params"]) for group in groups) == len(names)
    depth = ARCHS["vit_test14"].depth
    expected = {
        "mask_token": layer_decay ** (depth + 1),
        "backbone.pos_embed": layer_decay ** (depth + 1),
        "backbone.patch_embed.proj.weight": 0.2 * layer_decay ** (depth + 1),
        "backbone.blocks.0.attn.qkv.weight": layer_decay**2,
        "backbone.blocks.1.mlp.fc1.bias": layer_decay,
        "backbone.norm.weight": 1.0,
        "dino_head.mlp.0.weight": 1.0,
        "ibot_head.prototypes.weight": 1.0,
    }
    assert {name: found[name]["lr_factor"] for name in expected} == pytest.approx(expected)


def test_norms_biases_and_layer_scale_do_not_decay() -> None:
    net, names = net_and_names()
    for group in parameter_groups(net, OptimSection()):
        for parameter in group["params"]:
            name = names[id(parameter)]
            still = name.endswith((".bias", ".gamma")) or "norm" in name
            assert group["decays"] is not still, name


def test_only_prototypes_are_last_layers() -> None:
    net, names = net_and_names()
    last = {
        names[id(p)] for group in parameter_groups(net, OptimSection()) if group["last_layer"] for p in group["params"]
    }
    assert last == {"dino_head.prototypes.weight", "ibot_head.prototypes.weight"}
