"""Vision transformer whose parameters have timm's names and shapes, so that weights move either way unchanged.

Images of several sizes go through one forward: their tokens lie one after the other, so that norms and linear layers
see one long matrix, and only attention takes the images apart.

Shape suffixes: B images of one size, N patches, T tokens (class + registers + patches), P tokens of all images,
D width, H heads, C width of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from histoscale.config.archs import Arch

NORM_EPS = 1e-6  # timm's and DINOv2's

Spans: TypeAlias = Sequence[tuple[int, int]]
"""(images, tokens of each) of every size, in the order in which their tokens are packed."""


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: [B, 3, h, w] -> [B, D, h / patch, w / patch]."""

    def __init__(self, patch_px: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_px, stride=patch_px)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Project the patches."""
        projected: Tensor = self.proj(images_B3HW)
        return projected


class Attention(nn.Module):
    """Multi-head self-attention among the tokens of each image."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x_PD: Tensor, spans: Spans) -> Tensor:
        """Mix the tokens of each image."""
        heads: tuple[Tensor, ...] = _Heads.apply(self.qkv(x_PD), spans, self.heads)  # type: ignore[no-untyped-call]
        mixed = [self._mix(*heads[first : first + 3]) for first in range(0, len(heads), 3)]
        projected: Tensor = self.proj(pack(mixed))
        return projected

    def _mix(self, q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor) -> Tensor:
        """Attention among images of one size: [B, T, D]."""
        return attend(self.q_norm(q_BHTC), self.k_norm(k_BHTC), v_BHTC).transpose(1, 2).flatten(2)


class _Heads(torch.autograd.Function):
    """Queries, keys and values of every size, as views: autograd alone assembles their gradient in three passes."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  its type has no public name
        qkv_P3D: Tensor,
        spans: Spans,
        heads: int,
    ) -> tuple[Tensor, ...]:
        """For each size three views [B, H, T, C]."""
        ctx.spans, ctx.heads, ctx.shape = spans, heads, qkv_P3D.shape
        return tuple(_heads(qkv_P3D, spans, heads))

    @staticmethod
    def backward(ctx: Any, *grads_BHTC: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        """The gradient of the packed layer's output: [P, 3 D]."""
        grad_P3D = grads_BHTC[0].new_empty(ctx.shape)
        for part_BHTC, grad_BHTC in zip(_heads(grad_P3D, ctx.spans, ctx.heads), grads_BHTC, strict=True):
            part_BHTC.copy_(grad_BHTC)
        return grad_P3D, None, None


def _heads(qkv_P3D: Tensor, spans: Spans, heads: int) -> Iterator[Tensor]:
    for part_BT3D in unpack(qkv_P3D, spans):
        yield from part_BT3D.view(*part_BT3D.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)


def unpack(x_PD: Tensor, spans: Spans) -> list[Tensor]:
    """Views [B, T, D] of packed tokens, one for each size."""
    parts = torch.split(x_PD, [images * tokens for images, tokens in spans])
    return [part.view(*span, -1) for part, span in zip(parts, spans, strict=True)]


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Tokens [B, T, D] of each size, one after the other: [P, D]."""
    flat = [part.flatten(0, 1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def attend(q_BHTC: Tensor, k_BHTC: Tensor, v_BHTC: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(C)) V."""
    if q_BHTC.device.type == "cpu" and q_BHTC.dtype == torch.bfloat16:
        # The fused kernel was 3 to 6 times slower than the plain product here (measured on two cores, torch 2.13).
        scores_BHTT = (q_BHTC * q_BHTC.shape[-1] ** -0.5) @ k_BHTC.transpose(-2, -1)
        mixed_BHTC: Tensor = scores_BHTT.softmax(dim=-1) @ v_BHTC
        return mixed_BHTC
    return F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC)


class Mlp(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_PD: Tensor) -> Tensor:
        """Transform each token."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x_PD)))
        return out


class SwiGlu(nn.Module):
    """Gated MLP, gate and value packed in one layer in timm's order: the first half is the gate.

    Args:
        width: Width of a token.
        packed: Outputs of the packed layer, twice the hidden width.
    """

    def __init__(self, width: int, packed: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, packed)
        self.fc2 = nn.Linear(packed // 2, width)

    def forward(self, x_PD: Tensor) -> Tensor:
        """Transform each token."""
        gate, value = self.fc1(x_PD).chunk(2, dim=-1)
        out: Tensor = self.fc2(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """One learned factor per channel of a residual branch."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x_PD: Tensor) -> Tensor:
        """Scale the branch."""
        return x_PD * self.gamma


class Block(nn.Module):
    """One pre-norm transformer block with stochastic depth on both of its branches."""

    def __init__(self, arch: Arch, drop_path: float, qk_norm: bool) -> None:
        super().__init__()
        width, scale = arch.width, arch.layer_scale
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, arch.heads, qk_norm)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = SwiGlu(width, 2 * arch.ffn_hidden) if arch.ffn == "swiglu" else Mlp(width, arch.ffn_hidden)
        self.ls2 = nn.Identity() if scale is None else LayerScale(width, scale)

    def forward(self, x_PD: Tensor, spans: Spans) -> Tensor:
        """Add the attention branch, then the MLP branch."""
        x_PD = self._add(x_PD, spans, self._attended)
        return self._add(x_PD, spans, self._transformed)

    def _attended(self, x_PD: Tensor, spans: Spans) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(x_PD), spans))
        return out

    def _transformed(self, x_PD: Tensor, spans: Spans) -> Tensor:  # noqa: ARG002 - a branch, as `_attended` is
        out: Tensor = self.ls2(self.mlp(self.norm2(x_PD)))
        return out

    def _add(self, x_PD: Tensor, spans: Spans, branch: Callable[[Tensor, Spans], Tensor]) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return x_PD + branch(x_PD, spans)
        # Only the images that keep the branch are computed. Rounding at random keeps the expected share exact at any
        # batch size, and one image always stays, so that every parameter has a gradient. The draws are on the CPU:
        # the same images are dropped on every device.
        rows = [self._kept(images).to(x_PD.device) for images, _ in spans]
        parts = unpack(x_PD, spans)
        kept = [part[row] for part, row in zip(parts, rows, strict=True)]
        kept_spans = [(len(row), tokens) for row, (_, tokens) in zip(rows, spans, strict=True)]
        changes = unpack(branch(pack(kept), kept_spans), kept_spans)
        return pack(
            [
                torch.index_add(part, 0, row, change, alpha=len(part) / len(row))
                for part, row, change in zip(parts, rows, changes, strict=True)
            ]
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _kept(self, images: int) -> Tensor:
        """Which images keep a branch."""
        kept = max(1, int(images * (1.0 - self.drop_path) + torch.rand(()).item()))
        return torch.randperm(images)[:kept]


class VisionTransformer(nn.Module):
    """ViT backbone: images -> class token, registers and patch tokens after the final norm.

    Args:
        arch: Shape of the network.
        image_px: Side of the images that the position embedding is made for.
        drop_path: Share of images whose residual branch is dropped, the same in every block (DINOv2's
            `drop_path_uniform`).
        qk_norm: Whether queries and keys are normalised.

    Attributes:
        checkpointing: Compute each block again in the backward pass instead of keeping what it needs.
    """

    def __init__(self, arch: Arch, image_px: int, drop_path: float = 0.0, qk_norm: bool = False) -> None:
        super().__init__()
        self.checkpointing = False
        self.grid = image_px // arch.patch_px
        self.prefix_tokens = 1 + arch.registers
        width = arch.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, arch.registers, width)) if arch.registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix_tokens + self.grid**2, width))
        self.patch_embed = PatchEmbed(arch.patch_px, width)
        self.blocks = nn.ModuleList(Block(arch, drop_path, qk_norm) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    @overload
    def forward(self, images: Tensor, mask_BN: Tensor | None = None, mask_token_1D: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(
        self, images: Sequence[Tensor], mask_BN: Tensor | None = None, mask_token_1D: Tensor | None = None
    ) -> list[Tensor]: ...

    def forward(
        self, images: Tensor | Sequence[Tensor], mask_BN: Tensor | None = None, mask_token_1D: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Tokens of the images.

        Args:
            images: Normalised images [B, 3, h, w], or several such tensors of different sizes; sides that differ from
                `image_px` resample the position embedding.
            mask_BN: bool, patches to hide in the first of them; needs `mask_token_1D`.
            mask_token_1D: What stands in for a hidden patch.

        Returns:
            [B, 1 + registers + N, D]: class token, registers, patches in row-major order; a list of these for several.
        """
        if isinstance(images, Tensor):
            return self._tokens([images], mask_BN, mask_token_1D)[0]
        return self._tokens(images, mask_BN, mask_token_1D)

    def _tokens(self, images: Sequence[Tensor], mask_BN: Tensor | None, mask_token_1D: Tensor | None) -> list[Tensor]:
        first, *others = images
        parts = [self._embed(first, mask_BN, mask_token_1D), *(self._embed(other) for other in others)]
        spans = [(part.shape[0], part.shape[1]) for part in parts]
        x_PD = pack(parts)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                # Reentrant: the other form compares tensors with those of the forward pass, which ZeRO 3 has emptied.
                x_PD = checkpoint(block, x_PD, spans, use_reentrant=True)
            else:
                x_PD = block(x_PD, spans)
        return unpack(self.norm(x_PD), spans)

    def _embed(self, images_B3HW: Tensor, mask_BN: Tensor | None = None, mask_token_1D: Tensor | None = None) -> Tensor:
        """What goes into the first block: [B, T, D]."""
        patches_BDhw = self.patch_embed(images_B3HW)
        rows, columns = patches_BDhw.shape[-2:]
        x_BND = patches_BDhw.flatten(2).transpose(1, 2)
        if mask_BN is not None and mask_token_1D is not None:
            x_BND = torch.where(mask_BN[..., None], mask_token_1D.to(x_BND.dtype), x_BND)
        prefix = [self.cls_token] if self.reg_token is None else [self.cls_token, self.reg_token]
        x_BTD = torch.cat([*(token.expand(x_BND.shape[0], -1, -1) for token in prefix), x_BND], dim=1)
        return x_BTD + self._positions(rows, columns)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position embedding [1, prefix + rows * columns, D], resampled as timm does: bicubic, antialiased, fp32."""
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        prefix, patches = self.pos_embed.tensor_split([self.prefix_tokens], dim=1)
        plane_1Dgg = patches.float().transpose(1, 2).reshape(1, -1, self.grid, self.grid)
        plane_1Dhw = F.interpolate(plane_1Dgg, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat([prefix, plane_1Dhw.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)
