"""The cross-entropy of a chunk at a time against loops and against autograd through all logits."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from histoscale.objectives import Assignment, cross_entropy
from histoscale.objectives.logits import CHUNK_ELEMENTS

CROPS, VIEWS, ROWS, PROTOTYPES, WIDTH = 4, 2, 5, 7, 3
TEMPERATURE = 0.1


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(draw(*shape, seed=seed), dim=-1)


def student(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    features, prototypes = unit(CROPS, rows, WIDTH, seed=0), unit(PROTOTYPES, WIDTH, seed=1)
    return features.to(dtype).requires_grad_(), prototypes.to(dtype).requires_grad_()


def teacher(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> Assignment:
    """Of another bottleneck width than the student's."""
    features, prototypes = unit(VIEWS * rows, WIDTH + 1, seed=2), unit(PROTOTYPES, WIDTH + 1, seed=3)
    potentials = draw(PROTOTYPES, seed=4).to(torch.promote_types(dtype, torch.float32))
    return Assignment(features.to(dtype), prototypes.to(dtype), 0.07, potentials)


def pairs() -> Tensor:
    """One crop is compared with nothing, the others unequally."""
    return torch.tensor([[0.0, 1.0], [2.0, 0.5], [0.0, 0.0], [1.0, 1.0]])


def weights(rows: int = ROWS) -> Tensor:
    return torch.linspace(0.0, 1.0, rows)


def plain(features: Tensor, prototypes: Tensor, targets: Assignment, rows: int = ROWS) -> Tensor:
    """The same through full logits, for autograd; products in the features' dtype, the rest in fp32 or finer."""
    probs = targets.probs(slice(None)).view(VIEWS, rows, PROTOTYPES)
    logits = features @ prototypes.T
    log_probs = torch.log_softmax(logits.to(probs.dtype) / TEMPERATURE, dim=-1)
    return -torch.einsum("ct,m,tmk,cmk->", pairs().to(probs.dtype), weights(rows).to(probs.dtype), probs, log_probs)


class Shapes(TorchDispatchMode):
    """Shapes of the tensors that operations gave."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.add(result.shape)
        return result

    @property
    def largest(self) -> int:
        return max(shape.numel() for shape in self.seen)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_the_loss_is_the_sum_of_its_definition() -> None:
    features, prototypes = student()
    targets = teacher()
    probs = targets.probs(slice(None))
    expected = 0.0
    for c in range(CROPS):
        for t in range(VIEWS):
            for m in range(ROWS):
                exponentials = []
                for prototype in prototypes.tolist():
                    cosine = sum(a * b for a, b in zip(features[c, m].tolist(), prototype, strict=True))
                    exponentials.append(math.exp(cosine / TEMPERATURE))
                shares = zip(probs[t * ROWS + m].tolist(), exponentials, strict=True)
                row = -sum(share * math.log(value / sum(exponentials)) for share, value in shares)
                expected += pairs()[c, t].item() * weights()[m].item() * row
    got = cross_entropy(features, prototypes, targets, pairs(), weights(), TEMPERATURE)
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("chunk_elements", [1, 2 * (CROPS + VIEWS) * PROTOTYPES, CHUNK_ELEMENTS])
def test_gradients_are_those_of_finite_differences(chunk_elements: int) -> None:
    targets = teacher()

    def loss(features: Tensor, prototypes: Tensor) -> Tensor:
        return cross_entropy(features, prototypes, targets, pairs(), weights(), 0.3, chunk_elements)

    assert torch.autograd.gradcheck(loss, student())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
@pytest.mark.parametrize("chunk_elements", [1, 2 * (CROPS + VIEWS) * PROTOTYPES, CHUNK_ELEMENTS])
def test_loss_and_gradients_are_those_of_autograd_through_all_logits(
    dtype: torch.dtype, tolerance: float, chunk_elements: int
) -> None:
    leaves, targets = student(dtype), teacher(dtype)
    expected = plain(*leaves, targets)
    got = cross_entropy(*leaves, targets, pairs(), weights(), TEMPERATURE, chunk_elements)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert got.item() == pytest.approx(expected.item(), rel=tolerance)
    gradients = torch.autograd.grad(3.0 * got, leaves)
    for gradient, leaf, reference in zip(gradients, leaves, torch.autograd.grad(3.0 * expected, leaves), strict=True):
        assert gradient.dtype == leaf.dtype
        assert relative(gradient, reference) < tolerance


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none_and_the_other_stays_the_same(frozen: int) -> None:
    leaves, targets = student(), teacher()
    both = torch.autograd.grad(plain(*leaves, targets), leaves)
    leaves[frozen].requires_grad_(False)
    cross_entropy(*leaves, targets, pairs(), weights(), TEMPERATURE).backward()
    assert leaves[frozen].grad is None
    torch.testing.assert_close(leaves[1 - frozen].grad, both[1 - frozen])


def test_without_gradients_the_value_is_the_same_and_none_is_made() -> None:
    leaves, targets = student(), teacher()
    with torch.no_grad(), Shapes() as shapes:
        loss = cross_entropy(*leaves, targets, pairs(), weights(), TEMPERATURE)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(plain(*leaves, targets).item(), rel=1e-12)
    assert leaves[1].shape not in shapes.seen


def test_there_is_no_second_derivative() -> None:
    leaves = student()
    loss = cross_entropy(*leaves, teacher(), pairs(), weights(), TEMPERATURE)
    (gradient,) = torch.autograd.grad(loss.square(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_of_no_rows_the_loss_and_its_gradients_are_zero() -> None:
    features, prototypes = student(rows=0)
    loss = cross_entropy(features, prototypes, teacher(rows=0), pairs(), weights(0), TEMPERATURE)
    loss.backward()
    assert loss.item() == 0.0
    assert features.grad is not None
    assert prototypes.grad is not None
    assert not prototypes.grad.any()


def test_inputs_are_left_alone() -> None:
    leaves, targets = student(), teacher()
    before = [each.detach().clone() for each in (*leaves, targets.features_ME, targets.log_potentials_K)]
    cross_entropy(*leaves, targets, pairs(), weights(), TEMPERATURE).backward()
    after = (*leaves, targets.features_ME, targets.log_potentials_K)
    assert all(torch.equal(old, new.detach()) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_131072_prototypes_no_tensor_outgrows_the_chunk(dtype: torch.dtype) -> None:
    count, rows = 131_072, 512
    features = unit(1, rows, WIDTH, seed=0).to(dtype).requires_grad_()
    prototypes = unit(count, WIDTH, seed=1).to(dtype).requires_grad_()
    targets = Assignment(unit(rows, WIDTH, seed=2).to(dtype), prototypes.detach(), 0.07, torch.zeros(count))
    with Shapes() as shapes:
        loss = cross_entropy(features, prototypes, targets, torch.ones(1, 1), torch.ones(rows) / rows, TEMPERATURE)
        loss.backward()
    assert bool(loss.isfinite())
    assert shapes.largest == CHUNK_ELEMENTS // 2  # the student's half of a chunk; the other is the teacher's
    assert shapes.largest < rows * count // 4
