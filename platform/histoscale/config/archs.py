"""The sizes of vision transformer that a recipe can name."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Arch:
    """Shape of one vision transformer.

    Attributes:
        patch_px: Side of a patch.
        width: Width of a token.
        registers: Register tokens beside the class token.
        mlp_ratio: Hidden width of the MLP over `width`; for `swiglu`, of its packed first layer.
        layer_scale: Initial value of LayerScale, or None without it.
        init_std: Standard deviation of the initial matrices, or None for one over the square root of their fan-in.
            0.02, DINOv2's, suits widths of about a thousand; at a tenth of that it makes blocks that hardly act.
    """

    patch_px: int
    depth: int
    width: int
    heads: int
    registers: int = 0
    mlp_ratio: float = 4.0
    ffn: Literal["mlp", "swiglu"] = "mlp"
    layer_scale: float | None = 1e-5
    init_std: float | None = 0.02


# vit_test14 and vit_micro14 are ours, for tests and for machines without a GPU. S, B, L and H are the standard sizes
# (Dosovitskiy et al., arXiv 2010.11929). H is Virchow2's: SwiGLU with the packed ratio of its model card's timm kwargs.
ARCHS: dict[str, Arch] = {
    "vit_test14": Arch(patch_px=14, depth=2, width=32, heads=2, registers=1),
    "vit_micro14": Arch(patch_px=14, depth=4, width=128, heads=4, layer_scale=None, init_std=None),
    "vit_ti14": Arch(patch_px=14, depth=12, width=192, heads=3),
    "vit_s14": Arch(patch_px=14, depth=12, width=384, heads=6, layer_scale=None),
    "vit_s14_reg4": Arch(patch_px=14, depth=12, width=384, heads=6, registers=4),
    "vit_b14_reg4": Arch(patch_px=14, depth=12, width=768, heads=12, registers=4),
    "vit_l14_reg4": Arch(patch_px=14, depth=24, width=1024, heads=16, registers=4),
    "vit_h14_reg4": Arch(patch_px=14, depth=32, width=1280, heads=16, registers=4, mlp_ratio=5.3375, ffn="swiglu"),
}
