"""Activations of a micro-step, in bytes: what student, teacher and losses hold, and when.

Counted from the code of models/, objectives/ and train/objective.py: a tensor counts where the backward pass, or a name
that lives on, keeps it. Vectors do not count. H is the hidden width of the MLP.
"""

import math
from dataclasses import dataclass

from histoscale.config.archs import Arch
from histoscale.config.recipe import Recipe
from histoscale.objectives.logits import CHUNK_ELEMENTS
from histoscale.train.flops import tokens_of

FP32_BYTES = 4


@dataclass(frozen=True)
class Rank:
    """What a rank computes, in numbers.

    Attributes:
        recipe: The run's.
        arch: Of the network, student or teacher.
        workers: Ranks.
        stage: Of ZeRO.
        element_bytes: Of an element that is computed with.
        on_cpu: A CPU holds what was written, a GPU what was allocated; attention and DeepSpeed's buckets differ, too.
        projects_to: In distillation from features, how wide a student's projectors make its tokens; 0 for the teacher,
            which has none. None where networks have heads.
    """

    recipe: Recipe
    arch: Arch
    workers: int
    stage: int
    element_bytes: int
    on_cpu: bool
    projects_to: int | None = None

    @property
    def bf16(self) -> bool:
        """Whether what is computed with is not fp32."""
        return self.element_bytes < FP32_BYTES

    @property
    def turns(self) -> int:
        """Micro-steps of a step."""
        return math.ceil(self.recipe.batch.replicas / self.workers)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(images, tokens of each) of a micro-batch, of each size."""
        crops, tiles = self.recipe.crops, self.recipe.batch.per_replica
        sizes = [(2 * tiles, crops.global_px), (crops.local_count * tiles, crops.local_px)]
        return [(images, tokens_of(self.arch, side_px)) for images, side_px in sizes if images]

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return sum(images * tokens for images, tokens in self.spans)

    @property
    def patches(self) -> int:
        """Of the global crops of a micro-batch."""
        return 2 * self.recipe.batch.per_replica * (self.recipe.crops.global_px // self.arch.patch_px) ** 2

    @property
    def compared(self) -> int:
        """Patches of a micro-batch that iBOT compares: all in distillation, else one crop of two is masked."""
        low, high = self.recipe.loss.mask_ratio
        return self.patches if self.recipe.distill else round(self.patches / 2 * (low + high) / 2)

    @property
    def heads(self) -> list["Head"]:
        """The heads with the rows of a micro-batch that the student sends through them."""
        if self.projects_to is not None:
            return []
        heads, tiles = self.recipe.heads, self.recipe.batch.per_replica
        crops = 2 + self.recipe.crops.local_count
        if heads.shared:
            return [Head(heads.dino_bottleneck_dim, heads.dino_prototypes, crops * tiles + self.compared)]
        return [
            Head(heads.dino_bottleneck_dim, heads.dino_prototypes, crops * tiles),
            Head(heads.ibot_bottleneck_dim, heads.ibot_prototypes, self.compared),
        ]


@dataclass(frozen=True)
class Head:
    """One projection head.

    Attributes:
        rows: Tokens of a micro-batch that go through it.
    """

    bottleneck: int
    prototypes: int
    rows: int

    @property
    def prototype_elements(self) -> int:
        """Of all prototypes."""
        return self.bottleneck * self.prototypes


def block_bytes(rank: Rank) -> int:
    """What one block keeps for its backward pass.

    For each token of the images that stay: input and output of both norms and the input of the projection (5 widths),
    what attention keeps, and of the MLP fc1 and GELU (2 H), or with SwiGLU gate, value, activated gate and product
    (4 H). LayerScale keeps both branches before it, stochastic depth both after it (2 widths each).
    """
    arch, size, dropped = rank.arch, rank.element_bytes, rank.recipe.model.drop_path
    widths = 5 + (0 if arch.layer_scale is None else 2) + (2 if dropped else 0)
    hidden = (2 if arch.ffn == "mlp" else 4) * arch.ffn_hidden
    # Mean and deviation of both norms: a GPU has them in fp32.
    statistics = 4 * (size if rank.on_cpu else FP32_BYTES)
    total = 0.0
    for images, tokens in rank.spans:
        kept = max(1.0, images * (1.0 - dropped)) if dropped else images
        each = (widths * arch.width + hidden) * size + statistics + _attention_bytes(rank, tokens)
        total += kept * tokens * each
    return round(total)


def _attention_bytes(rank: Rank, tokens: int) -> int:
    """What attention keeps for one token.

    The fused kernels keep queries, keys and values (3 widths), and in fp32 the sum of each row and head. They keep
    their result as well: it is the projection's input, which `block_bytes` counts, unless that is a copy (then 1 more),
    because images of several sizes are packed, or because the heads do not lie together after `qk_norm`. The plain
    product, which a CPU takes in bf16, keeps copies of queries, keys and values (3) and all scores. `qk_norm` keeps its
    inputs, which are one tensor with the values (3), beside what it makes of two of them, and statistics.
    """
    arch, size = rank.arch, rank.element_bytes
    normed, several = rank.recipe.model.qk_norm, len(rank.spans) > 1
    statistics = 4 * arch.heads * (size if rank.on_cpu else FP32_BYTES) if normed else 0
    if rank.on_cpu and rank.bf16:
        return ((6 if normed else 3) * arch.width + arch.heads * tokens) * size + statistics
    widths = 3 + (2 if normed else 0) + (1 if normed or several else 0)
    return widths * arch.width * size + arch.heads * FP32_BYTES + statistics


def saved_by_blocks(rank: Rank) -> int:
    """What all blocks keep; with checkpointing only their inputs."""
    if rank.recipe.cluster.activation_checkpointing:
        return rank.arch.depth * rank.tokens * rank.arch.width * rank.element_bytes
    return rank.arch.depth * block_bytes(rank)


def saved_by_heads(rank: Rank) -> int:
    """Inputs of three layers and of two GELUs, the bottleneck in fp32, and in bf16 the prototypes in fp32."""
    hidden, total = rank.recipe.heads.hidden_dim, 0
    for head in rank.heads:
        total += head.rows * ((rank.arch.width + 4 * hidden) * rank.element_bytes + head.bottleneck * FP32_BYTES)
        total += head.prototype_elements * FP32_BYTES if rank.bf16 else 0
    return total


def saved_by_loss(rank: Rank) -> int:
    """The cross-entropies make their gradients along with their values: those of features and prototypes."""
    return sum(head.prototype_elements + head.rows * head.bottleneck for head in rank.heads) * rank.element_bytes


def looking_bytes(looks: Rank) -> int:
    """The largest of: crops before they are cast, prototypes on their way to the sphere, a block, a head at work.

    A block without a backward pass holds its input, the norm's output and two tensors of the MLP's hidden width (four
    for SwiGLU); the plain product of attention has queries, keys and values twice, and the scores twice. A head has the
    last tokens, the rows that it projects, and two tensors of its hidden width.
    """
    arch, size = looks.arch, looks.element_bytes
    images, tokens = looks.spans[0]
    hidden = (2 if arch.ffn == "mlp" else 4) * arch.ffn_hidden
    widths = 2 * arch.width + hidden
    if looks.on_cpu and looks.bf16:
        widths = max(widths, 9 * arch.width + 2 * arch.heads * tokens)
    largest = max((head.prototype_elements for head in looks.heads), default=0)
    cast, spheres = (
        (crop_elements(looks) * FP32_BYTES, 2 * largest * FP32_BYTES) if looks.bf16 else (0, largest * FP32_BYTES)
    )
    rows = looks.compared if looks.heads else 0
    head = (images * tokens * arch.width + rows * (arch.width + 2 * looks.recipe.heads.hidden_dim)) * size
    return max(cast, spheres, images * tokens * widths * size, head)


def seen_bytes(looks: Rank) -> int:
    """What the teacher makes of all local micro-batches, and the step keeps: features of heads, or whole tokens.

    Of heads these are those of the global crops' class tokens and of the compared patches.
    """
    images, tokens = looks.spans[0]
    bottlenecks = [head.bottleneck for head in looks.heads]
    each = images * tokens * looks.arch.width
    if bottlenecks:
        each = images * bottlenecks[0] + looks.compared * bottlenecks[-1]
    return looks.turns * each * looks.element_bytes


def balancing_bytes(rank: Rank) -> int:
    """Logits of the local rows or of a chunk, in fp32 and beside it in bf16, twice where all are one chunk.

    Centring takes one product, for which bf16 prototypes are made fp32. Features are not balanced.
    """
    if not rank.heads:
        return 0
    if rank.recipe.loss.centering == "center":
        return max(head.prototype_elements for head in rank.heads) * FP32_BYTES if rank.bf16 else 0
    dino, ibot = rank.heads[0].prototypes, rank.heads[-1].prototypes
    crops = 2 * rank.recipe.batch.per_replica
    largest = 0
    for prototypes, rows in ((dino, crops * rank.turns), (ibot, rank.compared * rank.turns)):
        alone = rows * prototypes <= CHUNK_ELEMENTS
        each = (2 if alone else 1) * FP32_BYTES + _narrow(rank)
        largest = max(largest, _chunk(rows, prototypes) * each)
    return largest


def _narrow(rank: Rank) -> int:
    return rank.element_bytes if rank.bf16 else 0


def predicting_items(rank: Rank) -> dict[str, int]:
    """What the cross-entropies hold beside what they keep: one chunk of logits of student and teacher, and prototypes.

    In bf16 the gradient of the prototypes is summed in fp32. The class tokens keep the last norm's output.
    """
    tiles, crops = rank.recipe.batch.per_replica, 2 + rank.recipe.crops.local_count
    heads = rank.recipe.heads
    chunks = [_chunk(tiles, (crops + 2) * heads.dino_prototypes), _chunk(rank.compared, 2 * rank.heads[-1].prototypes)]
    elements = [head.prototype_elements for head in rank.heads]
    return {
        "logits": max(chunks) * (FP32_BYTES + _narrow(rank)),
        "student's prototypes": sum(elements) * rank.element_bytes,
        "sum of the prototypes' gradient": max(elements) * FP32_BYTES if rank.bf16 else 0,
        "last tokens": rank.tokens * rank.arch.width * rank.element_bytes,
    }


def _chunk(rows: int, elements_per_row: int) -> int:
    return min(rows, max(1, CHUNK_ELEMENTS // elements_per_row)) * elements_per_row


def prototypes_backward_bytes(rank: Rank) -> int:
    """The quotient x / |x| needs four tensors in its backward pass; in bf16 its gradient is made fp32 before."""
    return max(head.prototype_elements for head in rank.heads) * FP32_BYTES * (5 if rank.bf16 else 4)


def block_backward_bytes(rank: Rank) -> int:
    """Gradients of a block's output and of the MLP's hidden layer, which SwiGLU has twice."""
    hidden = (1 if rank.arch.ffn == "mlp" else 2) * rank.arch.ffn_hidden
    return rank.tokens * (rank.arch.width + hidden) * rank.element_bytes


def crop_elements(rank: Rank) -> int:
    """Values of all crops of a micro-batch."""
    crops = rank.recipe.crops
    return 3 * rank.recipe.batch.per_replica * (2 * crops.global_px**2 + crops.local_count * crops.local_px**2)
