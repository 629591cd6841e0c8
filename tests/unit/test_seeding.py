"""Draws are functions of what they are for: golden, uniform, and the same one by one as many at once."""

import hashlib

import numpy as np
import pytest
from scipy import stats

from histoscale.seeding import key, permute, permute_many, subkey, subkeys, uniforms

LENGTHS = [1, 2, 3, 4, 5, 7, 9, 16, 17, 100, 1000]


def test_keys_are_golden() -> None:
    """The same on every machine and in every version: a plan must not change under a run."""
    assert key(0, "crops", 7) == 11755846604795149111
    assert key(0, "crops", 7) != key(0, "crops", "7")
    assert key(0, "a", "b") != key(0, "ab")


def test_subkeys_are_golden_and_those_of_the_scalar() -> None:
    first, second = np.array([0, 1, 5, 2**40, -1]), np.array([[7], [8]])
    table = subkeys(99, first, second)
    assert table.dtype == np.uint64
    assert table.tolist() == [[subkey(99, a, b) for a in first.tolist()] for b in second[:, 0].tolist()]
    assert len(set(table.reshape(-1).tolist())) == 10
    assert subkey(99, 1, 2) != subkey(99, 2, 1)
    assert subkey(99, 1) == 17360999193197444373


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


@pytest.mark.parametrize("length", LENGTHS)
def test_permute_is_a_bijection(length: int) -> None:
    assert sorted(permute(77, index, length) for index in range(length)) == list(range(length))


def test_permute_is_golden() -> None:
    digest = hashlib.sha256(
        repr([permute(77, index, length) for length in LENGTHS for index in range(length)]).encode()
    )
    assert digest.hexdigest() == "0adac4126e4507ed35be4f37c7b0d0e68a19b58d2711b9075046884d13f731a4"


def test_many_permutations_at_once_are_those_of_the_scalar() -> None:
    rng = np.random.default_rng(0)
    near_squares = [side * side + off for side in (2, 3, 64, 1761, 2**24 - 1) for off in (-1, 0, 1)]
    lengths = np.concatenate([np.arange(1, 200), near_squares, rng.integers(1, 2**48, 200)])
    indices = rng.integers(0, lengths)
    keys = subkeys(5, np.arange(len(lengths)))
    expected = [permute(*values) for values in zip(keys.tolist(), indices.tolist(), lengths.tolist(), strict=True)]
    many = permute_many(keys, indices, lengths)
    assert many.dtype == np.int64
    assert many.tolist() == expected


@pytest.mark.parametrize("length", [2, 3, 5, 8, 13])
def test_every_image_of_an_index_is_equally_likely(length: int) -> None:
    keys = subkeys(9, np.arange(20_000))
    for index in range(length):
        images = permute_many(keys, np.full(len(keys), index), np.full(len(keys), length))
        assert stats.chisquare(np.bincount(images, minlength=length)).pvalue > 1e-4


def test_permute_mixes_and_depends_on_its_key() -> None:
    first, second = ([permute(draw_key, index, 1000) for index in range(1000)] for draw_key in (1, 2))
    assert first != second
    assert abs(stats.spearmanr(first, range(1000)).statistic) < 0.1
    assert abs(stats.spearmanr(first, second).statistic) < 0.1


def test_permute_of_a_large_range_needs_no_table() -> None:
    assert 0 <= permute(3, 2_000_000_000, 3_100_000_000) < 3_100_000_000
