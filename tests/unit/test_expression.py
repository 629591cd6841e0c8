"""Forests on embeddings: r as the definition has it, folds as the task has them."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.ensemble import RandomForestRegressor
from tests.unit.test_datasets_hest import write_hest

from histoscale.evaluate.datasets import open_hest
from histoscale.evaluate.datasets.hest import Fold
from histoscale.evaluate.expression import DEPTH, SEED, TREES, ExpressionScore, pearson_of_fold, score_expression


def test_r_is_the_mean_over_genes_of_a_forest_for_each() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 6)).astype(np.float32)
    values = np.stack([features[:, 0] + 0.1 * rng.normal(size=80), features[:, 1] ** 2], axis=1).astype(np.float32)
    fold = Fold(np.arange(60), np.arange(60, 80))
    found = []
    for gene in range(2):
        forest = RandomForestRegressor(TREES, max_depth=DEPTH, random_state=SEED).fit(features[:60], values[:60, gene])
        found.append(pearsonr(forest.predict(features[60:]), values[60:, gene]).statistic)
    assert pearson_of_fold(features, values, fold, 1) == pytest.approx(np.mean(found))
    assert np.mean(found) > 0.7


def test_a_gene_that_is_alike_everywhere_counts_as_zero() -> None:
    features = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    fold = Fold(np.arange(10), np.arange(10, 20))
    assert pearson_of_fold(features, np.ones((20, 2), dtype=np.float32), fold, 1) == 0.0


def test_a_task_is_scored_fold_by_fold_on_each_embedding(tmp_path: Path) -> None:
    write_hest(tmp_path / "IDC")
    tiles = open_hest(str(tmp_path), "IDC")
    said: list[str] = []

    def extractor(batch: object) -> np.ndarray:  # type: ignore[type-arg]
        return np.stack([np.resize(tile.mean(axis=(0, 1)), 4) for tile in batch]).astype(np.float32)  # type: ignore[attr-defined]

    found = score_expression(tiles, {"one": extractor}, ("cls", "both"), 1, said.append)
    assert [(each.task, each.features, each.embedding, len(each.folds)) for each in found] == [
        ("IDC", "one", "cls", 3),
        ("IDC", "one", "both", 3),
    ]
    assert all(-1.0 <= value <= 1.0 for each in found for value in each.folds)
    assert said[0] == "IDC: 3 folds of 2 forests on one, cls"


def test_the_score_is_mean_and_deviation_over_the_folds() -> None:
    score = ExpressionScore("IDC", "one", "cls", (0.2, 0.4))
    assert (score.mean, score.std) == (pytest.approx(0.3), pytest.approx(np.std([0.2, 0.4], ddof=1)))
    assert ExpressionScore("IDC", "one", "cls", (0.2,)).std == 0.0
