"""Measures of health against plain formulas, and the groups of tiles."""

import math

import numpy as np
import pytest
import torch

from histoscale.objectives import Assignment, sinkhorn
from histoscale.objectives.health import assignment_sums, effective_rank, gram, perplexity
from histoscale.sampling.supply import Strata
from histoscale.sampling.tile_groups import MOST_TOLD, OTHERS, SlideStrata, TileGroups


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_effective_rank_is_that_of_the_singular_values() -> None:
    features = normal(30, 8) @ normal(8, 8, seed=1)
    singular = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = singular / singular.sum()
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(gram(features)) == pytest.approx(expected, rel=1e-9)
    assert effective_rank(gram(features[:11]) + gram(features[11:])) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_on_a_line_have_rank_one_however_wide_they_are(dtype: torch.dtype) -> None:
    line = torch.arange(1, 65)[:, None] * torch.ones(1, 256)
    assert effective_rank(gram(line.to(dtype))) == pytest.approx(1.0, abs=0.01)
    assert effective_rank(gram(torch.zeros(4, 3))) == 1.0
    assert effective_rank(gram(torch.eye(5))) == pytest.approx(5.0)


def test_perplexity_counts_what_has_weight() -> None:
    assert perplexity(torch.tensor([3.0, 3.0, 0.0, 3.0])) == pytest.approx(3.0)


@pytest.mark.parametrize("chunk_elements", [1, 50, 10**6])
def test_entropy_is_of_the_targets_and_use_is_of_what_the_teacher_prefers(chunk_elements: int) -> None:
    features = torch.nn.functional.normalize(normal(12, 6), dim=1)
    prototypes = torch.nn.functional.normalize(normal(20, 6, seed=2), dim=1)
    assignment = sinkhorn(features, prototypes, 0.1, 3, 12)
    entropy, preferred = assignment_sums(assignment, chunk_elements)
    probs = assignment.probs(slice(None)).double()
    assert float(entropy) == pytest.approx(float(-(probs * probs.log()).sum()), rel=1e-5)
    alone = (features @ prototypes.T / 0.1).double().softmax(dim=1).sum(dim=0)
    assert preferred.tolist() == pytest.approx(alone.tolist(), rel=1e-5)


def test_a_rank_without_tiles_adds_nothing() -> None:
    entropy, preferred = assignment_sums(Assignment(torch.empty(0, 6), normal(20, 6), 0.1, torch.zeros(20)))
    assert (float(entropy), float(preferred.sum()), len(preferred)) == (0.0, 0.0, 20)


def strata_of(whole: list[int], of_row: list[int], names: list[str]) -> Strata:
    count = len(whole)
    return Strata(
        np.array(of_row, np.int32),
        np.zeros((count, 1), np.uint32),
        np.ones(count),
        tuple(names),
        np.array(whole, np.int32),
        np.array(["copied" in name for name in names]),
    )


def test_strata_are_told_as_the_recipe_cuts_them() -> None:
    found = SlideStrata.of(strata_of([0, 0, 1], [0, 1, 2, 2, 1], ["site=A", "site=A, copied", "site=B"]))
    assert found.names == ("site=A", "site=B")
    assert found.of_row.tolist() == [0, 0, 1, 1, 0]


def test_one_stratum_is_none() -> None:
    assert SlideStrata.of(strata_of([0], [0, 0], ["all slides"])).names == ()


def test_the_smallest_of_many_strata_are_told_together() -> None:
    count = MOST_TOLD + 3
    rows = [*range(count), *range(3, count)]
    found = SlideStrata.of(strata_of(list(range(count)), rows, [f"site={n}" for n in range(count)]))
    assert len(found.names) == MOST_TOLD + 1
    assert found.names[-1] == OTHERS
    assert found.of_row[:3].tolist() == [MOST_TOLD] * 3
    assert [found.names[place] for place in found.of_row[3:count]] == [f"site={n}" for n in range(3, count)]


def test_a_tile_is_in_the_group_of_its_scale_and_of_its_stratum() -> None:
    groups = TileGroups([0.5, (0.2, 2.0), 1.0], SlideStrata(("a", "b"), np.array([1, 0], np.uint8)))
    names = ("loss_by_mpp/0.5", "loss_by_mpp/0.2-2", "loss_by_mpp/1", "loss_by_stratum/a", "loss_by_stratum/b")
    assert groups.names == names
    found = groups.of(np.array([0.5, 0.7, 1.0, 4.0]), np.array([0, 1, 1, 0], np.int32))
    assert found.tolist() == [[0, 4], [1, 3], [2, 3], [5, 4]]
    assert TileGroups([0.5]).of(np.array([0.5]), np.array([7], np.int32)).tolist() == [[0, 1]]
