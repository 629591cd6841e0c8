"""Each objective against loops written from its definition, in fp64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from histoscale.objectives import Assignment, dino_losses, ibot_loss, kde_loss, koleo_loss, mean_cosine
from histoscale.objectives.cosine import cosine_distances

TILES, PROTOTYPES, WIDTH = 3, 5, 4


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def teacher(rows: int, dtype: torch.dtype = torch.float64) -> Assignment:
    features, prototypes = unit(rows, WIDTH, seed=1), unit(PROTOTYPES, WIDTH, seed=2)
    return Assignment(features.to(dtype), prototypes.to(dtype), 0.05, normal(PROTOTYPES, seed=3))


def cross_entropy(logits: Tensor, target: Tensor, temperature: float) -> float:
    exponentials = [math.exp(value / temperature) for value in logits.tolist()]
    return -sum(
        share * math.log(value / sum(exponentials)) for share, value in zip(target.tolist(), exponentials, strict=True)
    )


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def some_mask() -> Tensor:
    mask = torch.zeros(2 * TILES, 4, dtype=torch.bool)
    mask[0, [1, 2, 3]] = mask[3, 0] = mask[5, [0, 2]] = True
    return mask


@pytest.mark.parametrize("local_count", [0, 1, 8])
def test_dino_is_the_mean_over_all_pairs_of_different_crops(local_count: int) -> None:
    features, prototypes = unit((2 + local_count) * TILES, WIDTH), unit(PROTOTYPES, WIDTH, seed=4)
    targets = teacher(2 * TILES)
    probs, logits = targets.probs(slice(None)), features @ prototypes.T
    terms = []
    for tile in range(TILES):
        for student_crop in range(2 + local_count):
            for teacher_crop in range(2):
                if student_crop != teacher_crop:
                    student_row = logits[student_crop * TILES + tile]
                    terms.append(cross_entropy(student_row, probs[teacher_crop * TILES + tile], 0.1))
    assert len(terms) == TILES * (2 + 2 * local_count)
    got = dino_losses(features, prototypes, targets, local_count, 0.1)[0].item()
    assert got == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_ibot_averages_in_each_crop_and_divides_by_all_crops() -> None:
    mask = some_mask()
    features, prototypes, targets = unit(6, WIDTH), unit(PROTOTYPES, WIDTH, seed=4), teacher(6)
    probs, logits = targets.probs(slice(None)), features @ prototypes.T
    expected, row = 0.0, 0
    for crop in range(2 * TILES):
        hidden = int(mask[crop].sum())
        for _ in range(hidden):
            expected += cross_entropy(logits[row], probs[row], 0.1) / hidden / (2 * TILES)
            row += 1
    assert ibot_loss(features, prototypes, targets, mask, 0.1).item() == pytest.approx(expected, rel=1e-12)


def test_ibot_without_masked_patches_is_zero_and_has_a_gradient() -> None:
    features = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    prototypes = unit(PROTOTYPES, WIDTH).requires_grad_()
    loss = ibot_loss(features, prototypes, teacher(0), torch.zeros(4, 9, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None
    assert prototypes.grad is not None
    assert not prototypes.grad.any()


@pytest.mark.parametrize("group", [None, 6, 3, 2])
def test_kde_is_the_mean_log_density_on_the_other_features_of_the_group(group: int | None) -> None:
    cls, kappa, size = normal(6, WIDTH), 5.0, group or 6
    rows = cls.tolist()
    total = 0.0
    for i, x in enumerate(rows):
        density = 0.0
        for j, y in enumerate(rows):
            if i != j and i // size == j // size:
                density += math.exp(kappa * cosine(x, y))
        total += math.log(density / (size - 1))
    assert kde_loss(cls, kappa, group).item() == pytest.approx(total / 6, rel=1e-12)


@pytest.mark.parametrize("group", [None, 6, 3, 2])
def test_koleo_is_the_mean_log_distance_to_the_nearest_feature_of_the_group(group: int | None) -> None:
    cls, size = normal(6, WIDTH), group or 6
    rows = [[value / math.hypot(*row) for value in row] for row in cls.tolist()]
    total = 0.0
    for i, x in enumerate(rows):
        nearest = min(math.dist(x, y) for j, y in enumerate(rows) if i != j and i // size == j // size)
        total -= math.log(nearest + 1e-8)
    assert koleo_loss(cls, group).item() == pytest.approx(total / 6, rel=1e-12)


def test_koleo_pushes_the_nearest_features_apart() -> None:
    cls = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(koleo_loss(cls), cls)
    moved = (cls - 0.01 * gradient).detach()
    assert cosine(*moved[:2].tolist()) < cosine(*cls.detach()[:2].tolist())


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_mean_cosine_is_that_of_all_different_features(shift: float) -> None:
    cls = normal(7, WIDTH) + shift
    rows = cls.tolist()
    pairs = [cosine(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
    assert mean_cosine(cls).item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-12)


@pytest.mark.parametrize(("sign", "falls"), [(1.0, True), (-1.0, False)])
def test_the_sign_of_kde_decides_whether_features_part_or_collapse(sign: float, falls: bool) -> None:
    cls = (normal(24, 8) + 0.5).requires_grad_()
    before = mean_cosine(cls).item()
    for _ in range(200):
        (gradient,) = torch.autograd.grad(sign * kde_loss(cls, 5.0), cls)
        cls = (cls - 2.0 * gradient).detach().requires_grad_()
    after = mean_cosine(cls).item()
    assert (after < 0.0 < before - 0.05) if falls else (after > 0.99)


def test_kde_of_equal_features_is_kappa_and_finite_in_its_gradient() -> None:
    cls = torch.ones(4, 3, requires_grad=True)
    loss = kde_loss(cls, 5.0)
    loss.backward()
    assert loss.item() == pytest.approx(5.0)
    assert cls.grad is not None
    assert bool(cls.grad.isfinite().all())


def test_koleo_of_equal_features_is_finite_and_so_is_its_gradient() -> None:
    cls = torch.ones(4, 3, requires_grad=True)
    loss = koleo_loss(cls)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8), rel=1e-6)
    assert cls.grad is not None
    assert bool(cls.grad.isfinite().all())


@pytest.mark.parametrize(
    ("loss", "rows"),
    [
        (lambda x, p: dino_losses(x, p, teacher(6), 2, 0.3)[0], 12),
        (lambda x, p: ibot_loss(x, p, teacher(6), some_mask(), 0.3), 6),
    ],
    ids=["dino", "ibot"],
)
def test_gradients_of_predictions_are_those_of_finite_differences(
    loss: Callable[[Tensor, Tensor], Tensor], rows: int
) -> None:
    leaves = (unit(rows, WIDTH, seed=5).requires_grad_(), unit(PROTOTYPES, WIDTH, seed=6).requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("group", [None, 3])
@pytest.mark.parametrize("loss", [lambda x, group: kde_loss(x, 5.0, group), koleo_loss], ids=["kde", "koleo"])
def test_gradients_of_spread_are_those_of_finite_differences(
    loss: Callable[[Tensor, int | None], Tensor], group: int | None
) -> None:
    assert torch.autograd.gradcheck(lambda x: loss(x, group), (normal(6, WIDTH, seed=2).requires_grad_(),))


def test_the_gradient_of_the_cosine_loss_is_that_of_finite_differences() -> None:
    leaves = (normal(2, 3, WIDTH, seed=5).requires_grad_(), normal(2, 3, WIDTH, seed=6).requires_grad_())
    assert torch.autograd.gradcheck(cosine_distances, leaves)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_losses_of_narrow_tensors_come_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    features, prototypes = unit(12, WIDTH).to(dtype), unit(PROTOTYPES, WIDTH, seed=4).to(dtype)
    targets = teacher(6, dtype)
    wide = Assignment(targets.features_ME.double(), targets.prototypes_KE.double(), 0.05, targets.log_potentials_K)
    exact = dino_losses(features.double(), prototypes.double(), wide, 2, 0.1)[0].item()
    got = dino_losses(features, prototypes, targets, 2, 0.1)[0]
    assert {got.dtype, kde_loss(features, 5.0).dtype, koleo_loss(features).dtype} == {torch.float32}
    assert got.item() == pytest.approx(exact, rel=tolerance)
