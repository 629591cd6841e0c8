"""Principal components, neighbours and heads, each against a plain way to the same end."""

import numpy as np
import pytest

from histoscale.observe.projection import most_different, nearest, principal_components


def test_components_are_those_of_the_covariance_turned_along_the_guide() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 6)) * [5.0, 3.0, 2.0, 1.0, 0.5, 0.1] + 7.0
    guide = rng.normal(size=40)
    found = principal_components(points, 3, guide)
    values, axes = np.linalg.eigh(np.cov(points.T))
    expected = (points - points.mean(axis=0)) @ axes[:, ::-1][:, :3]
    for k in range(3):
        sign = np.sign(np.corrcoef(expected[:, k], guide)[0, 1])
        np.testing.assert_allclose(found.scores[:, k], sign * expected[:, k], atol=1e-9)
    np.testing.assert_allclose(found.share, values[::-1][:3] / values.sum())


def test_a_network_that_turns_its_axes_gives_the_same_picture() -> None:
    rng = np.random.default_rng(1)
    points, guide = rng.normal(size=(30, 5)) * [4.0, 3.0, 2.0, 1.0, 0.5], rng.normal(size=30)
    turned = points @ np.linalg.qr(rng.normal(size=(5, 5)))[0] + 3.0
    first, second = (principal_components(each, 2, guide) for each in (points, turned))
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-9)


@pytest.mark.parametrize("points", [np.ones((4, 3)), np.ones((1, 3)), np.zeros((2, 1))])
def test_points_without_extent_lie_in_the_middle(points: np.ndarray) -> None:
    found = principal_components(points, 3, np.arange(len(points)))
    assert found.scores.shape == (len(points), 3)
    assert not np.abs(found.scores).max() > 1e-9
    assert np.isfinite(found.share).all()


def test_neighbours_are_found_as_a_loop_finds_them() -> None:
    rng = np.random.default_rng(2)
    embeddings, owners = rng.normal(size=(25, 4)).astype(np.float32), rng.integers(0, 5, 25)
    found = nearest(embeddings, owners, np.array([3, 7]), 4)
    for query, near in zip((3, 7), found, strict=True):
        cosines = {}
        for other in range(25):
            if owners[other] != owners[query]:
                a, b = embeddings[query].astype(float), embeddings[other].astype(float)
                cosines[other] = float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))
        expected = sorted(cosines, key=lambda other: -cosines[other])[:4]
        assert [place for place, _ in near] == expected
        np.testing.assert_allclose([cosine for _, cosine in near], [cosines[one] for one in expected], rtol=1e-6)


def test_a_query_without_tiles_of_others_has_no_neighbours() -> None:
    assert nearest(np.ones((3, 2)), np.array([1, 1, 2]), np.array([0, 2]), 5)[0] == [(2, pytest.approx(1.0))]
    assert nearest(np.ones((2, 2)), np.array([1, 1]), np.array([0]), 5) == [[]]


def test_the_heads_that_differ_most_come_first() -> None:
    maps = np.full((1, 4, 4), 0.25)
    maps[0, 1] = [1.0, 0.0, 0.0, 0.0]
    maps[0, 3] = [0.1, 0.1, 0.1, 0.7]
    heads = most_different(maps, 3)
    assert heads[:2] == [1, 3]
    assert heads[2] in (0, 2)
    assert sorted(most_different(maps, 9)) == [0, 1, 2, 3]
