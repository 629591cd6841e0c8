"""Sinkhorn-Knopp and the centre, made of factors, against loops over the whole plan in fp64."""

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from histoscale.objectives import Assignment, centered, logit_sums, sinkhorn
from histoscale.objectives.logits import CHUNK_ELEMENTS, chunks

ROWS, PROTOTYPES, WIDTH = 9, 5, 3
EVERY = slice(None)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def unit(*shape: int, seed: int = 0) -> Tensor:
    draws = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(draws, dim=-1)


def extremes() -> tuple[Tensor, Tensor]:
    """Rows that coincide with a prototype or are opposite to it, among others: cosines from -1 to 1."""
    prototypes = unit(PROTOTYPES, WIDTH, seed=1)
    return torch.cat([prototypes[:2], -prototypes[:2], unit(ROWS - 4, WIDTH)]), prototypes


def sinkhorn_by_loops(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """The definition: a K x B plan of total mass 1, rows (prototypes) to 1 / K, columns (samples) to 1 / B."""
    samples, prototypes = logits.shape
    plan = [[math.exp(logits[b, k].item() / temperature) for b in range(samples)] for k in range(prototypes)]
    mass = sum(map(sum, plan))
    plan = [[value / mass for value in row] for row in plan]
    for _ in range(iterations):
        plan = [[value / sum(row) / prototypes for value in row] for row in plan]
        columns = [sum(plan[k][b] for k in range(prototypes)) for b in range(samples)]
        plan = [[plan[k][b] / columns[b] / samples for b in range(samples)] for k in range(prototypes)]
    return torch.tensor(
        [[plan[k][b] * samples for k in range(prototypes)] for b in range(samples)], dtype=torch.float64
    )


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("temperature", [0.02, 0.04, 0.07, 0.1])
@pytest.mark.parametrize("chunk_elements", [1, 2 * PROTOTYPES, CHUNK_ELEMENTS])
def test_sinkhorn_is_the_alternation_of_its_definition(
    temperature: float, iterations: int, chunk_elements: int
) -> None:
    features, prototypes = extremes()
    expected = sinkhorn_by_loops(features @ prototypes.T, temperature, iterations)
    exact = sinkhorn(features, prototypes, temperature, iterations, ROWS, chunk_elements=chunk_elements)
    torch.testing.assert_close(exact.probs(EVERY), expected, rtol=1e-10, atol=1e-12)
    single = sinkhorn(
        features.float(), prototypes.float(), temperature, iterations, ROWS, chunk_elements=chunk_elements
    )
    assert single.probs(EVERY).dtype == torch.float32
    torch.testing.assert_close(single.probs(EVERY).double(), expected, rtol=3e-4 * 0.02 / temperature, atol=1e-12)


def test_sinkhorn_in_fp32_stands_temperatures_whose_exponentials_fp32_does_not() -> None:
    features, prototypes = extremes()
    expected = sinkhorn_by_loops(features @ prototypes.T, 0.005, 3)
    got = sinkhorn(features.float(), prototypes.float(), 0.005, 3, ROWS).probs(EVERY)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-3)


def test_sinkhorn_in_the_limit_uses_all_prototypes_alike() -> None:
    plan = sinkhorn(unit(40, WIDTH).float(), unit(PROTOTYPES, WIDTH, seed=1).float(), 0.5, 200, 40).probs(EVERY)
    torch.testing.assert_close(plan.sum(dim=1), torch.ones(40))
    torch.testing.assert_close(plan.sum(dim=0), torch.full((PROTOTYPES,), 8.0))


def test_potentials_of_one_round_give_each_prototype_its_share_of_the_total() -> None:
    features, prototypes = extremes()
    scaling = sinkhorn(features, prototypes, 0.1, 1, ROWS).log_potentials_K.exp()
    mass = torch.exp(features @ prototypes.T / 0.1) * scaling
    torch.testing.assert_close(mass.sum(dim=0), torch.full((PROTOTYPES,), ROWS / PROTOTYPES, dtype=torch.float64))


def over_ranks(rows: list[int], run: Callable[[int, Callable[[Tensor], Tensor]], None]) -> list[int]:
    """Calls `run` as each rank, in threads that sum tensors with each other; returns each rank's number of sums."""
    barrier, shared = threading.Barrier(len(rows)), [torch.zeros(0)] * len(rows)
    counts = [0] * len(rows)

    def all_reduce_of(rank: int) -> Callable[[Tensor], Tensor]:
        def all_reduce(sums: Tensor) -> Tensor:
            counts[rank] += 1
            shared[rank] = sums.clone()
            barrier.wait(timeout=30)
            sums.copy_(torch.stack(shared).sum(dim=0))
            barrier.wait(timeout=30)
            return sums

        return all_reduce

    threads = [threading.Thread(target=run, args=(rank, all_reduce_of(rank))) for rank in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


@pytest.mark.parametrize("rows", [[9], [4, 5], [2, 0, 7], [0, 9]])
@pytest.mark.parametrize("chunk_elements", [2 * PROTOTYPES, CHUNK_ELEMENTS])
def test_sinkhorn_over_ranks_equals_one_over_all_rows(rows: list[int], chunk_elements: int) -> None:
    features, prototypes = extremes()
    shares = features.split(rows)
    plans = [torch.zeros(0)] * len(rows)

    def run(rank: int, all_reduce: Callable[[Tensor], Tensor]) -> None:
        assignment = sinkhorn(shares[rank], prototypes, 0.07, 3, ROWS, all_reduce, chunk_elements)
        plans[rank] = assignment.probs(EVERY)

    assert over_ranks(rows, run) == [3] * len(rows)
    assert [len(plan) for plan in plans] == rows
    whole = sinkhorn(features, prototypes, 0.07, 3, ROWS).probs(EVERY)
    torch.testing.assert_close(torch.cat(plans), whole, rtol=1e-12, atol=1e-12)


def test_sinkhorn_of_no_rows_at_all_is_empty_and_finite() -> None:
    empty = sinkhorn(torch.zeros(0, WIDTH), unit(PROTOTYPES, WIDTH).float(), 0.07, 3, 0)
    assert len(empty) == 0
    assert empty.probs(EVERY).shape == (0, PROTOTYPES)
    assert empty.log_potentials_K.tolist() == [0.0] * PROTOTYPES


def test_sinkhorn_leaves_its_input_alone_and_carries_no_gradient() -> None:
    features, prototypes = unit(4, WIDTH).requires_grad_(), unit(PROTOTYPES, WIDTH, seed=1).requires_grad_()
    before = features.detach().clone(), prototypes.detach().clone()
    assignment = sinkhorn(features, prototypes, 0.07, 3, 4)
    first = assignment.probs(EVERY)
    assert not first.requires_grad
    assert torch.equal(assignment.probs(EVERY), first)
    assert torch.equal(features.detach(), before[0])
    assert torch.equal(prototypes.detach(), before[1])


def test_sinkhorn_of_narrow_features_is_close_to_the_exact_one_of_their_values() -> None:
    features, prototypes = (each.bfloat16() for each in extremes())
    exact = sinkhorn(features.double(), prototypes.double(), 0.1, 3, ROWS).probs(EVERY)
    narrow = sinkhorn(features, prototypes, 0.1, 3, ROWS)
    assert narrow.log_potentials_K.dtype == narrow.probs(EVERY).dtype == torch.float32
    torch.testing.assert_close(narrow.probs(EVERY).double(), exact, rtol=0, atol=0.03)


def test_parts_of_an_assignment_are_rows_of_the_whole() -> None:
    features, prototypes = extremes()
    assignment = sinkhorn(features, prototypes, 0.07, 3, ROWS)
    whole = assignment.probs(EVERY)
    part = assignment.take(slice(2, 7))
    assert (len(assignment), len(part)) == (ROWS, 5)
    torch.testing.assert_close(assignment.probs(slice(2, 7)), whole[2:7])
    torch.testing.assert_close(part.probs(slice(1, 3)), whole[3:5])


def test_probabilities_are_the_softmax_of_logits_and_potentials() -> None:
    features, prototypes = extremes()
    potentials = torch.tensor([0.5, -3.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    plan = Assignment(features, prototypes, 0.2, potentials).probs(EVERY)
    for row in range(ROWS):
        masses = []
        for prototype in range(PROTOTYPES):
            cosine = sum(a * b for a, b in zip(features[row].tolist(), prototypes[prototype].tolist(), strict=True))
            masses.append(math.exp(cosine / 0.2 + potentials[prototype].item()))
        assert plan[row].tolist() == pytest.approx([mass / sum(masses) for mass in masses], rel=1e-12)


def test_centring_subtracts_the_centre_before_the_temperature() -> None:
    features, prototypes = extremes()
    center = unit(1, PROTOTYPES, seed=2)[0]
    expected = torch.softmax((features @ prototypes.T - center) / 0.04, dim=-1)
    torch.testing.assert_close(centered(features, prototypes, 0.04, center).probs(EVERY), expected)


def test_sums_of_logits_are_those_over_the_rows() -> None:
    features, prototypes = extremes()
    torch.testing.assert_close(logit_sums(features, prototypes), (features @ prototypes.T).sum(dim=0))
    assert logit_sums(features[:0].bfloat16(), prototypes.bfloat16()).tolist() == [0.0] * PROTOTYPES


@pytest.mark.parametrize(
    ("rows", "chunk_elements", "expected"),
    [(5, 25, [(0, 2), (2, 4), (4, 5)]), (2, 1, [(0, 1), (1, 2)]), (4, 20, [(0, 2), (2, 4)]), (0, 20, [])],
)
def test_chunks_keep_their_bound_or_hold_one_row(
    rows: int, chunk_elements: int, expected: list[tuple[int, int]]
) -> None:
    assert chunks(rows, 10, chunk_elements) == [slice(*bounds) for bounds in expected]


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_holds_one_chunk_of_logits_at_a_time(dtype: torch.dtype) -> None:
    count, chunk_elements = 131_072, 1 << 20
    features, prototypes = unit(64, WIDTH).to(dtype), unit(count, WIDTH, seed=1).to(dtype)
    with Largest() as largest:
        assignment = sinkhorn(features, prototypes, 0.05, 2, 64, chunk_elements=chunk_elements)
        assignment.probs(slice(0, 8))
    assert largest.elements == chunk_elements < 64 * count
