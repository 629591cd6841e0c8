"""What tells of the health of a run: how many directions the class tokens take, how many prototypes the teacher uses.

Each is made of sums over tiles, so that ranks can add theirs up.

Shape suffixes: M rows, K prototypes, D width.
"""

import torch
from torch import Tensor

from histoscale.objectives.assignment import Assignment
from histoscale.objectives.logits import CHUNK_ELEMENTS, Workspace, chunks


@torch.no_grad()
def gram(features_MD: Tensor) -> Tensor:
    """Sum of the outer products of rows with themselves, [D, D], fp64: small singular values would drown in fp32."""
    features_MD = features_MD.double()
    return features_MD.T @ features_MD


@torch.no_grad()
def effective_rank(gram_DD: Tensor) -> float:
    """RankMe (arXiv 2210.02885): the exponential of the entropy of the features' singular values.

    Args:
        gram_DD: Of all features; see `gram`.

    Returns:
        From 1, where all features lie on one line, to the width or the number of features. Features that are all zero
        have rank 1.
    """
    return perplexity(torch.linalg.eigvalsh(gram_DD).clamp_min(0.0).sqrt())


@torch.no_grad()
def perplexity(weights: Tensor) -> float:
    """Exponential of the entropy of weights that need not sum to one: how many of them count."""
    total = weights.sum()
    return float(torch.special.entr(weights / total).sum().exp()) if total > 0.0 else 1.0


@torch.no_grad()
def assignment_sums(assignment: Assignment, chunk_elements: int = CHUNK_ELEMENTS) -> tuple[Tensor, Tensor]:
    """How sure the teacher is, and which prototypes it prefers.

    What is preferred is told before the potentials even it out: Sinkhorn-Knopp gives every prototype its share whatever
    the teacher sees.

    Args:
        assignment: Of M rows.
        chunk_elements: Logits held at a time.

    Returns:
        Sum of the entropies of the rows, in nats, and sum of the rows' probabilities without potentials, [K]; fp64.
    """
    features_ME, prototypes_KE = assignment.features_ME, assignment.prototypes_KE
    parts = chunks(len(features_ME), len(prototypes_KE), chunk_elements)
    workspace = Workspace(parts[0].stop if parts else 0, prototypes_KE)
    entropy = torch.zeros((), dtype=torch.float64, device=features_ME.device)
    preferred_K = torch.zeros(len(prototypes_KE), dtype=torch.float64, device=features_ME.device)
    for part in parts:
        logits_mK = workspace.logits(features_ME[part], prototypes_KE, assignment.temperature)
        preferred_K += logits_mK.softmax(dim=1).sum(dim=0)
        entropy += torch.special.entr(assignment.probs(part, workspace)).sum()
    return entropy, preferred_K
