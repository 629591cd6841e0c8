"""Probes against scikit-learn, loops and closed forms, and what they do on features with known answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import balanced_accuracy_score, log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from histoscale.errors import DatasetError, RecipeError
from histoscale.evaluate.linear import Linear, Ridge, VirchowLinear, logistic_scores
from histoscale.evaluate.probes import (
    NEIGHBOURS,
    PROBES,
    TEMPERATURE,
    FewShot,
    Knn,
    Probe,
    knn_scores,
    probe_features,
    require_known,
)
from histoscale.evaluate.splits import Split, splits_of

CLASSES = ("a", "b", "c")
SHORT_VIRCHOW = VirchowLinear(batch=32, iterations=60, checks=6, learning_rate=0.1)
FAST: dict[str, Probe] = PROBES | {"virchow_linear": SHORT_VIRCHOW}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def clusters(
    per_class: int, width: int, distance: float, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    centres = rng.normal(size=(3, width)) * distance
    return (centres[labels] + rng.normal(size=(len(labels), width))).astype(np.float32), labels


def of(features: NDArray[np.float32], labels: NDArray[np.int64]) -> Split:
    return splits_of(labels, CLASSES[: labels.max() + 1], 1)[0]


def test_knn_equals_loops_over_every_pair_and_scikit_learn() -> None:
    features, labels = clusters(per_class=25, width=6, distance=0.4)
    split = of(features, labels)
    center = features[split.train].mean(axis=0)
    expected = []
    for row in split.test:
        votes = np.zeros(3)
        query = features[row] - center
        scored = []
        for other in split.train:
            neighbour = features[other] - center
            cosine = float(query @ neighbour) / float(np.linalg.norm(query) * np.linalg.norm(neighbour))
            scored.append((cosine, int(labels[other])))
        for cosine, label in sorted(scored, reverse=True)[:NEIGHBOURS]:
            votes[label] += np.exp(cosine / TEMPERATURE)
        expected.append(votes / votes.sum())
    found = Knn().scores(features, labels, split, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert 0.4 < float((found.argmax(axis=1) == labels[split.test]).mean()) < 1.0  # mistakes, so that votes matter

    voters = KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights=lambda far: np.exp(-far / TEMPERATURE))
    voters.fit(features[split.train] - center, labels[split.train])
    assert found.argmax(axis=1).tolist() == voters.predict(features[split.test] - center).tolist()


def test_knn_does_with_fewer_rows_than_neighbours_and_with_a_shared_direction() -> None:
    features, labels = clusters(per_class=5, width=8, distance=5.0)
    scores = knn_scores(features + 1000.0, labels, features + 1000.0)
    assert scores.argmax(axis=1).tolist() == labels.tolist()


def test_linear_probe_finds_a_direction_of_small_scale() -> None:
    rng = np.random.default_rng(0)
    labels = np.tile([0, 1], 100)
    features = rng.normal(size=(200, 4)).astype(np.float32) * 100.0
    features[:, 2] = (labels - 0.5) * 1e-3 + rng.normal(size=200) * 1e-4
    told = logistic_scores(features[:100], labels[:100], features[100:]).argmax(axis=1)
    assert (told == labels[100:]).mean() > 0.95


def test_linear_probe_takes_the_strength_of_the_lowest_validation_loss() -> None:
    features, labels = clusters(per_class=30, width=60, distance=0.15)
    split, probe = of(features, labels), Linear()
    scaler = StandardScaler().fit(features[split.fit])
    losses = {}
    for inverse_strength in probe.inverse_strengths:
        alone = LogisticRegression(C=inverse_strength, tol=1e-6, max_iter=5000)
        alone.fit(scaler.transform(features[split.fit]), labels[split.fit])
        losses[inverse_strength] = log_loss(
            labels[split.val], alone.predict_proba(scaler.transform(features[split.val]))
        )
    best = min(losses, key=lambda strength: losses[strength])
    assert probe.inverse_strengths[0] < best < probe.inverse_strengths[-1]  # the choice matters here
    assert probe.choose(features, labels, split) == best
    best_and_two = probe.inverse_strengths[: probe.inverse_strengths.index(best) + 3]
    never_fitted = (*best_and_two, -1.0)  # scikit-learn takes no such strength
    assert replace(probe, inverse_strengths=never_fitted).choose(features, labels, split) == best

    final = StandardScaler().fit(features[split.train])
    alone = LogisticRegression(C=best, tol=1e-6, max_iter=5000)
    alone.fit(final.transform(features[split.train]), labels[split.train])
    expected = alone.predict_proba(final.transform(features[split.test]))
    np.testing.assert_allclose(probe.scores(features, labels, split, 0), expected, atol=0.01)


@pytest.mark.parametrize("width", [6, 80])  # fewer and more features than training tiles
def test_ridge_equals_scikit_learn_at_the_strength_of_the_best_validation_accuracy(width: int) -> None:
    features, labels = clusters(per_class=20, width=width, distance=0.4)
    split, probe = of(features, labels), Ridge()

    def of_sklearn(fit: NDArray[np.int64], test: NDArray[np.int64], strength: float) -> NDArray[np.float64]:
        scaler = StandardScaler().fit(features[fit])
        ridge = RidgeClassifier(alpha=strength * len(fit)).fit(scaler.transform(features[fit]), labels[fit])
        return ridge.decision_function(scaler.transform(features[test]))  # type: ignore[no-any-return]

    reached = [
        balanced_accuracy_score(labels[split.val], of_sklearn(split.fit, split.val, strength).argmax(axis=1))
        for strength in probe.strengths
    ]
    expected = of_sklearn(split.train, split.test, probe.strengths[int(np.argmax(reached))])
    np.testing.assert_allclose(probe.scores(features, labels, split, 0), expected, atol=1e-3)


def test_ridge_of_two_classes_tells_both_alike() -> None:
    features, labels = clusters(per_class=20, width=5, distance=1.0)
    features, labels = features[:40], labels[:40]
    scores = Ridge().scores(features, labels, of(features, labels), 0)
    np.testing.assert_allclose(scores[:, 0], -scores[:, 1], atol=1e-6)


def test_virchow_probe_follows_sgd_with_momentum_and_a_cosine_to_zero() -> None:
    features, labels = clusters(per_class=20, width=4, distance=1.0)
    split = of(features, labels)
    # The whole training part is one batch and the last state the best, so that steps can be taken by hand.
    probe = VirchowLinear(learning_rate=0.1, iterations=8, checks=1)
    scores = probe.scores(features, labels, split, 0)
    start = replace(probe, learning_rate=0.0, iterations=1).scores(features, labels, split, 0)

    scaler = StandardScaler().fit(features[split.fit])
    fit, test = (scaler.transform(features[rows]).astype(np.float64) for rows in (split.fit, split.test))
    targets = np.eye(3)[labels[split.fit]]
    design, ones = np.column_stack([test, np.ones(len(test))]), np.ones((len(fit), 1))
    weights = np.linalg.lstsq(design, start, rcond=None)[0]  # the drawn layer, from what it tells
    velocity = np.zeros_like(weights)
    for step in range(8):
        logits = np.hstack([fit, ones]) @ weights
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        velocity = 0.9 * velocity + np.hstack([fit, ones]).T @ (shares - targets) / len(fit)
        weights = weights - 0.1 * (1.0 + np.cos(np.pi * step / 8)) / 2.0 * velocity
    np.testing.assert_allclose(scores, design @ weights, atol=1e-4)


def test_virchow_probe_keeps_the_checkpoint_of_the_lowest_validation_loss() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 200)).astype(np.float32), np.tile([0, 1, 2], 20)  # can only overfit
    split = of(features, labels)
    scaler = StandardScaler().fit(features[split.fit])
    assert np.abs(scaler.transform(features[split.fit]).mean(axis=0)).max() < 1e-5

    def val_loss(probe: VirchowLinear) -> float:
        logits = torch.from_numpy(probe.scores(features, labels, replace(split, test=split.val), 0))
        return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels[split.val])))

    watched = VirchowLinear(learning_rate=1.0, iterations=100, checks=100)
    assert val_loss(watched) < val_loss(replace(watched, checks=1)) - 0.1


def test_few_shot_equals_loops_and_draws_from_the_training_tiles_alone() -> None:
    features, labels = clusters(per_class=30, width=6, distance=0.6)
    split, probe = of(features, labels), FewShot(4)
    support = probe.support(labels, split.train, 3)
    assert set(support) <= set(split.train)
    assert labels[support].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    center = features[support].mean(axis=0)
    found = probe.scores(features, labels, split, 3)
    for row, scores in zip(split.test, found, strict=True):
        query = features[row] - center
        query = query / np.linalg.norm(query)
        far = []
        for label in range(3):
            shots = [features[index] - center for index in support if labels[index] == label]
            mean = sum(shot / np.linalg.norm(shot) for shot in shots) / 4
            far.append(float(((query - mean) ** 2).sum()))
        votes = np.exp(-np.array(far))
        np.testing.assert_allclose(scores, votes / votes.sum(), atol=1e-5)
    draws = [tuple(probe.support(labels, split.train, seed)) for seed in range(5)]
    assert len(set(draws)) == 5


def test_too_many_shots_are_refused_with_the_count() -> None:
    features, labels = clusters(per_class=10, width=3, distance=1.0)
    with pytest.raises(DatasetError, match=r"few_shot_16 needs \(got '7 tiles'; expected 16"):
        FewShot(16).scores(features, labels, of(features, labels), 0)


@pytest.mark.parametrize("name", sorted(FAST))
def test_probes_are_right_on_clear_clusters_and_at_chance_on_noise(name: str) -> None:
    features, labels = clusters(per_class=40, width=16, distance=4.0)
    splits = splits_of(labels, CLASSES, 2)
    told = probe_features(FAST[name], features, labels, splits)
    assert len(told) == 2 * FAST[name].draws
    accuracies = [float((part.scores.argmax(axis=1) == labels[part.rows]).mean()) for part in told]
    assert min(accuracies) > 0.99
    noise = np.random.default_rng(1).normal(size=features.shape).astype(np.float32)
    told = probe_features(FAST[name], noise, labels, splits)
    accuracies = [float((part.scores.argmax(axis=1) == labels[part.rows]).mean()) for part in told]
    assert float(np.mean(accuracies)) == pytest.approx(1 / 3, abs=0.17)


@pytest.mark.parametrize("name", sorted(FAST))
def test_no_probe_looks_at_the_labels_of_the_test_part(name: str) -> None:
    features, labels = clusters(per_class=40, width=8, distance=0.5)
    split = of(features, labels)
    other = labels.copy()
    other[split.test] = (other[split.test] + 1) % 3
    np.testing.assert_array_equal(
        FAST[name].scores(features, labels, split, 5), FAST[name].scores(features, other, split, 5)
    )


def test_names_say_what_the_probes_do() -> None:
    assert PROBES["virchow_linear"] == VirchowLinear(0.01, 4096, 12_500)
    for name, probe in PROBES.items():
        assert len(probe.title) <= 15  # the table's column
        assert probe.protocol
        assert name.replace("few_shot_", "") in {"knn", "linear", "ridge", "virchow_linear", "1", "4", "16"}
    assert "cosine from 0.01 to 0, batch 4096, 12500 iterations" in PROBES["virchow_linear"].protocol


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("rigde",), r"no probe of this name \(got 'rigde'.*Use ridge\."),
        (("xyz",), r"Choose from these\."),
        (("knn", "knn"), "each probe is named once"),
        ((), "each probe is named once"),
    ],
)
def test_unknown_and_doubled_names_are_refused(given: tuple[str, ...], words: str) -> None:
    require_known("probe", ("knn", "ridge"), tuple(PROBES))
    with pytest.raises(RecipeError, match=words):
        require_known("probe", given, tuple(PROBES))
