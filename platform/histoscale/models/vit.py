"""Vision transformer whose parameters have timm's names and shapes, so that weights move either way unchanged.

Shape suffixes: B images, N patches, T tokens (class + registers + patches), D width, H heads, C width of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histoscale.config.archs import Arch

NORM_EPS = 1e-6  # timm's and DINOv2's


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
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Mix the tokens of each image."""
        images, tokens, width = x_BTD.shape
        qkv = self.qkv(x_BTD).reshape(images, tokens, 3, self.heads, width // self.heads)
        q_BHTC, k_BHTC, v_BHTC = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BTD = attend(q_BHTC, k_BHTC, v_BHTC).transpose(1, 2).reshape(images, tokens, width)
        projected: Tensor = self.proj(mixed_BTD)
        return projected


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

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each token."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BTD)))
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

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each token."""
        gate, value = self.fc1(x_BTD).chunk(2, dim=-1)
        out: Tensor = self.fc2(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """One learned factor per channel of a residual branch."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Scale the branch."""
        return x_BTD * self.gamma


class Block(nn.Module):
    """One pre-norm transformer block with stochastic depth on both of its branches."""

    def __init__(self, arch: Arch, drop_path: float) -> None:
        super().__init__()
        width, hidden = arch.width, int(arch.width * arch.mlp_ratio)
        scale = arch.layer_scale
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, arch.heads)
        self.ls1 = nn.Identity() if scale is None else LayerScale(width, scale)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = SwiGlu(width, hidden) if arch.ffn == "swiglu" else Mlp(width, hidden)
        self.ls2 = nn.Identity() if scale is None else LayerScale(width, scale)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Add the attention branch, then the MLP branch."""
        x_BTD = self._add(x_BTD, self._attended)
        return self._add(x_BTD, self._transformed)

    def _attended(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(x_BTD)))
        return out

    def _transformed(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.ls2(self.mlp(self.norm2(x_BTD)))
        return out

    def _add(self, x_BTD: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return x_BTD + branch(x_BTD)
        # Only the images that keep the branch are computed. Rounding at random keeps the expected share exact at any
        # batch size, and one image always stays, so that every parameter has a gradient. The draws are on the CPU:
        # the same images are dropped on every device.
        images = x_BTD.shape[0]
        kept = max(1, int(images * (1.0 - self.drop_path) + torch.rand(()).item()))
        rows = torch.randperm(images)[:kept].to(x_BTD.device)
        return torch.index_add(x_BTD, 0, rows, branch(x_BTD[rows]), alpha=images / kept)


class VisionTransformer(nn.Module):
    """ViT backbone: images -> class token, registers and patch tokens after the final norm.

    Args:
        arch: Shape of the network.
        image_px: Side of the images that the position embedding is made for.
        drop_path: Share of images whose residual branch is dropped, the same in every block (DINOv2's
            `drop_path_uniform`).
    """

    def __init__(self, arch: Arch, image_px: int, drop_path: float = 0.0) -> None:
        super().__init__()
        self.grid = image_px // arch.patch_px
        self.prefix_tokens = 1 + arch.registers
        width = arch.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, arch.registers, width)) if arch.registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix_tokens + self.grid**2, width))
        self.patch_embed = PatchEmbed(arch.patch_px, width)
        self.blocks = nn.Sequential(*(Block(arch, drop_path) for _ in range(arch.depth)))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(
        self, images_B3HW: Tensor, mask_BN: Tensor | None = None, mask_token_1D: Tensor | None = None
    ) -> Tensor:
        """Tokens of the images.

        Args:
            images_B3HW: Normalised images; sides that differ from `image_px` resample the position embedding.
            mask_BN: bool, patches to hide; needs `mask_token_1D`.
            mask_token_1D: What stands in for a hidden patch.

        Returns:
            [B, 1 + registers + N, D]: class token, registers, patches in row-major order.
        """
        patches_BDhw = self.patch_embed(images_B3HW)
        rows, columns = patches_BDhw.shape[-2:]
        x_BND = patches_BDhw.flatten(2).transpose(1, 2)
        if mask_BN is not None and mask_token_1D is not None:
            x_BND = torch.where(mask_BN[..., None], mask_token_1D.to(x_BND.dtype), x_BND)
        prefix = [self.cls_token] if self.reg_token is None else [self.cls_token, self.reg_token]
        x_BTD = torch.cat([*(token.expand(x_BND.shape[0], -1, -1) for token in prefix), x_BND], dim=1)
        x_BTD = x_BTD + self._positions(rows, columns)
        tokens_BTD: Tensor = self.norm(self.blocks(x_BTD))
        return tokens_BTD

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position embedding [1, prefix + rows * columns, D], resampled as timm does: bicubic, antialiased, fp32."""
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        prefix, patches = self.pos_embed.tensor_split([self.prefix_tokens], dim=1)
        plane_1Dgg = patches.float().transpose(1, 2).reshape(1, -1, self.grid, self.grid)
        plane_1Dhw = F.interpolate(plane_1Dgg, size=(rows, columns), mode="bicubic", antialias=True)
        return torch.cat([prefix, plane_1Dhw.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)
