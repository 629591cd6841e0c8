import math

import pytest

from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.errors import RecipeError
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


@pytest.mark.parametrize(
    ("images_seen", "expected"),
    [(50, 0.5), (100, 1.0), (500, 1.0), (700, 1.0), (800, 1.0 - 0.8 * 0.5), (1100, 0.2), (2000, 0.2)],
)
def test_a_constant_rate_falls_over_its_cooldown_alone(images_seen: int, expected: float) -> None:
    recipe = recipe_with(decay={"cooldown_images": 400})
    assert schedules_at(recipe, images_seen).lr == pytest.approx(expected)


@pytest.mark.parametrize("images_seen", [100, 1099, 1100])
def test_without_a_cooldown_the_rate_never_falls(images_seen: int) -> None:
    assert schedules_at(recipe_with(decay={"cooldown_images": 0}), images_seen).lr == 1.0


def test_a_trunk_and_its_fork_have_the_rates_of_one_run() -> None:
    whole = recipe_with(decay={"cooldown_images": 200})
    trunk = recipe_with(decay={"cooldown_images": 0})
    fork = whole.model_copy(
        update={
            "optim": whole.optim.model_copy(update={"warmup_images": 0}),
            "schedule": whole.schedule.model_copy(update={"images": 200}),
        }
    )
    rates = [schedules_at(trunk, images).lr for images in range(10, 901, 10)]
    rates += [schedules_at(fork, images).lr for images in range(10, 201, 10)]
    assert rates == pytest.approx([schedules_at(whole, images).lr for images in range(10, 1101, 10)])


def test_a_cooldown_longer_than_the_run_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"cooldown_images must fit in schedule.images, got 100 and 1001 in 1100"):
        recipe_with(decay={"cooldown_images": 1001})


def test_another_decay_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"optim.decay"):
        recipe_with(decay="linear")
    with pytest.raises(RecipeError, match=r"is not a field \(nearest: .*cooldown_images\)"):
        recipe_with(decay={"cooldown_image": 5})
