"""Activations of distillation from features, in bytes: what projectors and cosines hold, and when; see activations.py.

Rows are the class tokens and patches of the global crops; W is the teacher's width.
"""

from histoscale.train.activations import FP32_BYTES, Rank


def _features(rank: Rank) -> int:
    """Elements of the rows at the teacher's width."""
    return (2 * rank.recipe.batch.per_replica + rank.patches) * (rank.projects_to or 0)


def saved_by_projectors(rank: Rank) -> int:
    """The patches once more: in the tokens they do not lie together. Class tokens are a view."""
    return rank.patches * rank.arch.width * rank.element_bytes


def saved_by_cosines(rank: Rank) -> int:
    """The student's features, and the teacher's on the unit sphere, both in fp32."""
    return 2 * _features(rank) * FP32_BYTES


def cosines_bytes(rank: Rank, looks: Rank) -> int:
    """The largest of: the teacher's patches on their way to the student's grid, the cosines of the patches.

    To resample them takes them in fp32, and once more where they were bf16, and the result. A cosine has the result, or
    an fp32 copy, the student's patches on the unit sphere, and the product. In bf16 the projected features stay, too.
    """
    width = rank.projects_to or 0
    theirs, ours = looks.patches * width, rank.patches * width
    moves = looks.patches != rank.patches
    moving = (theirs * (2 if rank.bf16 else 1) + ours) * FP32_BYTES if moves else 0
    comparing = (2 + (1 if moves or rank.bf16 else 0)) * ours * FP32_BYTES
    return max(moving, comparing) + (_features(rank) * rank.element_bytes if rank.bf16 else 0)


def cosines_backward_bytes(rank: Rank) -> int:
    """The quotient x / |x| of the patches: two gradients, and four tensors on the way to that of |x|.

    The teacher's patches, which `saved_by_cosines` counts, are gone by then.
    """
    return 5 * rank.patches * (rank.projects_to or 0) * FP32_BYTES
