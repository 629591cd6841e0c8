"""Each objective against loops written from its definition, in fp64."""

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from histoscale.objectives import dino_loss, ibot_loss, kde_loss, sinkhorn

TILES, PROTOTYPES = 3, 5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cross_entropy(logits: Tensor, target: Tensor, temperature: float) -> float:
    exponentials = [math.exp(value / temperature) for value in logits.tolist()]
    return -sum(
        share * math.log(value / sum(exponentials)) for share, value in zip(target.tolist(), exponentials, strict=True)
    )


def some_mask() -> Tensor:
    mask = torch.zeros(2 * TILES, 4, dtype=torch.bool)
    mask[0, [1, 2, 3]] = mask[3, 0] = mask[5, [0, 2]] = True
    return mask


def mean_cosine(features: Tensor) -> float:
    unit = torch.nn.functional.normalize(features, dim=-1)
    count = len(features)
    return ((unit @ unit.T).sum().item() - count) / (count * (count - 1))


@pytest.mark.parametrize("local_count", [0, 1, 8])
def test_dino_is_the_mean_over_all_pairs_of_different_crops(local_count: int) -> None:
    logits = normal((2 + local_count) * TILES, PROTOTYPES)
    teacher = torch.softmax(normal(2 * TILES, PROTOTYPES, seed=1), dim=-1)
    terms = []
    for tile in range(TILES):
        for student_crop in range(2 + local_count):
            for teacher_crop in range(2):
                if student_crop != teacher_crop:
                    student_row = logits[student_crop * TILES + tile]
                    terms.append(cross_entropy(student_row, teacher[teacher_crop * TILES + tile], 0.1))
    assert len(terms) == TILES * (2 + 2 * local_count)
    assert dino_loss(logits, teacher, local_count, 0.1).item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_ibot_averages_in_each_crop_and_divides_by_all_crops() -> None:
    mask = some_mask()
    logits, teacher = normal(6, PROTOTYPES), torch.softmax(normal(6, PROTOTYPES, seed=1), dim=-1)
    expected, row = 0.0, 0
    for crop in range(2 * TILES):
        hidden = int(mask[crop].sum())
        for _ in range(hidden):
            expected += cross_entropy(logits[row], teacher[row], 0.1) / hidden / (2 * TILES)
            row += 1
    assert ibot_loss(logits, teacher, mask, 0.1).item() == pytest.approx(expected, rel=1e-12)


def test_ibot_without_masked_patches_is_zero_and_has_a_gradient() -> None:
    logits = torch.zeros(0, PROTOTYPES, requires_grad=True)
    loss = ibot_loss(logits, torch.zeros(0, PROTOTYPES), torch.zeros(4, 9, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None


def test_kde_is_the_mean_log_density_on_the_other_features() -> None:
    cls, kappa = normal(7, 4), 5.0
    unit = [[value / math.dist(row, [0.0] * 4) for value in row] for row in cls.tolist()]
    total = 0.0
    for i, x in enumerate(unit):
        density = 0.0
        for j, y in enumerate(unit):
            if i != j:
                density += math.exp(kappa * sum(a * b for a, b in zip(x, y, strict=True)))
        total += math.log(density / 6)
    assert kde_loss(cls, kappa).item() == pytest.approx(total / 7, rel=1e-12)


@pytest.mark.parametrize(("sign", "falls"), [(1.0, True), (-1.0, False)])
def test_the_sign_of_kde_decides_whether_features_part_or_collapse(sign: float, falls: bool) -> None:
    cls = (normal(24, 8) + 0.5).requires_grad_()
    before = mean_cosine(cls)
    for _ in range(20):
        (gradient,) = torch.autograd.grad(sign * kde_loss(cls, 5.0), cls)
        cls = (cls - 0.5 * gradient).detach().requires_grad_()
    assert (mean_cosine(cls) < before - 0.05) if falls else (mean_cosine(cls) > before + 0.05)


def test_kde_of_equal_features_is_kappa_and_finite_in_its_gradient() -> None:
    cls = torch.ones(4, 3, requires_grad=True)
    loss = kde_loss(cls, 5.0)
    loss.backward()
    assert loss.item() == pytest.approx(5.0)
    assert cls.grad is not None
    assert bool(cls.grad.isfinite().all())


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda x: dino_loss(x, torch.softmax(normal(6, PROTOTYPES, seed=1), dim=-1), 2, 0.3), (12, PROTOTYPES)),
        (lambda x: ibot_loss(x, torch.softmax(normal(6, 5, seed=1), dim=-1), some_mask(), 0.3), (6, PROTOTYPES)),
        (lambda x: kde_loss(x, 5.0), (6, 4)),
    ],
    ids=["dino", "ibot", "kde"],
)
def test_gradients_are_those_of_finite_differences(loss: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> None:
    assert torch.autograd.gradcheck(loss, (normal(*shape, seed=2).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_narrow_tensors_come_in_fp32(dtype: torch.dtype) -> None:
    logits = normal(12, PROTOTYPES).to(dtype)
    teacher = torch.softmax(normal(6, PROTOTYPES, seed=1), dim=-1).float()
    exact = dino_loss(logits.double(), teacher.double(), 2, 0.1).item()
    got = dino_loss(logits, teacher, 2, 0.1)
    assert got.dtype == kde_loss(logits, 5.0).dtype == torch.float32
    assert got.item() == pytest.approx(exact, rel=1e-5)


def sinkhorn_by_loops(logits: Tensor, temperature: float, iterations: int) -> list[list[float]]:
    """The definition: a K x B plan of total mass 1, rows (prototypes) to 1 / K, columns (samples) to 1 / B."""
    samples, prototypes = logits.shape
    plan = [[math.exp(logits[b, k].item() / temperature) for b in range(samples)] for k in range(prototypes)]
    mass = sum(map(sum, plan))
    plan = [[value / mass for value in row] for row in plan]
    for _ in range(iterations):
        plan = [[value / sum(row) / prototypes for value in row] for row in plan]
        columns = [sum(row[b] for row in plan) for b in range(samples)]
        plan = [[row[b] / columns[b] / samples for b in range(samples)] for row in plan]
    return [[plan[k][b] * samples for k in range(prototypes)] for b in range(samples)]


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_alternate_normalisation(iterations: int) -> None:
    logits = torch.tanh(normal(9, PROTOTYPES))
    expected = torch.tensor(sinkhorn_by_loops(logits, 0.07, iterations), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(logits, 0.07, iterations, 9), expected, rtol=1e-10, atol=1e-12)


def test_sinkhorn_in_the_limit_uses_all_prototypes_alike() -> None:
    plan = sinkhorn(torch.tanh(normal(40, PROTOTYPES)).float(), 0.5, 200, 40)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(plan.sum(dim=0), torch.full((PROTOTYPES,), 8.0))


@pytest.mark.parametrize("rows", [[9], [4, 5], [2, 0, 7], [0, 9]])
def test_sinkhorn_over_ranks_equals_one_over_all_rows(rows: list[int]) -> None:
    logits = torch.tanh(normal(9, PROTOTYPES))
    barrier, shared = threading.Barrier(len(rows)), [torch.zeros(0)] * len(rows)
    plans = [torch.zeros(0)] * len(rows)

    def run(rank: int, share: Tensor) -> None:
        def all_reduce(sums: Tensor) -> Tensor:
            shared[rank] = sums.clone()
            barrier.wait(timeout=30)
            sums.copy_(torch.stack(shared).sum(dim=0))
            barrier.wait(timeout=30)
            return sums

        plans[rank] = sinkhorn(share, 0.07, 3, 9, all_reduce)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(logits.split(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(plan) for plan in plans] == rows
    torch.testing.assert_close(torch.cat(plans), sinkhorn(logits, 0.07, 3, 9), rtol=1e-12, atol=1e-12)


def test_sinkhorn_of_no_rows_at_all_is_empty() -> None:
    assert sinkhorn(torch.zeros(0, PROTOTYPES), 0.07, 3, 0).shape == (0, PROTOTYPES)


def test_sinkhorn_leaves_its_input_alone_and_carries_no_gradient() -> None:
    logits = torch.tanh(normal(4, PROTOTYPES)).requires_grad_()
    before = logits.detach().clone()
    assert not sinkhorn(logits, 0.07, 3, 4).requires_grad
    assert torch.equal(logits.detach(), before)
