import numpy as np
import pytest
from scipy import stats

from histoscale.seeding import key, permute, uniforms


def test_keys_are_golden() -> None:
    """The same on every machine and in every version: a plan must not change under a run."""
    assert key(0, "crops", 7) == 11755846604795149111
    assert key(0, "crops", 7) != key(0, "crops", "7")
    assert key(0, "a", "b") != key(0, "ab")


def test_uniforms_are_golden_and_independent_of_their_neighbours() -> None:
    table = uniforms(1234, np.array([3, 99, -1]), 3)
    np.testing.assert_array_equal(table[1], uniforms(1234, np.array([99]), 5)[0, :3])
    assert table[0].tolist() == [0.29738420692065093, 0.6995122548108231, 0.8249669666804902]


@pytest.mark.parametrize("column", range(4))
def test_uniforms_are_uniform(column: int) -> None:
    draws = uniforms(key(0, "test"), np.arange(20_000), 4)[:, column]
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


def test_uniforms_of_neighbouring_ids_and_columns_are_uncorrelated() -> None:
    draws = uniforms(key(5, "test"), np.arange(50_000), 4)
    correlations = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], axis=1).T)
    assert np.abs(correlations - np.eye(8)).max() < 0.02


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 100, 1000])
def test_permute_is_a_bijection(length: int) -> None:
    assert sorted(permute(77, index, length) for index in range(length)) == list(range(length))


def test_permute_mixes_and_depends_on_its_key() -> None:
    first, second = ([permute(draw_key, index, 1000) for index in range(1000)] for draw_key in (1, 2))
    assert first != second
    assert abs(stats.spearmanr(first, range(1000)).statistic) < 0.1
    assert abs(stats.spearmanr(first, second).statistic) < 0.1


def test_permute_of_a_large_range_needs_no_table() -> None:
    assert 0 <= permute(3, 2_000_000_000, 3_100_000_000) < 3_100_000_000
