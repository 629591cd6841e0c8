"""The forecast of a rank's memory against what can be counted: parameters, and tensors that autograd keeps."""

import mmap
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from histoscale.augment.crops import Views
from histoscale.bench.memory import Peak, cases
from histoscale.config.archs import ARCHS, Arch
from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.models.feature_net import FeatureNet
from histoscale.models.heads import ProjectionHead
from histoscale.models.ssl import SSLNet
from histoscale.models.vit import Block, VisionTransformer
from histoscale.objectives import sinkhorn
from histoscale.objectives.cross_entropy import cross_entropy
from histoscale.train.activations import (
    Rank,
    balancing_bytes,
    block_bytes,
    saved_by_heads,
    saved_by_loss,
    seen_bytes,
)
from histoscale.train.feature_activations import saved_by_cosines, saved_by_projectors
from histoscale.train.features import FeatureObjective, Features
from histoscale.train.groups import parameter_groups
from histoscale.train.memory import MemoryForecast, forecast, largest_group, network_parameters, state_items
from histoscale.train.objective import Inputs

DTYPES = (torch.float32, torch.bfloat16)
SMALL = Arch(patch_px=14, depth=1, width=64, heads=4)


def recipe_of(**sections: Any) -> Recipe:
    return decode_recipe({"batch": {"tiles": 16, "replicas": 4}, "schedule": {"images": 1_000_000}, **sections})


def rank_of(recipe: Recipe, arch: Arch, dtype: torch.dtype, workers: int = 1, stage: int = 2) -> Rank:
    return Rank(recipe, arch, workers, stage, dtype.itemsize, on_cpu=True)


def kept_by(module: nn.Module, *inputs: Any) -> int:
    """Bytes of all floating tensors that a forward pass keeps for the backward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, Any] = {}  # storages, held lest another takes their address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("name", ARCHS)
def test_parameters_are_those_of_the_network(name: str, qk_norm: bool, shared: bool) -> None:
    patch_px = ARCHS[name].patch_px
    crops = {"global_px": 14 * patch_px, "local_px": 6 * patch_px}
    recipe = recipe_of(model={"arch": name, "qk_norm": qk_norm}, crops=crops, heads={"shared": shared})
    with torch.device("meta"):
        net = SSLNet(recipe)
    rank = rank_of(recipe, ARCHS[name], torch.float32)
    assert network_parameters(rank) == sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("name", ["vit_s14", "vit_h14_reg4"])
def test_parameters_and_largest_group_are_those_of_a_student_of_features(name: str) -> None:
    recipe = features_of(name)
    with torch.device("meta"):
        net = FeatureNet(recipe, 768)
    rank = replace(rank_of(recipe, ARCHS[name], torch.float32), projects_to=768)
    assert network_parameters(rank) == sum(parameter.numel() for parameter in net.parameters())
    largest = max(sum(each.numel() for each in group["params"]) for group in parameter_groups(net, recipe.optim))
    assert largest_group(rank) == pytest.approx(largest, rel=0.01)


@pytest.mark.parametrize("layer_decay", [1.0, 0.9])
@pytest.mark.parametrize("name", ["vit_s14", "vit_h14_reg4"])
def test_the_largest_group_is_the_optimisers(name: str, layer_decay: float) -> None:
    recipe = recipe_of(model={"arch": name}, optim={"layer_decay": layer_decay})
    with torch.device("meta"):
        groups = parameter_groups(SSLNet(recipe), recipe.optim)
    largest = max(sum(parameter.numel() for parameter in group["params"]) for group in groups)
    assert largest_group(rank_of(recipe, ARCHS[name], torch.float32)) == pytest.approx(largest, rel=0.01)


@pytest.mark.parametrize("local_count", [0, 4])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("arch", [SMALL, replace(SMALL, layer_scale=None), replace(SMALL, ffn="swiglu", registers=2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_keeps_what_is_counted(
    dtype: torch.dtype, arch: Arch, qk_norm: bool, drop_path: float, local_count: int
) -> None:
    crops = {"global_px": 56, "local_px": 28, "local_count": local_count}
    rank = rank_of(recipe_of(model={"drop_path": drop_path, "qk_norm": qk_norm}, crops=crops), arch, dtype)
    block = Block(arch, drop_path, qk_norm).to(dtype).train()
    tokens = torch.randn(rank.tokens, arch.width, dtype=dtype, requires_grad=True)
    assert block_bytes(rank) == kept_by(block, tokens, rank.spans)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prototypes", [16, 4096])
def test_heads_keep_what_is_counted(prototypes: int, dtype: torch.dtype) -> None:
    heads = {"shared": True, "hidden_dim": 128, "dino_bottleneck_dim": 32, "dino_prototypes": prototypes}
    rank = rank_of(recipe_of(heads=heads), SMALL, dtype)
    head = ProjectionHead(SMALL.width, 128, 32, prototypes).to(dtype)
    (rows,) = (each.rows for each in rank.heads)
    tokens = torch.randn(rows, SMALL.width, dtype=dtype, requires_grad=True)
    norms = 2 * 4 * (rows + prototypes)  # vectors in fp32, which the forecast leaves out: each norm, and it clamped
    assert saved_by_heads(rank) + norms == kept_by(head, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_keeps_its_gradients(dtype: torch.dtype) -> None:
    heads = {"shared": True, "dino_bottleneck_dim": 32, "dino_prototypes": 64}
    rank = rank_of(recipe_of(heads=heads), SMALL, dtype)
    (head,) = rank.heads
    student = torch.randn(1, head.rows, 32, dtype=dtype, requires_grad=True)
    prototypes = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    targets = sinkhorn(student.detach()[0], prototypes.detach(), 0.1, 1, head.rows)

    class Loss(nn.Module):
        def forward(self, student: Tensor) -> Tensor:
            return cross_entropy(student, prototypes, targets, torch.ones(1, 1), torch.ones(head.rows), 0.1)

    assert saved_by_loss(rank) == kept_by(Loss(), student)


def forecast_of(stage: int, workers: int, dtype: torch.dtype = torch.bfloat16, **sections: Any) -> MemoryForecast:
    recipe = recipe_of(**{"model": {"arch": "vit_s14", "drop_path": 0.0}, **sections})
    return forecast(recipe, workers, stage, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_higher_stages_hold_no_more_state_of_the_model(workers: int, dtype: torch.dtype) -> None:
    names = ("weights", "gradients", "fp32 masters", "moments", "average", "teacher")

    def held(stage: int) -> int:
        rank = rank_of(recipe_of(), ARCHS["vit_s14"], dtype, workers, stage)
        return sum(state_items(rank, rank)[name] for name in names if name != "gradients" or stage == 1)

    assert held(3) <= held(2) <= held(1)
    assert (held(3) < held(2)) == (workers > 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_workers_and_checkpointing_need_no_more(stage: int, dtype: torch.dtype) -> None:
    one, two = forecast_of(stage, 1, dtype), forecast_of(stage, 2, dtype)
    assert two.items["moments"] == pytest.approx(one.items["moments"] / 2, rel=1e-6)
    again = forecast_of(stage, 1, dtype, cluster={"activation_checkpointing": True})
    assert again.moments["loss"] < one.moments["loss"]
    assert again.total_bytes < one.total_bytes


@pytest.mark.parametrize(("stage", "dtype", "bucket"), [(2, "bf16", 1e9), (2, "fp32", 2e9), (3, "bf16", 2e9)])
def test_a_gpu_holds_the_whole_bucket_and_a_cpu_what_is_used_of_it(stage: int, dtype: str, bucket: float) -> None:
    recipe = recipe_of(model={"arch": "vit_s14"})
    on_gpu, on_cpu = (
        forecast(recipe, 2, stage, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], device)
        for device in ("cuda", "cpu")
    )
    moment = "reduction of the gradients"
    count = network_parameters(rank_of(recipe, ARCHS["vit_s14"], torch.float32))
    used = count * bucket / 500_000_000
    scattering = count * 4 if stage == 3 else 0  # gloo's copy
    assert on_gpu.moments[moment] - on_cpu.moments[moment] == pytest.approx(bucket - used - scattering, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_many_rows_are_bounded_by_a_chunk(dtype: torch.dtype) -> None:
    fits, more, many = (
        balancing_bytes(rank_of(recipe_of(batch={"tiles": tiles, "replicas": 4}), SMALL, dtype))
        for tiles in (64, 128, 640)
    )
    narrow = 0 if dtype == torch.float32 else 2
    assert fits == 2**24 * (2 * 4 + narrow)  # 128 rows of 131,072 logits are one chunk, with room for exponentials
    assert more == many == 2**24 * (4 + narrow)


def test_a_frozen_teacher_is_counted_with_its_own_model_and_heads() -> None:
    recipe = recipe_of(model={"arch": "vit_s14", "drop_path": 0.0}, distill={"teacher": "/runs/teacher"})
    values = recipe.model_dump()
    values["model"] |= {"arch": "vit_h14", "qk_norm": True}
    values["heads"] |= {"hidden_dim": 512, "ibot_bottleneck_dim": 128}
    teacher = Recipe.model_validate(values)
    alike, other = (forecast(recipe, 1, 2, torch.bfloat16, teacher=each).items for each in (recipe, teacher))
    with torch.device("meta"):
        (student, network) = (sum(each.numel() for each in SSLNet(of).parameters()) for of in (recipe, teacher))
    assert (alike["teacher"], other["teacher"]) == (2 * student, 2 * network)
    assert other["teacher's prototypes"] == 2 * 131_072 * (384 + 128)
    # 4 local micro-batches of 4 tiles: two class tokens and twice 16 x 16 patches each.
    assert other["what the teacher saw"] == 2 * 16 * (2 * 384 + 2 * 256 * 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher", ["vit_b14_reg4", "vit_b16"])
def test_projectors_and_cosines_keep_what_is_counted(teacher: str, dtype: torch.dtype) -> None:
    recipe, theirs = features_of("vit_s14"), ARCHS[teacher]
    rank = replace(rank_of(recipe, ARCHS["vit_s14"], dtype), projects_to=theirs.width)
    looks = replace(rank, arch=theirs, projects_to=0)
    (images, count), (_, their_count) = rank.spans[0], looks.spans[0]
    seen = torch.randn(images, their_count, theirs.width, dtype=dtype)
    assert rank.turns * seen.nbytes == seen_bytes(looks)
    features = Features(seen[:, 0], seen[:, 1 + theirs.registers :])
    tokens = torch.randn(images, count, 384, dtype=dtype, requires_grad=True)

    class Loss(nn.Module):
        """The projectors of `FeatureNet`, and the objective's loss."""

        def __init__(self) -> None:
            super().__init__()
            self.cls, self.patch = nn.Linear(384, theirs.width), nn.Linear(384, theirs.width)

        def forward(self, tokens: Tensor) -> Tensor:
            out = {"cls": tokens[:, 0], "cls_features": self.cls(tokens[:, 0])}
            out["patch_features"] = self.patch(tokens[:, 1:])
            objective = FeatureObjective(recipe, distill, lambda crops: features)
            inputs = Inputs(0, Views(torch.empty(0), None), torch.empty(0))
            return objective.losses(lambda crops: out, inputs, features).terms

    distill = recipe.distill
    assert distill is not None
    norms = 2 * 4 * images * (1 + rank.patches // images)  # of the student's rows, and those clamped
    kept = kept_by(Loss().to(dtype), tokens) - tokens.nbytes  # the last norm's output is counted with the blocks
    assert saved_by_projectors(rank) + saved_by_cosines(rank) + norms == kept


def features_of(name: str) -> Recipe:
    distill = {"teacher": "/runs/export", "mode": "features"}
    return recipe_of(model={"arch": name, "drop_path": 0.0}, crops={"local_count": 0}, distill=distill)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_teacher_of_features_is_its_backbone_and_its_student_has_no_heads(dtype: torch.dtype) -> None:
    recipe = features_of("vit_s14")
    teacher = recipe.model_copy(update={"model": recipe.model.model_copy(update={"arch": "vit_b16", "qk_norm": True})})
    told = forecast(recipe, 2, 2, dtype, teacher=teacher)
    with torch.device("meta"):
        backbone = VisionTransformer(ARCHS["vit_b16"], 224, qk_norm=True)
        net = FeatureNet(recipe, 768)
    assert told.items["teacher"] == dtype.itemsize * sum(each.numel() for each in backbone.parameters())
    assert told.items["weights"] == dtype.itemsize * sum(each.numel() for each in net.parameters())
    assert not told.items.get("teacher's prototypes")
    assert told.total_bytes < forecast(recipe_of(model={"arch": "vit_s14"}), 2, 2, dtype).total_bytes


def test_the_total_is_that_of_the_largest_moment_and_of_its_items() -> None:
    found = forecast_of(2, 2)
    assert found.total_bytes == sum(found.items.values()) == max(found.moments.values())
    name, largest_bytes = max(found.items.items(), key=lambda item: item[1])
    total = f"{found.total_bytes / 1e9:.2f} GB a worker at its peak, {found.peak}"
    assert found.line().startswith(f"{total} (of it {name} {largest_bytes / 1e9:.2f}, ")


def test_the_benchmark_covers_all_stages_and_measures_what_is_written() -> None:
    assert len(set(cases("cpu"))) == 3 * 2 * 2 * 2 + 3 * 2 * 2
    with Peak(torch.device("cpu")) as peak:
        pages = mmap.mmap(-1, 1 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # malloc may have as much left over
        np.frombuffer(pages, np.uint8)[:] = 1
    assert peak.bytes == pytest.approx(1 << 26, rel=0.1)
