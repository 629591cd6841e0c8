import math

import pytest

from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.train.schedules import schedules_at


def recipe_with(**optim: object) -> Recipe:
    return decode_recipe(
        {
            "batch": {"tiles": 10, "replicas": 2},
            "optim": {
                "lr": 1.0,
                "min_lr": 0.2,
                "warmup_images": 100,
                "weight_decay": [0.1, 0.3],
                "ema_momentum": [0.9, 1.0],
                **optim,
            },
            "loss": {"teacher_temperature": [0.04, 0.07], "teacher_temperature_warmup_images": 300},
            "schedule": {"images": 1100},
        }
    )


@pytest.mark.parametrize(
    ("images_seen", "expected"),
    [(10, 0.1), (50, 0.5), (100, 1.0), (350, 0.6 + 0.4 * math.sqrt(0.5)), (600, 0.6), (1100, 0.2), (2000, 0.2)],
)
def test_learning_rate_rises_linearly_and_falls_on_a_half_cosine(images_seen: int, expected: float) -> None:
    assert schedules_at(recipe_with(), images_seen).lr == pytest.approx(expected)


def test_learning_rate_without_warm_up_starts_at_its_peak() -> None:
    assert schedules_at(recipe_with(warmup_images=0), 0).lr == pytest.approx(1.0)


def test_warm_up_longer_than_the_run_never_ends() -> None:
    assert schedules_at(recipe_with(warmup_images=2200), 1100).lr == pytest.approx(0.5)


@pytest.mark.parametrize(("images_seen", "share"), [(0, 0.0), (275, 0.5 - math.sqrt(0.125)), (550, 0.5), (1100, 1.0)])
def test_weight_decay_and_momentum_follow_half_a_cosine(images_seen: int, share: float) -> None:
    settings = schedules_at(recipe_with(), images_seen)
    assert settings.weight_decay == pytest.approx(0.1 + 0.2 * share)
    assert settings.ema_momentum == pytest.approx(0.9 + 0.1 * share)


@pytest.mark.parametrize(("images_seen", "expected"), [(0, 0.04), (100, 0.05), (300, 0.07), (1100, 0.07)])
def test_teacher_temperature_warms_up_linearly(images_seen: int, expected: float) -> None:
    assert schedules_at(recipe_with(), images_seen).teacher_temperature == pytest.approx(expected)
