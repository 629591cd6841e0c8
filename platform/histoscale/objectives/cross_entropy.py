"""Cross-entropy of the student's predictions with the teacher's assignments, in memory that the rows do not set.

The logits of all rows never exist: a chunk of rows is taken through its loss and its gradients before the next one.

Shape suffixes: M rows, m rows of a chunk, K prototypes, E bottleneck, C student crops, T teacher crops.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from histoscale.objectives.assignment import Assignment
from histoscale.objectives.logits import CHUNK_ELEMENTS, Workspace, chunks


def cross_entropy(
    student_CME: Tensor,
    prototypes_KE: Tensor,
    targets: Assignment,
    pairs_CT: Tensor,
    weights_M: Tensor,
    temperature: float,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Weighted sum of the cross-entropies of student rows with teacher rows.

    - sum_{c,t,m} pairs[c,t] weights[m] <P[t M + m], log_softmax(student[c,m] @ prototypes.T / temperature)>, with P the
    targets. The gradients are made along with the value, so the backward pass only scales them; there is no second
    derivative.

    Args:
        student_CME: The student's bottleneck, rows on the unit sphere.
        prototypes_KE: The student's prototypes, rows on the unit sphere, of the same dtype.
        targets: The assignments of T * M rows, crop-major.
        pairs_CT: Weight of each pair of crops, 0 where they are not compared.
        weights_M: Weight of each row.
        temperature: The student's; DINOv2 has 0.1.
        chunk_elements: Logits of student and teacher that are held at a time.

    Returns:
        Scalar in fp32 or finer; zero, with gradients of zero, where M is 0.
    """
    loss, _ = cross_entropy_and_parts(
        student_CME, prototypes_KE, targets, pairs_CT, weights_M, temperature, chunk_elements
    )
    return loss


def cross_entropy_and_parts(
    student_CME: Tensor,
    prototypes_KE: Tensor,
    targets: Assignment,
    pairs_CT: Tensor,
    weights_M: Tensor,
    temperature: float,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """What `cross_entropy` returns, and the part that each row has in it, [M], which has no gradient."""
    loss, parts_M = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        student_CME,
        prototypes_KE,
        targets,
        pairs_CT,
        weights_M,
        temperature,
        chunk_elements,
        torch.is_grad_enabled(),
    )
    return loss, parts_M


class _CrossEntropy(torch.autograd.Function):
    """A scalar whose gradients are known once it is, and its parts."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  its type has no public name
        student_CME: Tensor,
        prototypes_KE: Tensor,
        targets: Assignment,
        pairs_CT: Tensor,
        weights_M: Tensor,
        temperature: float,
        chunk_elements: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        (crops, rows, width), (count, views) = student_CME.shape, (len(prototypes_KE), pairs_CT.shape[1])
        dtype = torch.promote_types(student_CME.dtype, torch.float32)
        # A row's gradient is softmax - mean target, times its factor; the factor stays out of all that has K columns.
        share_C = pairs_CT.to(dtype).sum(dim=1)
        mean_CT = pairs_CT.to(dtype) / torch.where(share_C == 0, 1, share_C)[:, None]
        factor_MC = weights_M.to(dtype)[:, None] * share_C
        needs_student, needs_prototypes = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        gradient_CME = torch.zeros_like(student_CME) if needs_student else None
        gradient_KE = torch.zeros_like(prototypes_KE, dtype=dtype) if needs_prototypes else None
        parts_M = torch.zeros(rows, dtype=dtype, device=student_CME.device)
        parts = chunks(rows, (crops + views) * count, chunk_elements)
        largest = parts[0].stop if parts else 0
        student_space = Workspace(largest * crops, prototypes_KE)
        teacher_space = Workspace(largest * views, targets.prototypes_KE)
        targets = _rows_first(targets, views)
        for part in parts:
            student_nE = student_CME[:, part].transpose(0, 1).reshape(-1, width)
            logits_nK = student_space.logits(student_nE, prototypes_KE, temperature)
            target_nK = targets.probs(slice(part.start * views, part.stop * views), teacher_space)
            logits_mCK, target_mTK = logits_nK.view(-1, crops, count), target_nK.view(-1, views, count)
            losses_mC, sums_mC = _losses(logits_mCK, target_mTK, mean_CT)
            parts_M[part] = (factor_MC[part] * losses_mC).sum(dim=1)
            if not (needs_student or needs_prototypes):
                continue
            # After the exponentials this is the error times their sum, which the scale takes out again.
            logits_mCK.baddbmm_(sums_mC[:, :, None] * mean_CT, target_mTK, alpha=-1)
            errors_nK = student_space.narrowed(logits_nK)
            scale_n1 = (factor_MC[part] / (sums_mC * temperature)).view(-1, 1)
            if gradient_CME is not None:
                rows_mCE = ((errors_nK @ prototypes_KE) * scale_n1).view(-1, crops, width)
                gradient_CME[:, part] = rows_mCE.transpose(0, 1).to(student_CME.dtype)
            if gradient_KE is not None:
                _add_product(gradient_KE, errors_nK.T, (student_nE * scale_n1).to(student_CME.dtype))
        ctx.save_for_backward(gradient_CME, None if gradient_KE is None else gradient_KE.to(prototypes_KE.dtype))
        ctx.mark_non_differentiable(parts_M)
        return parts_M.sum(), parts_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        scaled = (None if each is None else each * gradient.to(each.dtype) for each in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None, None)


def _rows_first(targets: Assignment, views: int) -> Assignment:
    """Crop-major rows, reordered such that a slice holds all views of its rows."""
    rows, width = len(targets) // views, targets.features_ME.shape[1]
    by_row = targets.features_ME.view(views, rows, width).transpose(0, 1).reshape(rows * views, width)
    return replace(targets, features_ME=by_row)


def _losses(logits_mCK: Tensor, target_mTK: Tensor, mean_CT: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the mean target, and sum of the exponentials, which replace the logits; [m, C] each."""
    logits_mCK.sub_(logits_mCK.amax(dim=2, keepdim=True))
    agreement_mC = (torch.bmm(logits_mCK, target_mTK.mT) * mean_CT).sum(dim=2)
    sums_mC = logits_mCK.exp_().sum(dim=2)
    return sums_mC.log() - agreement_mC, sums_mC


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the total, at one go where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
