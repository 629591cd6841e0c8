"""The objectives give the figures of the public DINOv2 implementation on the same tensors.

The figures come from facebookresearch/dinov2 at b8931f7: DINOLoss, iBOTPatchLoss and KoLeoLoss with the weighting of
its training step, on the tensors that `waves` rebuilds, in fp64 where that code allows it (Sinkhorn-Knopp is fp32).
Gradients are recorded as their norm and as a projection on cosines.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from histoscale.objectives import Assignment, centered, dino_losses, ibot_loss, koleo_loss, logit_sums, sinkhorn

PROTOTYPES, WIDTH, TILES, LOCALS, PATCHES = 12, 6, 4, 3, 9
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05


def waves(*shape: int, speed: float) -> Tensor:
    """Rows on the unit sphere, from sines of 1, 2, 3, ... times the speed."""
    return F.normalize(sines(*shape, speed=speed), dim=-1)


def sines(*shape: int, speed: float) -> Tensor:
    steps = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    return torch.sin(speed * steps).view(shape)


def assign(centering: str, rows: int, speed: float) -> Assignment:
    """The targets: with Sinkhorn-Knopp, or with a centre that started at zero and saw these rows once."""
    features, prototypes = waves(rows, WIDTH, speed=speed), waves(PROTOTYPES, WIDTH, speed=1.9)
    if centering == "sinkhorn":
        return sinkhorn(features, prototypes, TEACHER_TEMPERATURE, 3, rows)
    center = 0.1 * logit_sums(features, prototypes) / rows
    return centered(features, prototypes, TEACHER_TEMPERATURE, center)


def compare(loss: Tensor, leaves: tuple[Tensor, ...], expected: tuple[float, ...]) -> None:
    """Expected: the loss, then norm and projection of each gradient."""
    got = [loss.item()]
    for gradient in torch.autograd.grad(loss, leaves):
        along = torch.cos(torch.arange(gradient.numel(), dtype=torch.float64)).view(gradient.shape)
        got += [gradient.norm().item(), (gradient * along).sum().item()]
    assert got == pytest.approx(expected, rel=2e-6)


def test_sinkhorn() -> None:
    expected = [
        0.18571346998214722, 0.10747510194778442, 0.0012336868094280362, 1.8176588127971627e-05, 0.002829482313245535,
        0.1877679079771042, 0.16095630824565887, 0.011390753090381622, 3.3154021366499364e-05, 0.00011683014599839225,
        0.1618923395872116, 0.1805727779865265,
    ]  # fmt: skip
    got = assign("sinkhorn", 2 * TILES, 0.7).probs(slice(0, 1))[0].tolist()
    assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("centering", "expected"),
    [
        (
            "sinkhorn",
            (10.800980275050147, 2.3218112001535327, -0.2308563391207949, 3.3474424371268663, -0.16447958481484393),
        ),
        (
            "center",
            (10.994339993138317, 2.3117071040994754, -0.28789768163285656, 3.384160466481702, -0.1997705709909111),
        ),
    ],
)
def test_dino(centering: str, expected: tuple[float, ...]) -> None:
    targets = assign(centering, 2 * TILES, 0.7)
    student = waves((2 + LOCALS) * TILES, WIDTH, speed=3.1).requires_grad_()
    prototypes = waves(PROTOTYPES, WIDTH, speed=2.9).requires_grad_()
    loss = dino_losses(student, prototypes, targets, LOCALS, STUDENT_TEMPERATURE)[0]
    compare(loss, (student, prototypes), expected)


def test_the_global_pairs_of_dino_alone() -> None:
    """Without local crops the divisor is 2, not 2 + 2n."""
    targets = assign("sinkhorn", 2 * TILES, 0.7)
    student, prototypes = waves((2 + LOCALS) * TILES, WIDTH, speed=3.1), waves(PROTOTYPES, WIDTH, speed=2.9)
    loss = dino_losses(student[: 2 * TILES], prototypes, targets, 0, STUDENT_TEMPERATURE)[0]
    assert loss.item() * 2 / (2 + 2 * LOCALS) == pytest.approx(2.5889237958795834, rel=1e-6)


@pytest.mark.parametrize(
    ("centering", "expected"),
    [
        (
            "sinkhorn",
            (4.15276624682488, 1.8135532155794272, 1.1295147226688065, 2.5871364316555767, -0.017856813702072483),
        ),
        (
            "center",
            (4.163735008312398, 1.8418337086647953, 1.1573751581424578, 2.5833036643686396, -0.021959782301020414),
        ),
    ],
)
def test_ibot(centering: str, expected: tuple[float, ...]) -> None:
    mask = sines(2 * TILES, PATCHES, speed=2.3) > 0.35
    mask[5] = False
    masked = int(mask.sum())
    assert masked == 25
    targets = assign(centering, masked, 1.3)
    student = waves(masked, WIDTH, speed=4.3).requires_grad_()
    prototypes = waves(PROTOTYPES, WIDTH, speed=2.9).requires_grad_()
    loss = ibot_loss(student, prototypes, targets, mask, STUDENT_TEMPERATURE)
    compare(loss, (student, prototypes), expected)


def test_koleo() -> None:
    cls = sines(2 * TILES, 5, speed=2.7).requires_grad_()
    first, second = cls.chunk(2)
    loss = koleo_loss(first) + koleo_loss(second)
    compare(loss, (cls,), (0.4365863031857121, 0.9064278280834371, -0.24145787591931722))
