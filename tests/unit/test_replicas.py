"""Every replica is computed by one rank, and every rank takes as many turns."""

import pytest

from histoscale.errors import PlanError
from histoscale.sampling.replicas import replicas_of


@pytest.mark.parametrize(("workers", "replicas"), [(1, 1), (1, 4), (2, 4), (3, 4), (7, 16), (5, 5)])
def test_ranks_share_out_all_replicas_and_pad_to_equal_length(workers: int, replicas: int) -> None:
    shares = [replicas_of(rank, workers, replicas) for rank in range(workers)]
    assert {len(share) for share in shares} == {-(-replicas // workers)}
    dealt = [replica for share in shares for replica in share if replica is not None]
    assert sorted(dealt) == list(range(replicas))


def test_replicas_are_dealt_like_cards() -> None:
    assert replicas_of(0, 3, 7) == (0, 3, 6)
    assert replicas_of(1, 3, 7) == (1, 4, None)


@pytest.mark.parametrize("workers", [0, 5])
def test_more_workers_than_replicas_is_a_diagnosis_with_advice(workers: int) -> None:
    with pytest.raises(PlanError, match=r"1 to 4 workers.*[Ss]tart fewer workers"):
        replicas_of(0, workers, 4)


@pytest.mark.parametrize("rank", [-1, 2])
def test_unknown_rank_is_refused(rank: int) -> None:
    with pytest.raises(PlanError, match="expected 0 to 1"):
        replicas_of(rank, 2, 4)
