"""Memory of one rank at its peak, counted from the shapes of a run before anything is allocated.

A run's state stands still; what comes and goes has its maximum at one of a few moments of a step. Each moment is the
sum of the tensors that live then, and the forecast is the largest. Nothing is fitted: what the tensors are follows from
the code of the step and of DeepSpeed 0.19.8. Left out are the libraries' own memory (kernels, contexts of NCCL and
CUDA), what an allocator loses in fragments, and vectors. `bench/memory.py` compares it with what runs take, so far on
the CPU and with less than 500 million parameters, where DeepSpeed's bucket never fills.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from histoscale.config.archs import ARCHS, Arch
from histoscale.config.recipe import HeadSection, Recipe
from histoscale.train.activations import (
    FP32_BYTES,
    Rank,
    balancing_bytes,
    block_backward_bytes,
    block_bytes,
    crop_elements,
    looking_bytes,
    predicting_items,
    prototypes_backward_bytes,
    saved_by_blocks,
    saved_by_heads,
    saved_by_loss,
    seen_bytes,
)
from histoscale.train.feature_activations import (
    cosines_backward_bytes,
    cosines_bytes,
    saved_by_cosines,
    saved_by_projectors,
)

_MOMENTS = 2
_ITEMS_SHOWN = 3
# DeepSpeed's defaults, which train/engine.py leaves as they are.
_BUCKET_ELEMENTS = 500_000_000  # reduce_bucket_size
_PREFETCH_ELEMENTS = 50_000_000  # stage3_prefetch_bucket_size
_REUSE_ELEMENTS = 1_000_000_000  # stage3_max_reuse_distance


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes of one rank.

    Attributes:
        moments: Moment of a step -> all that lives then.
        peak: The moment with the most.
        items: What lives at the peak.
    """

    moments: Mapping[str, int]
    peak: str
    items: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """At the peak."""
        return sum(self.items.values())

    def line(self) -> str:
        """For people: the total, and the largest items of the peak."""
        largest = sorted(self.items.items(), key=lambda item: -item[1])[:_ITEMS_SHOWN]
        items = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in largest)
        return f"{self.total_bytes / 1e9:.2f} GB a worker at its peak, {self.peak} (of it {items})"


def forecast(
    recipe: Recipe,
    workers: int,
    zero_stage: int,
    dtype: torch.dtype,
    device: Literal["cpu", "cuda"] = "cuda",
    teacher: Recipe | None = None,
) -> MemoryForecast:
    """Peak memory of one rank in steps after the first.

    Args:
        recipe: The run's; its `cluster.workers`, `cluster.zero_stage` and `precision` are not looked at.
        workers: Ranks.
        zero_stage: 1, 2 or 3.
        dtype: What is computed in, fp32 or bf16.
        device: On a GPU what is allocated counts, on a CPU what is written to: DeepSpeed allocates buckets of 500
            million elements whatever the model needs of them.
        teacher: The recipe with the frozen teacher's network in place of the student's; None for the run's own average.
    """
    rank = Rank(recipe, ARCHS[recipe.model.arch], workers, zero_stage, dtype.itemsize, device == "cpu")
    other = teacher or recipe
    looks = replace(rank, recipe=other, arch=ARCHS[other.model.arch])
    if recipe.distill is not None and recipe.distill.mode == "features":
        rank, looks = replace(rank, projects_to=looks.arch.width), replace(looks, projects_to=0)
    state = state_items(rank, looks)
    moments = {name: Counter(state) + Counter(items) for name, items in _moments(rank, looks).items()}
    totals = {name: sum(items.values()) for name, items in moments.items()}
    peak = max(totals, key=lambda name: totals[name])
    return MemoryForecast(totals, peak, dict(moments[peak]))


def backbone_parameters(arch: Arch, image_px: int, qk_norm: bool) -> int:
    """Of `VisionTransformer`: blocks, patch embedding, class token and registers, positions, last norm."""
    width, grid = arch.width, image_px // arch.patch_px
    prefix = 1 + arch.registers
    embedding = (3 * arch.patch_px**2 + 1) * width + prefix * width + (prefix + grid**2) * width
    return arch.depth * _block_parameters(arch, qk_norm) + embedding + 2 * width


def network_parameters(rank: Rank) -> int:
    """Of `SSLNet`: backbone, mask token, heads and prototypes; of `FeatureNet`: backbone and two projectors."""
    recipe, arch = rank.recipe, rank.arch
    backbone = backbone_parameters(arch, recipe.crops.global_px, recipe.model.qk_norm)
    return backbone + _head_parameters(rank) + (arch.width if rank.projects_to is None else 0)


def _head_parameters(rank: Rank) -> int:
    """What stands above the backbone."""
    if rank.projects_to is not None:
        return 2 * (rank.arch.width + 1) * rank.projects_to
    return _heads_matrices(rank.recipe.heads, rank.arch) + _prototypes(rank.recipe.heads)


def _block_matrices(arch: Arch) -> int:
    return 4 * arch.width**2 + (2 if arch.ffn == "mlp" else 3) * arch.width * arch.ffn_hidden


def _block_parameters(arch: Arch, qk_norm: bool) -> int:
    """Matrices; biases of qkv, proj, fc1 and fc2; two norms; LayerScale of both branches; norms of queries and keys."""
    width = arch.width
    biases = 5 * width + (1 if arch.ffn == "mlp" else 2) * arch.ffn_hidden
    scales = 0 if arch.layer_scale is None else 2 * width
    return _block_matrices(arch) + biases + 4 * width + scales + (4 * width // arch.heads if qk_norm else 0)


def _heads_matrices(heads: HeadSection, arch: Arch) -> int:
    """The three layers of each head with their biases."""
    hidden, bottlenecks = heads.hidden_dim, [heads.dino_bottleneck_dim, heads.ibot_bottleneck_dim]
    return sum(
        (arch.width + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * bottleneck
        for bottleneck in bottlenecks[: 1 if heads.shared else 2]
    )


def _prototypes(heads: HeadSection) -> int:
    ibot = 0 if heads.shared else heads.ibot_prototypes * heads.ibot_bottleneck_dim
    return heads.dino_prototypes * heads.dino_bottleneck_dim + ibot


def largest_group(rank: Rank) -> int:
    """Parameters of the largest of the optimiser's groups, vectors aside; see train/groups.py."""
    recipe, arch = rank.recipe, rank.arch
    together = arch.depth * _block_matrices(arch) if recipe.optim.layer_decay == 1.0 else 0
    prototypes = _prototypes(recipe.heads) if rank.projects_to is None else 0
    return max(_block_matrices(arch), together + _head_parameters(rank) - prototypes, prototypes)


def state_items(rank: Rank, looks: Rank) -> dict[str, int]:
    """What a rank holds between two steps.

    ZeRO 1 and 2 replicate the weights, ZeRO 3 shares each out; all three share out masters, moments and average.
    Gradients stand still in two cases: ZeRO 3 has one flat buffer in fp32 for its part, and bf16 under ZeRO 1 goes
    through DeepSpeed's `BF16_Optimizer`, which sums all gradients in fp32 on every rank. ZeRO 3 keeps its bucket, too,
    in the fp32 that it communicates in.
    """
    count = network_parameters(rank)
    part, on_all = math.ceil(count / rank.workers), count * rank.element_bytes
    gradients = part * FP32_BYTES if rank.stage == 3 else count * FP32_BYTES if rank.bf16 and rank.stage == 1 else 0
    return {
        "weights": part * rank.element_bytes if rank.stage == 3 else on_all,
        "gradients": gradients,
        "fp32 masters": part * FP32_BYTES,
        "moments": _MOMENTS * part * FP32_BYTES,
        "average": part * FP32_BYTES,
        "teacher": network_parameters(looks) * looks.element_bytes,
        "reduction bucket": _bucket(rank, count) * FP32_BYTES if rank.stage == 3 else 0,
        "crops of all local micro-batches": rank.turns * crop_elements(rank) * rank.element_bytes,
        "teacher's prototypes": sum(head.prototype_elements for head in looks.heads) * rank.element_bytes,
        "what the teacher saw": seen_bytes(looks),
    }


def _bucket(rank: Rank, count: int) -> int:
    """Elements of the bucket in which DeepSpeed gathers gradients: those used, or all that are allocated."""
    return min(count, _BUCKET_ELEMENTS) if rank.on_cpu else _BUCKET_ELEMENTS


def _moments(rank: Rank, looks: Rank) -> dict[str, dict[str, int]]:
    """What lives beside the state at each moment that can be the peak."""
    earlier = {"gradients of earlier micro-steps": _summed(rank), "gathered weights": _gathered(rank)}
    blocks = {"blocks": saved_by_blocks(rank), "last norm": rank.tokens * rank.arch.width * rank.element_bytes}
    again = {"one block, computed again": block_bytes(rank)} if rank.recipe.cluster.activation_checkpointing else {}
    losing = _losing_by_heads(rank) if rank.projects_to is None else _losing_by_features(rank, looks)
    return {
        "crops and teacher": {"teacher at work": looking_bytes(looks)},
        "balancing the targets": {"logits": balancing_bytes(rank)},
        **{moment: {**earlier, **blocks, **items} for moment, items in losing.items()},
        "backward pass of the last block": {
            **earlier,
            **blocks,
            **again,
            "gradients of the micro-step": _gradients_so_far(rank, _head_parameters(rank)),
            "backward of a block": block_backward_bytes(rank),
        },
        "reduction of the gradients": {
            "gradients of earlier micro-steps": _summed(rank),
            **_reducing(rank),
            **(_before_update(rank) if rank.stage == 1 else {}),
        },
        "optimiser": _optimising(rank) | _before_update(rank),
    }


def _losing_by_heads(rank: Rank) -> dict[str, dict[str, int]]:
    """What lives beside the blocks while the student predicts prototypes."""
    loss = {"heads": saved_by_heads(rank), "gradients of the loss": saved_by_loss(rank)}
    return {
        "weights of the heads": {
            "heads": saved_by_heads(rank),
            "weights that are gathered": min(_gathered(rank), _PREFETCH_ELEMENTS * rank.element_bytes),
        },
        "loss": {**loss, **predicting_items(rank)},
        "backward pass of the heads": {
            **loss,
            "gradients of the micro-step": _gradients_so_far(rank, 0),
            "backward of the prototypes": prototypes_backward_bytes(rank),
        },
    }


def _losing_by_features(rank: Rank, looks: Rank) -> dict[str, dict[str, int]]:
    """What lives beside the blocks while the student turns to features."""
    kept = {"projectors": saved_by_projectors(rank), "features": saved_by_cosines(rank)}
    return {
        "loss": {**kept, "cosines": cosines_bytes(rank, looks)},
        "backward pass of the cosines": {
            **kept,
            "gradients of the micro-step": _gradients_so_far(rank, 0),
            "backward of the cosines": cosines_backward_bytes(rank),
        },
    }


def _gathered(rank: Rank) -> int:
    """ZeRO 3 gathers weights and keeps those that come again within a distance: up to half of it, there and back.

    With one rank nothing is gathered.
    """
    if rank.stage < 3 or rank.workers == 1:
        return 0
    count = network_parameters(rank)
    return min(count, _REUSE_ELEMENTS // 2) * rank.element_bytes


def _summed(rank: Rank) -> int:
    """Gradients of earlier micro-steps: whole under ZeRO 1, this rank's part of them in fp32 under ZeRO 2.

    `BF16_Optimizer` keeps those that it has summed until the update.
    """
    if rank.turns == 1 or rank.stage == 3:
        return 0
    count = network_parameters(rank)
    return count * rank.element_bytes if rank.stage == 1 else math.ceil(count / rank.workers) * FP32_BYTES


def _gradients_so_far(rank: Rank, count: int) -> int:
    """Gradients of `count` parameters of this micro-step, and the bucket, which the first of them brings.

    ZeRO 2 moves gradients into it, ZeRO 1 does so before the update, and in bf16 ZeRO 1 has none.
    """
    if rank.stage == 2:
        return _bucket(rank, count) * rank.element_bytes
    if rank.stage == 3:
        return 0
    own = count * rank.element_bytes if rank.turns == 1 else 0
    return own + (0 if rank.bf16 else _bucket(rank, 0) * FP32_BYTES)


def _reducing(rank: Rank) -> dict[str, int]:
    """Tensors of the reduction, at the end of a backward pass or, under ZeRO 1, before the update.

    ZeRO 1 in fp32 moves gradients to the bucket, flattens that for the other ranks, and copies its own part. ZeRO 2
    does so after every micro-step; in bf16 what it flattens is made fp32, and added to a sum of its part. ZeRO 3 and
    `BF16_Optimizer` flatten what they have; to scatter it, gloo copies it once more.
    """
    count = network_parameters(rank)
    part, bucket = math.ceil(count / rank.workers) * FP32_BYTES, min(count, _BUCKET_ELEMENTS)
    own = count * rank.element_bytes if rank.turns == 1 else 0
    if rank.stage == 3:
        copies = 2 if rank.on_cpu else 1
        return {"flattened gradients": copies * bucket * FP32_BYTES}
    if rank.bf16 and rank.stage == 1:
        return {"gradients of the micro-step": own, "flattened gradients": bucket * FP32_BYTES}
    if rank.bf16:
        flattened = bucket * (rank.element_bytes + FP32_BYTES) + (part if rank.turns == 1 else 0)
    else:
        flattened = max(part, bucket * FP32_BYTES if rank.workers > 1 else 0)
    if rank.stage == 2:
        return {"reduction bucket": _bucket(rank, count) * rank.element_bytes, "flattened gradients": flattened}
    return {
        "gradients of the micro-step": own,
        "reduction bucket": _bucket(rank, 0) * FP32_BYTES,
        "flattened gradients": flattened,
    }


def _before_update(rank: Rank) -> dict[str, int]:
    """The copy by which a watched step tells how far it has moved the weights; see `train/health.py`."""
    return {"masters before the update": math.ceil(network_parameters(rank) / rank.workers) * FP32_BYTES}


def _optimising(rank: Rank) -> dict[str, int]:
    """Gradients of this rank's part, where they are not state, and the gradient of the largest group once more.

    The gradient of a group is flattened for AdamW, unless it lies flat: in bf16 it does under ZeRO 1 and 2. AdamW is
    fused, and needs nothing else.
    """
    count = network_parameters(rank)
    part = math.ceil(count / rank.workers) * FP32_BYTES
    group = math.ceil(largest_group(rank) / rank.workers) * FP32_BYTES
    flat = rank.bf16 and rank.stage < 3
    held = 0 if rank.stage == 3 else count * rank.element_bytes if flat and rank.stage == 1 else part
    return {"gradients of the step": held, "flattened gradient": 0 if flat else group}
