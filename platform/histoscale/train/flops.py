"""Floating-point operations of a training step, exact by architecture: what a throughput is worth.

Only what the model needs counts (a product of m x k by k x n is 2 m k n): forward of the teacher, forward and backward
of the student, of backbone and heads. What is computed twice to save memory, norms, activations, losses, augmentation
and the optimiser do not count.
"""

from histoscale.config.archs import ARCHS, Arch
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


def step_flops_per_tile(recipe: Recipe, arch: Arch, teacher: Recipe | None = None) -> float:
    """All of one tile's share of a step: teacher, student, heads; masked patches at their mean number.

    Stochastic depth leaves out its share of the student's blocks. In distillation nothing is masked, and the heads, or
    the projectors to the teacher's width, see every patch of both global crops.

    Args:
        recipe: Of the run.
        arch: Of its model.
        teacher: The recipe with the frozen teacher's model and heads in place of the student's; in distillation alone.

    Raises:
        RecipeError: The recipe distils, and the teacher is not given.
    """
    if recipe.distill is None:
        return _looking(recipe, arch, _masked(recipe, arch)) + _learning(recipe, arch, _masked(recipe, arch))
    if teacher is None:
        raise RecipeError(
            "the work of a distilled step depends on its teacher",
            value=f"distill.mode={recipe.distill.mode}",
            expected="the teacher's recipe beside it",
            remedy="give it, or leave the section `distill` out to count a run of the student without a teacher",
        )
    looks, patches = ARCHS[teacher.model.arch], 2.0 * _patches(recipe, arch)
    if recipe.distill.mode == "heads":
        at_teacher = recipe.model_copy(update={"heads": teacher.heads})
        return _looking(at_teacher, looks, 2.0 * _patches(recipe, looks)) + _learning(recipe, arch, patches)
    projectors = 2 * (2 + patches) * arch.width * looks.width
    student = 2 * _backbone(recipe, arch)[0] + projectors
    embedding = 2 * 2 * patch_flops(arch, recipe.crops.global_px)
    teacher_pass = 2 * (_backbone(recipe, looks)[0] + patch_flops(looks, recipe.crops.global_px))
    return teacher_pass + _FORWARD_AND_BACKWARD * student + embedding


def _patches(recipe: Recipe, arch: Arch) -> int:
    """Of one global crop."""
    return (recipe.crops.global_px // arch.patch_px) ** 2


def _masked(recipe: Recipe, arch: Arch) -> float:
    """Patches of a tile that iBOT compares in pretraining: one of the two global crops is masked."""
    low, high = recipe.loss.mask_ratio
    return _patches(recipe, arch) * (low + high) / 2.0


def _backbone(recipe: Recipe, arch: Arch) -> tuple[int, int]:
    """Forward pass of all blocks over one global and one local crop."""
    crops = recipe.crops
    large, small = (arch.depth * block_flops(arch, tokens_of(arch, px)) for px in (crops.global_px, crops.local_px))
    return large, small


def _heads(recipe: Recipe, arch: Arch) -> tuple[int, int]:
    """Forward pass of the heads over one class token and one patch."""
    heads = recipe.heads
    dino = head_flops(arch.width, heads, heads.dino_bottleneck_dim, heads.dino_prototypes)
    ibot = head_flops(arch.width, heads, heads.ibot_bottleneck_dim, heads.ibot_prototypes)
    return dino, dino if heads.shared else ibot


def _looking(recipe: Recipe, arch: Arch, patches: float) -> float:
    """The teacher's forward pass over both global crops, with heads."""
    dino, ibot = _heads(recipe, arch)
    embed = patch_flops(arch, recipe.crops.global_px)
    return 2 * (_backbone(recipe, arch)[0] + embed + dino) + patches * ibot


def _learning(recipe: Recipe, arch: Arch, patches: float) -> float:
    """The student's forward and backward pass over all crops, with heads."""
    crops, (dino, ibot), (large, small) = recipe.crops, _heads(recipe, arch), _backbone(recipe, arch)
    student = (1.0 - recipe.model.drop_path) * (2 * large + crops.local_count * small)
    student += (2 + crops.local_count) * dino + patches * ibot
    # No gradient flows into the pixels: the backward pass of the patches makes one product.
    embed_large, embed_small = (patch_flops(arch, px) for px in (crops.global_px, crops.local_px))
    return _FORWARD_AND_BACKWARD * student + 2 * (2 * embed_large + crops.local_count * embed_small)
