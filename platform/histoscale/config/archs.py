"""The sizes of vision transformer that a recipe can name."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Arch:
    """Shape of one vision transformer.

    Attributes:
        patch_px: Side of a patch.
        depth: Blocks.
        width: Width of a token.
        heads: Attention heads; they share the width evenly.
        registers: Register tokens beside the class token.
        mlp_width: Hidden width of the plain MLP; None for four times `width`. A gated one of about as many parameters
            takes its place for `swiglu`: see `ffn_hidden`.
        ffn: What follows the attention in a block.
        layer_scale: Initial value of LayerScale, or None without it.
        init_std: Standard deviation of the initial matrices, or None for one over the square root of their fan-in.
            0.02, DINOv2's, suits widths of about a thousand; at a tenth of that it makes blocks that hardly act.
    """

    patch_px: int
    depth: int
    width: int
    heads: int
    registers: int = 0
    mlp_width: int | None = None
    ffn: Literal["mlp", "swiglu"] = "mlp"
    layer_scale: float | None = 1e-5
    init_std: float | None = 0.02

    @property
    def ffn_hidden(self) -> int:
        """Hidden width of a block's MLP; for `swiglu` the width after gating, half of its packed first layer.

        Gating needs a third matrix, so two thirds of the width keep the count of parameters; DINOv2's fused SwiGLU
        rounds them up to a multiple of 8.
        """
        plain = 4 * self.width if self.mlp_width is None else self.mlp_width
        return plain if self.ffn == "mlp" else (plain * 2 // 3 + 7) // 8 * 8


# vit_test14 is ours, for tests, and vit_nano14, vit_micro14 and vit_mini14, which differ in width alone, for machines
# without a GPU. Ti to H are the standard sizes
# (Dosovitskiy et al., arXiv 2010.11929; Touvron et al., arXiv 2012.12877), giant is DINOv2's (arXiv 2304.07193).
# LayerScale is DINOv2's, which has it at every size; vit_s14 has none, as Virchow2G Mini. vit_h14 and vit_h14_reg4 are
# Virchow's and Virchow2's, with SwiGLU. vit_gigantic14_reg8 stands for Virchow2G: its depth, width and heads are
# inferred from 1.85 billion parameters and from the usual ViT-G (Zhai et al., arXiv 2106.04560), not published.
ARCHS: dict[str, Arch] = {
    "vit_test14": Arch(patch_px=14, depth=2, width=32, heads=2, registers=1),
    "vit_nano14": Arch(patch_px=14, depth=4, width=64, heads=2, layer_scale=None, init_std=None),
    "vit_micro14": Arch(patch_px=14, depth=4, width=128, heads=4, layer_scale=None, init_std=None),
    "vit_mini14": Arch(patch_px=14, depth=4, width=192, heads=6, layer_scale=None, init_std=None),
    "vit_ti14": Arch(patch_px=14, depth=12, width=192, heads=3),
    "vit_ti16": Arch(patch_px=16, depth=12, width=192, heads=3),
    "vit_s14": Arch(patch_px=14, depth=12, width=384, heads=6, layer_scale=None),
    "vit_s14_scaled": Arch(patch_px=14, depth=12, width=384, heads=6),
    "vit_s14_reg4": Arch(patch_px=14, depth=12, width=384, heads=6, registers=4),
    "vit_s16": Arch(patch_px=16, depth=12, width=384, heads=6),
    "vit_b14": Arch(patch_px=14, depth=12, width=768, heads=12),
    "vit_b14_reg4": Arch(patch_px=14, depth=12, width=768, heads=12, registers=4),
    "vit_b16": Arch(patch_px=16, depth=12, width=768, heads=12),
    "vit_l14": Arch(patch_px=14, depth=24, width=1024, heads=16),
    "vit_l14_reg4": Arch(patch_px=14, depth=24, width=1024, heads=16, registers=4),
    "vit_l16": Arch(patch_px=16, depth=24, width=1024, heads=16),
    "vit_h14": Arch(patch_px=14, depth=32, width=1280, heads=16, ffn="swiglu"),
    "vit_h14_reg4": Arch(patch_px=14, depth=32, width=1280, heads=16, registers=4, ffn="swiglu"),
    "vit_giant14": Arch(patch_px=14, depth=40, width=1536, heads=24, ffn="swiglu"),
    "vit_giant14_reg4": Arch(patch_px=14, depth=40, width=1536, heads=24, registers=4, ffn="swiglu"),
    "vit_gigantic14_reg8": Arch(patch_px=14, depth=48, width=1664, heads=16, registers=8, mlp_width=8192, ffn="swiglu"),
}
