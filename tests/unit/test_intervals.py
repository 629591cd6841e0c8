"""Metrics, bootstrap intervals and permutation tests: against scikit-learn and loops, and on simulated data."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

from histoscale.evaluate import intervals
from histoscale.evaluate.intervals import Told, bootstrap, interval, permutation_p, values_of
from histoscale.evaluate.metrics import AUROC, DECIDED, METRICS, measure, of_confusions, weighted_auroc
from histoscale.seeding import key, uniforms


def noisy(count: int, classes: int, seed: int = 0, decimals: int = 6) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels of unequal classes and scores that tell something about them; few decimals make ties."""
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.integers(0, classes, count) * rng.integers(0, 2, count))
    labels[:classes] = np.arange(classes)
    scores = rng.normal(size=(count, classes)) + 0.8 * np.eye(classes)[labels]
    return labels, np.round(scores, decimals)


def by_scikit_learn(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> dict[str, float]:
    told = scores.argmax(axis=1)
    present = np.unique(labels)
    return {
        "balanced_accuracy": balanced_accuracy_score(labels, told),
        "weighted_f1": f1_score(labels, told, average="weighted"),
        "macro_f1": f1_score(labels, told, average="macro"),
        "accuracy": accuracy_score(labels, told),
        AUROC: np.mean([roc_auc_score(labels == label, scores[:, label]) for label in present]),
    }


def test_measure_equals_scikit_learns_own_averages() -> None:
    labels, scores = noisy(200, 4)
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    found = measure(labels, shares)
    assert found == pytest.approx(by_scikit_learn(labels, shares))
    assert found[AUROC] == pytest.approx(roc_auc_score(labels, shares, multi_class="ovr", average="macro"))
    two = shares[labels < 2][:, :2] / shares[labels < 2][:, :2].sum(axis=1, keepdims=True)
    assert measure(labels[labels < 2], two)[AUROC] == pytest.approx(roc_auc_score(labels[labels < 2], two[:, 1]))


def test_measure_of_a_blind_probe_is_that_of_the_definition() -> None:
    labels = np.repeat([0, 1], [30, 3])
    found = measure(labels, np.tile([0.9, 0.1], (33, 1)))
    f1 = 2 * (30 / 33) / (30 / 33 + 1)
    assert found == pytest.approx(
        {"balanced_accuracy": 0.5, "weighted_f1": f1 * 30 / 33, "macro_f1": f1 / 2, "accuracy": 30 / 33, AUROC: 0.5}
    )


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.parametrize("decimals", [6, 0])  # without and with ties
def test_every_resample_equals_scikit_learn_on_the_tiles_that_were_drawn(decimals: int) -> None:
    labels, scores = noisy(60, 3, decimals=decimals)
    units = np.random.default_rng(1).integers(0, 12, 60)
    told = (Told(np.arange(0, 60, 2), scores[::2]), Told(np.arange(20, 60), scores[20:]))
    samples = bootstrap(labels, units, told, resamples=20, seed=5)
    tested = np.unique(units)
    draws = uniforms(key(5, "bootstrap"), np.arange(20), len(tested))
    for number in range(20):
        drawn = tested[(draws[number] * len(tested)).astype(int)]
        expected = {metric: [] for metric in METRICS}
        for part in told:
            rows = np.concatenate([np.flatnonzero(units[part.rows] == unit) for unit in drawn])
            for metric, value in by_scikit_learn(labels[part.rows][rows], part.scores[rows]).items():
                expected[metric].append(value)
        for metric in METRICS:
            assert samples[metric][number] == pytest.approx(float(np.mean(expected[metric])), abs=1e-12), metric


def test_resamples_do_not_depend_on_how_many_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, scores = noisy(60, 3)
    units = np.arange(60)
    told = (Told(np.arange(60), scores),)
    other = (Told(np.arange(60), scores[::-1].copy()),)
    whole, p_values = bootstrap(labels, units, told, 30), permutation_p(labels, units, told, other, 30)
    monkeypatch.setattr(intervals, "_CHUNK_ELEMENTS", 400)
    pieces = bootstrap(labels, units, told, 30)
    for metric in METRICS:
        np.testing.assert_allclose(whole[metric], pieces[metric], rtol=1e-12)
    assert permutation_p(labels, units, told, other, 30) == pytest.approx(p_values)


def test_draws_of_a_split_are_resampled_within_it() -> None:
    # No tile matters, for each part is right or wrong throughout: what varies is which draws are drawn.
    labels = np.arange(40) % 2
    right, wrong = (answers(np.full(40, value))[0] for value in (1, 0))
    told = (right, right, wrong, wrong, *[right] * 4)  # two splits of four draws
    samples = bootstrap(labels, np.arange(40), told, 4000, draws=4)["accuracy"]
    assert set(np.round(samples * 8).astype(int)) == {4, 5, 6, 7, 8}
    assert float(samples.mean()) == pytest.approx(6 / 8, abs=0.01)
    assert float(samples.std()) == pytest.approx(np.sqrt(4 * 0.25) / 8, rel=0.05)  # a binomial of four
    fixed = bootstrap(labels, np.arange(40), told, 50)["accuracy"]
    assert float(fixed.std()) < 1e-12


def test_metrics_of_a_resample_without_a_class_leave_the_class_out() -> None:
    table = np.array([[[4.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 3.0]]])
    labels, told = np.repeat([0, 0, 2, 2], [4, 1, 2, 3]), np.repeat([0, 1, 0, 2], [4, 1, 2, 3])
    found = of_confusions(table)
    assert found["balanced_accuracy"][0] == pytest.approx((4 / 5 + 3 / 5) / 2)
    assert found["macro_f1"][0] == pytest.approx(f1_score(labels, told, average="macro"))
    assert found["weighted_f1"][0] == pytest.approx(f1_score(labels, told, average="weighted"))
    scores, weights = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), np.array([[1.0, 0.0, 2.0], [1.0, 1.0, 1.0]])
    area = weighted_auroc(np.array([0, 1, 0]), scores, weights)
    assert np.isnan(area[0])  # one class is left, and nothing to tell it from
    assert area[1] == 1.0
    assert interval(np.array([np.nan, 0.5, 0.5])) == (0.5, 0.5)


def test_interval_is_the_middle_95_percent() -> None:
    assert interval(np.arange(1001) / 1000.0) == pytest.approx((0.025, 0.975))


def simulated(seed: int, units: int, per_unit: int, spread: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Units and whether each tile is told rightly (1), with a rate of the unit's own, 0.7 on average."""
    rng = np.random.default_rng(seed)
    rates = np.clip(0.7 + spread * rng.uniform(-1, 1, units), 0, 1)
    return np.repeat(np.arange(units), per_unit), (rng.random(units * per_unit) < np.repeat(rates, per_unit)) * 1


def answers(right: NDArray[np.int64]) -> tuple[Told, ...]:
    """Scores of a two-class probe on tiles of alternating classes, right where told to be."""
    labels = np.arange(len(right)) % 2
    told = np.where(right == 1, labels, 1 - labels)
    return (Told(np.arange(len(right)), np.eye(2)[told]),)


def coverage(over_groups: bool, simulations: int = 300) -> float:
    covered = 0
    for seed in range(simulations):
        units, right = simulated(seed, units=40, per_unit=10, spread=0.3)
        drawn_as_whole = units if over_groups else np.arange(len(units))
        samples = bootstrap(np.arange(400) % 2, drawn_as_whole, answers(right), resamples=200, seed=seed)
        low, high = interval(samples["accuracy"])
        covered += low <= 0.7 <= high
    return covered / simulations


def test_intervals_over_groups_cover_the_truth_at_their_level_and_those_over_tiles_do_not() -> None:
    assert 0.91 <= coverage(over_groups=True) <= 0.98
    assert coverage(over_groups=False) < 0.88


def test_intervals_of_a_mean_over_splits_that_test_some_tiles_twice_cover_the_truth() -> None:
    covered = 0
    for seed in range(300):
        units, right = simulated(seed, units=60, per_unit=10, spread=0.3)
        rng = np.random.default_rng(seed)
        whole = answers(right)[0].scores
        parts = [np.flatnonzero(np.isin(units, rng.choice(60, 20, replace=False))) for _ in range(3)]
        told = [Told(rows, whole[rows]) for rows in parts]
        low, high = interval(bootstrap(np.arange(600) % 2, units, told, 200, seed)["accuracy"])
        covered += low <= 0.7 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_intervals_of_a_paired_difference_cover_the_truth_at_their_level() -> None:
    # Both models share what is hard about a unit; ours is right where theirs is, and on 8 % of the rest.
    covered, widths = 0, []
    for seed in range(300):
        units, theirs = simulated(seed, units=40, per_unit=10, spread=0.3)
        ours = theirs | (np.random.default_rng(1000 + seed).random(400) < 0.08)
        samples = [
            bootstrap(np.arange(400) % 2, units, answers(right), 200, seed)["accuracy"] for right in (ours, theirs)
        ]
        low, high = interval(samples[0] - samples[1])
        covered += low <= 0.3 * 0.08 <= high
        one_low, one_high = interval(samples[0])
        widths.append((high - low) / (one_high - one_low))
    assert 0.90 <= covered / 300 <= 0.98
    assert float(np.mean(widths)) < 0.5  # pairing is what makes a small difference visible


def test_permutation_equals_a_loop_and_never_is_zero() -> None:
    labels, scores = noisy(60, 3)
    other = noisy(60, 3, seed=3)[1]
    units = np.random.default_rng(1).integers(0, 9, 60)
    parts = (np.arange(0, 60, 2), np.arange(20, 60))
    ours, theirs = ([Told(rows, table[rows]) for rows in parts] for table in (scores, other))
    found = permutation_p(labels, units, ours, theirs, permutations=12, seed=2)
    draws = uniforms(key(2, "permutation"), np.arange(13), int(units.max()) + 1)
    for metric in DECIDED:
        differences = []
        for number in range(13):
            swap = (draws[number] < 0.5)[units] & (number > 0)
            first = np.where(swap[:, None], other, scores)
            second = np.where(swap[:, None], scores, other)
            means = [
                np.mean([by_scikit_learn(labels[rows], table[rows])[metric] for rows in parts])
                for table in (first, second)
            ]
            differences.append(abs(means[0] - means[1]))
        expected = np.mean(np.array(differences) >= differences[0] - 1e-12)
        assert found[metric] == pytest.approx(float(expected)), metric
    clear = permutation_p(np.arange(400) % 2, np.arange(400), answers(np.ones(400)), answers(np.zeros(400)), 99)
    assert clear["accuracy"] == 0.01
    same = permutation_p(labels, units, ours, ours, 99)
    assert set(same.values()) == {1.0}


def test_permutation_of_single_tiles_equals_the_exact_sign_test() -> None:
    ours = np.repeat([1, 0, 1], [80, 12, 4])
    theirs = np.repeat([1, 1, 0], [80, 12, 4])
    found = permutation_p(np.arange(96) % 2, np.arange(96), answers(ours), answers(theirs), 4000)["accuracy"]
    assert found == pytest.approx(binomtest(4, 16).pvalue, abs=0.02)


def test_permutation_is_right_at_its_level_where_models_are_alike() -> None:
    # Two models that are right at the same rate in each unit, and independently within it.
    hits = 0
    for seed in range(300):
        units, first = simulated(seed, units=30, per_unit=10, spread=0.3)
        rng = np.random.default_rng(seed)
        rates = np.clip(0.7 + 0.3 * rng.uniform(-1, 1, 30), 0, 1)
        second = (np.random.default_rng(5000 + seed).random(300) < np.repeat(rates, 10)) * 1
        p_value = permutation_p(np.arange(300) % 2, units, answers(first), answers(second), 99, seed)["accuracy"]
        hits += p_value <= 0.1
    assert 0.06 <= hits / 300 <= 0.14


def test_values_are_those_of_each_test_part() -> None:
    labels, scores = noisy(60, 3)
    told = (Told(np.arange(40), scores[:40]), Told(np.arange(20, 60), scores[20:]))
    found = values_of(labels, told)
    for metric in METRICS:
        assert found[metric] == tuple(measure(labels[part.rows], part.scores)[metric] for part in told)
