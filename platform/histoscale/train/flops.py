"""Floating-point operations of a training step, exact by architecture: what a throughput is worth.

Only what the model needs counts (a product of m x k by k x n is 2 m k n): forward of the teacher, forward and backward
of the student, of backbone and heads. What is computed twice to save memory, norms, activations, losses, augmentation
and the optimiser do not count.
"""

from histoscale.config.archs import Arch
from histoscale.config.recipe import HeadSection, Recipe
from histoscale.errors import RecipeError

_FORWARD_AND_BACKWARD = 3  # the backward pass makes two products for each of the forward pass


def tokens_of(arch: Arch, side_px: int) -> int:
    """Tokens of one image: class, registers and patches."""
    return 1 + arch.registers + (side_px // arch.patch_px) ** 2


def block_flops(arch: Arch, tokens: int) -> int:
    """Forward pass of one block over one image."""
    linear = 4 * arch.width**2 + (2 if arch.ffn == "mlp" else 3) * arch.width * arch.ffn_hidden
    return 2 * tokens * linear + 4 * tokens**2 * arch.width


def patch_flops(arch: Arch, side_px: int) -> int:
    """Projection of the patches of one image."""
    return 2 * (side_px // arch.patch_px) ** 2 * 3 * arch.patch_px**2 * arch.width


def head_flops(width: int, heads: HeadSection, bottleneck: int, prototypes: int) -> int:
    """Forward pass of a projection head over one token, its logits included."""
    hidden = heads.hidden_dim
    return 2 * (width * hidden + hidden**2 + hidden * bottleneck + bottleneck * prototypes)


def step_flops_per_tile(recipe: Recipe, arch: Arch) -> float:
    """All of one tile's share of a step of pretraining: teacher, student, heads; masked patches at their mean number.

    Stochastic depth leaves out its share of the student's blocks.

    Raises:
        RecipeError: The recipe distils.
    """
    if recipe.distill is not None:
        raise RecipeError(
            "the work of a step is counted for pretraining alone",
            value=f"distill.mode={recipe.distill.mode}",
            expected="a recipe without the section `distill`",
            remedy="leave the section out to count a run of the student without a teacher",
        )
    crops, heads = recipe.crops, recipe.heads
    low, high = recipe.loss.mask_ratio
    masked = (crops.global_px // arch.patch_px) ** 2 * (low + high) / 2.0  # one of the two global crops is masked
    dino = head_flops(arch.width, heads, heads.dino_bottleneck_dim, heads.dino_prototypes)
    ibot = head_flops(arch.width, heads, heads.ibot_bottleneck_dim, heads.ibot_prototypes)
    patches = masked * (dino if heads.shared else ibot)
    blocks_global, blocks_local = (
        arch.depth * block_flops(arch, tokens_of(arch, side_px)) for side_px in (crops.global_px, crops.local_px)
    )
    embed_global, embed_local = (patch_flops(arch, side_px) for side_px in (crops.global_px, crops.local_px))
    teacher = 2 * (blocks_global + embed_global + dino) + patches
    student = (1.0 - recipe.model.drop_path) * (2 * blocks_global + crops.local_count * blocks_local)
    student += (2 + crops.local_count) * dino + patches
    # No gradient flows into the pixels: the backward pass of the patches makes one product.
    embedding = 2 * (2 * embed_global + crops.local_count * embed_local)
    return teacher + _FORWARD_AND_BACKWARD * student + embedding
