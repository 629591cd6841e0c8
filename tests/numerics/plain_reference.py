"""The oracle of the training step: one process, plain PyTorch, obvious loops. No DeepSpeed, no ranks, no sharding.

It shares with the library only what feeds the step (crops, masks, keys) and the network itself; schedules,
Sinkhorn-Knopp, losses, clipping, optimiser and EMA are written out here once more.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from histoscale.augment import augment, block_masks
from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.models.ssl import SSLNet, build_ssl_net
from histoscale.seeding import key


class MicroBatch(Protocol):
    """The tiles of one replica in one step."""

    @property
    def sample_ids(self) -> NDArray[np.int64]: ...

    @property
    def tiles(self) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Tiles:
    """The tiles of one replica in one step, as the feed would give them."""

    replica: int
    sample_ids: NDArray[np.int64]
    tiles: NDArray[np.uint8]
    faults: tuple[()] = ()

    @property
    def mpp(self) -> NDArray[np.float64]:
        """Each scale of the mix in turn."""
        return np.array([0.25, 0.5, 1.0, 2.0])[self.sample_ids % 4]

    @property
    def slides(self) -> NDArray[np.int32]:
        """Eight slides in turn."""
        return (self.sample_ids // 2 % 8).astype(np.int32)


@dataclass
class PlainRun:
    """What a run leaves behind.

    Attributes:
        rates: Of each step, the learning rates and weight decays that parameters had together, each pair once.
        state: By kind, as a checkpoint has it: fp32, ema, exp_avg and exp_avg_sq.
    """

    metrics: list[dict[str, float]] = field(default_factory=list)
    rates: list[list[tuple[float, float]]] = field(default_factory=list)
    initial_teacher: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def teacher(self) -> dict[str, Tensor]:
        """The average of the student's weights."""
        return self.state["ema"]


def tiles_of(recipe: Recipe, step: int, replica: int) -> Tiles:
    """Synthetic tiles, each a function of its sample id: a colour of its own, a gradient and noise."""
    batch, side = recipe.batch.per_replica, recipe.data.region_px
    first = (step * recipe.batch.replicas + replica) * batch
    sample_ids = np.arange(first, first + batch, dtype=np.int64)
    tiles = np.empty((batch, side, side, 3), dtype=np.uint8)
    for row, sample_id in enumerate(sample_ids):
        draws = np.random.default_rng(int(sample_id))
        slope = np.linspace(0, 90, side)[:, None, None] * draws.random(3)
        tiles[row] = np.clip(draws.integers(40, 160, 3) + slope + draws.normal(0, 25, (side, side, 3)), 0, 255)
    return Tiles(replica, sample_ids, tiles)


def run_plain(recipe: Recipe, steps: int, tiles_of: Callable[[Recipe, int, int], MicroBatch] = tiles_of) -> PlainRun:
    """Train `steps` steps in fp32 on the tiles of (recipe, step, replica)."""
    student = build_ssl_net(recipe)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    groups = [{"params": [parameter], "name": name} for name, parameter in student.named_parameters()]
    optimizer = torch.optim.AdamW(groups, betas=recipe.optim.betas)
    run = PlainRun(initial_teacher=copy_of(teacher))
    for step in range(steps):
        images = (step + 1) * recipe.batch.tiles
        for group in optimizer.param_groups:
            decay = half_cosine(*recipe.optim.weight_decay, images, recipe)
            group["weight_decay"] = decay if group["params"][0].ndim >= 2 else 0.0
            group["lr"] = learning_rate(recipe, images) * rate_factor(recipe, group["name"], images)
        run.rates.append(sorted({(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}))
        replicas = [tiles_of(recipe, step, replica) for replica in range(recipe.batch.replicas)]
        metrics = backward(recipe, student, teacher, step, replicas)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.optim.clip_norm)
        run.metrics.append(metrics | {"grad_norm": float(norm)})
        optimizer.step()
        optimizer.zero_grad()
        momentum = half_cosine(*recipe.optim.ema_momentum, images, recipe)
        with torch.no_grad():
            for average, weight in zip(teacher.parameters(), student.parameters(), strict=True):
                average.copy_(momentum * average + (1.0 - momentum) * weight)
    run.state = {"fp32": copy_of(student), "ema": copy_of(teacher)}
    for kind in ("exp_avg", "exp_avg_sq"):
        run.state[kind] = {name: optimizer.state[weight][kind] for name, weight in student.named_parameters()}
    return run


def copy_of(net: SSLNet) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in net.named_parameters()}


def backward(
    recipe: Recipe, student: SSLNet, teacher: SSLNet, step: int, replicas: list[MicroBatch]
) -> dict[str, float]:
    """Gradient of the whole step; returns its losses."""
    images = (step + 1) * recipe.batch.tiles
    grid = recipe.crops.global_px // ARCHS[recipe.model.arch].patch_px
    views = [augment(torch.from_numpy(each.tiles), each.sample_ids, recipe) for each in replicas]
    masks = [torch.from_numpy(block_masks(each.sample_ids, recipe.seed, grid, recipe.loss)) for each in replicas]
    with torch.no_grad():
        seen = [logits_of(teacher, v.global_crops, None, m, False) for v, m in zip(views, masks, strict=True)]
    start, end = recipe.loss.teacher_temperature
    warmth = min(images / recipe.loss.teacher_temperature_warmup_images, 1.0)
    temperature = start + (end - start) * warmth
    dino_targets = iter(textbook_sinkhorn(recipe, torch.cat([s["dino"] for s in seen]), temperature))
    ibot_targets = iter(textbook_sinkhorn(recipe, torch.cat([s["ibot"] for s in seen]), temperature))
    sums = {"dino": 0.0, "ibot": 0.0, "kde": 0.0, "loss": 0.0}
    for replica, (view, mask) in enumerate(zip(views, masks, strict=True)):
        torch.manual_seed(key(recipe.seed, "droppath", step, replica))
        out = logits_of(student, view.global_crops, view.local_crops, mask, True)
        targets = torch.stack([next(ibot_targets) for _ in range(int(mask.sum()))])
        terms = {
            "dino": dino(recipe, out["dino"], torch.stack([next(dino_targets) for _ in range(len(mask))])),
            "ibot": ibot(recipe, out["ibot"], targets, mask),
            "kde": sum(kde(recipe, crop) for crop in out["cls"].chunk(2)),
        }
        weights = recipe.loss
        terms["loss"] = (
            weights.dino_weight * terms["dino"]
            + weights.ibot_weight * terms["ibot"]
            + weights.kde_weight * terms["kde"]
        )
        (terms["loss"] / recipe.batch.replicas).backward()
        for name, value in terms.items():
            sums[name] += float(value.detach()) / recipe.batch.replicas
    return sums


def rate_factor(recipe: Recipe, name: str, images: int) -> float:
    """Rates fall from block to block towards the input; prototypes stand still at first."""
    if "prototypes" in name and images <= recipe.optim.freeze_last_layer_images:
        return 0.0
    decay, depth = recipe.optim.layer_decay, ARCHS[recipe.model.arch].depth
    if name.startswith("backbone.blocks."):
        return decay ** (depth - int(name.split(".")[2]))
    if name.startswith("backbone.patch_embed."):
        return decay ** (depth + 1) * recipe.optim.patch_embed_lr
    if name in ("mask_token", "backbone.cls_token", "backbone.reg_token", "backbone.pos_embed"):
        return decay ** (depth + 1)
    return 1.0


def logits_of(
    net: SSLNet, global_crops: Tensor, local_crops: Tensor | None, mask: Tensor, hide: bool
) -> dict[str, Tensor]:
    """What the network puts out, with whole logits in place of their factors."""
    out = net(global_crops, local_crops, mask, hide_masked=hide)
    return {
        "cls": out["cls"],
        "dino": out["dino"] @ out["dino_prototypes"].T,
        "ibot": out["ibot"] @ out["ibot_prototypes"].T,
    }


def dino(recipe: Recipe, logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy over all pairs of a student's crop with another, global crop of the teacher's."""
    tiles = recipe.batch.per_replica
    total, pairs = torch.zeros(()), 0
    for crop, student in enumerate(logits.split(tiles)):
        for other, target in enumerate(targets.split(tiles)):
            if crop != other:
                total = total + cross_entropy(recipe, student, target).mean()
                pairs += 1
    return total / pairs


def ibot(recipe: Recipe, logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean over a crop's masked patches, then over the crops, those without a mask included."""
    total, row = torch.zeros(()), 0
    for crop in mask:
        count = int(crop.sum())
        if count:
            total = total + cross_entropy(recipe, logits[row : row + count], targets[row : row + count]).mean()
        row += count
    return total / len(mask)


def kde(recipe: Recipe, features: Tensor) -> Tensor:
    """Mean log density at each feature under the kernels of all others."""
    unit = F.normalize(features, dim=-1)
    total = torch.zeros(())
    for i in range(len(unit)):
        density = sum(torch.exp(recipe.loss.kde_kappa * unit[i] @ unit[j]) for j in range(len(unit)) if j != i)
        total = total + torch.log(density / (len(unit) - 1))
    return total / len(unit)


def cross_entropy(recipe: Recipe, logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * F.log_softmax(logits / recipe.loss.student_temperature, dim=-1)).sum(dim=-1)


def textbook_sinkhorn(recipe: Recipe, logits: Tensor, temperature: float) -> Tensor:
    """Rows and columns normalised in turn, as Caron et al. print it (arXiv 2006.09882, appendix)."""
    plan = torch.exp(logits / temperature).T
    plan = plan / plan.sum()
    prototypes, samples = plan.shape
    for _ in range(recipe.loss.sinkhorn_iterations):
        plan = plan / plan.sum(dim=1, keepdim=True) / prototypes
        plan = plan / plan.sum(dim=0, keepdim=True) / samples
    return (plan * samples).T


def learning_rate(recipe: Recipe, images: int) -> float:
    warmup = recipe.optim.warmup_images
    if images < warmup:
        return recipe.optim.lr * images / warmup
    angle = math.pi * (images - warmup) / (recipe.schedule.images - warmup)
    return recipe.optim.min_lr + (recipe.optim.lr - recipe.optim.min_lr) * (1 + math.cos(angle)) / 2


def half_cosine(start: float, end: float, images: int, recipe: Recipe) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * images / recipe.schedule.images)) / 2


def relative_distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Distance of two sets of weights over the size of the second."""
    squared = sum(float((ours[name] - theirs[name]).pow(2).sum()) for name in theirs)
    return (squared / sum(float(tensor.pow(2).sum()) for tensor in theirs.values())) ** 0.5
