"""The training step as one would write it with nothing but PyTorch: one process, whole logits, no sharding.

The benchmark times the platform's step against it, and a test holds both to the same numbers. It shares with the
platform what both are fed: crops, masks and schedules.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from histoscale.augment import augment, block_masks
from histoscale.config.archs import ARCHS, Arch
from histoscale.config.recipe import Recipe
from histoscale.train.schedules import schedules_at


class PlainBlock(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        width = arch.width
        self.heads = arch.heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Tokens to tokens."""
        images, tokens, width = x_BTD.shape
        qkv = self.attn["qkv"](self.norm1(x_BTD)).reshape(images, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images, tokens, width)
        x_BTD = x_BTD + self.attn["proj"](mixed)
        out: Tensor = x_BTD + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x_BTD))))
        return out


class PlainBackbone(nn.Module):
    """A ViT with a class token, without registers and LayerScale."""

    def __init__(self, arch: Arch, image_px: int) -> None:
        super().__init__()
        self.grid = image_px // arch.patch_px
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, arch.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, arch.width, arch.patch_px, arch.patch_px)})
        self.blocks = nn.Sequential(*(PlainBlock(arch) for _ in range(arch.depth)))
        self.norm = nn.LayerNorm(arch.width, eps=1e-6)

    def forward(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Images to tokens."""
        patches = self.patch_embed["proj"](images)
        side = patches.shape[-1]
        tokens = patches.flatten(2).transpose(1, 2)
        if mask is not None and mask_token is not None:
            tokens = torch.where(mask[..., None], mask_token.to(tokens.dtype), tokens)
        positions: Tensor = self.pos_embed
        if side != self.grid:
            plane = positions[:, 1:].transpose(1, 2).reshape(1, -1, self.grid, self.grid)
            plane = F.interpolate(plane, size=(side, side), mode="bicubic", antialias=True)
            positions = torch.cat([positions[:, :1], plane.flatten(2).transpose(1, 2)], dim=1)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + positions
        out: Tensor = self.norm(self.blocks(tokens))
        return out


class PlainHead(nn.Module):
    """MLP and prototypes, with logits as cosines."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens to logits."""
        return F.linear(F.normalize(self.mlp(tokens), dim=-1), F.normalize(self.prototypes.weight, dim=-1))


class PlainNet(nn.Module):
    """Backbone, mask token and two heads, under the platform's parameter names."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        arch, heads = ARCHS[recipe.model.arch], recipe.heads
        self.backbone = PlainBackbone(arch, recipe.crops.global_px)
        self.mask_token = nn.Parameter(torch.zeros(1, arch.width))
        self.dino_head = PlainHead(arch.width, heads.hidden_dim, heads.dino_bottleneck_dim, heads.dino_prototypes)
        self.ibot_head = PlainHead(arch.width, heads.hidden_dim, heads.ibot_bottleneck_dim, heads.ibot_prototypes)


class PlainStep:
    """Student, teacher and AdamW; `run` takes one step on the tiles of one replica.

    Args:
        recipe: One replica, no stochastic depth, Sinkhorn-Knopp, an architecture without registers and LayerScale.
        weights: Initial state of both networks.
        dtype: What products are computed in, by autocast.
    """

    def __init__(self, recipe: Recipe, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
        self.recipe, self.dtype = recipe, dtype
        self.student = PlainNet(recipe)
        self.student.load_state_dict(weights, strict=True)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        groups = [{"params": [parameter], "name": name} for name, parameter in self.student.named_parameters()]
        self.optimizer = torch.optim.AdamW(groups, betas=recipe.optim.betas, fused=True)

    def run(self, step: int, tiles: NDArray[np.uint8], sample_ids: NDArray[np.int64]) -> dict[str, float]:
        """One optimiser step; its losses and the norm of its gradient."""
        recipe = self.recipe
        settings = schedules_at(recipe, (step + 1) * recipe.batch.tiles)
        grid = recipe.crops.global_px // ARCHS[recipe.model.arch].patch_px
        views = augment(torch.from_numpy(tiles), sample_ids, recipe)
        mask = torch.from_numpy(block_masks(sample_ids, recipe.seed, grid, recipe.loss))
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            terms = self._losses(views.global_crops, views.local_crops, mask, settings.teacher_temperature)
        weights = (recipe.loss.dino_weight, recipe.loss.ibot_weight, recipe.loss.kde_weight)
        loss = torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum()
        torch.autograd.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), recipe.optim.clip_norm)
        for group in self.optimizer.param_groups:
            frozen = settings.last_layer_frozen and "prototypes" in group["name"]
            factor = recipe.optim.patch_embed_lr if "patch_embed" in group["name"] else 1.0
            group["lr"] = 0.0 if frozen else settings.lr * factor
            group["weight_decay"] = settings.weight_decay if group["params"][0].ndim > 1 else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, weight_now in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                average.lerp_(weight_now, 1.0 - settings.ema_momentum)
        names = ("dino", "ibot", "kde")
        return {name: float(term) for name, term in zip(names, terms, strict=True)} | {"grad_norm": float(norm)}

    def _losses(self, large: Tensor, small: Tensor | None, mask: Tensor, temperature: float) -> Sequence[Tensor]:
        recipe, student = self.recipe, self.student
        with torch.no_grad():
            seen = self.teacher.backbone(large)
            dino_targets = self._balance(self.teacher.dino_head(seen[:, 0]), temperature)
            ibot_targets = self._balance(self.teacher.ibot_head(seen[:, 1:][mask]), temperature)
        tokens = student.backbone(large, mask, student.mask_token)
        cls = [*tokens[:, 0].chunk(2)]
        if small is not None:
            cls += student.backbone(small)[:, 0].chunk(recipe.crops.local_count)
        logits = [student.dino_head(each) for each in cls]
        pairs = [(logits[0], 1), (logits[1], 0), *((each, other) for each in logits[2:] for other in (0, 1))]
        targets = dino_targets.chunk(2)
        dino = torch.stack([self._cross_entropy(each, targets[other]).mean() for each, other in pairs]).mean()
        per_patch = self._cross_entropy(student.ibot_head(tokens[:, 1:][mask]), ibot_targets)
        weights = (1.0 / mask.sum(dim=1, keepdim=True).clamp(min=1)).expand(mask.shape)[mask]
        ibot = (per_patch * weights).sum() / len(mask)
        kde = torch.stack([self._kde(each.float()) for each in cls[:2]]).sum()
        return dino, ibot, kde

    def _balance(self, logits: Tensor, temperature: float) -> Tensor:
        plan = torch.exp(logits.float() / temperature)
        plan = plan / plan.sum()
        for _ in range(self.recipe.loss.sinkhorn_iterations):
            plan = plan / plan.sum(dim=0, keepdim=True) / plan.shape[1]
            plan = plan / plan.sum(dim=1, keepdim=True) / plan.shape[0]
        return plan * plan.shape[0]

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_probs = F.log_softmax(logits.float() / self.recipe.loss.student_temperature, dim=-1)
        return -(targets * log_probs).sum(dim=-1)

    def _kde(self, features: Tensor) -> Tensor:
        unit = F.normalize(features, dim=-1)
        kernel = torch.exp(self.recipe.loss.kde_kappa * unit @ unit.T)
        return torch.log((kernel.sum(dim=1) - kernel.diagonal()) / (len(unit) - 1)).mean()
