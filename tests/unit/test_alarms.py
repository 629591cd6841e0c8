"""The alarms of a run: when they are armed, that they ring once for each cause, and that a healthy run hears none."""

import math

import pytest

from histoscale.config.recipe import Recipe
from histoscale.observe.alarms import (
    CHANCE_STEPS,
    COLLAPSE_STEPS,
    COLLAPSED_COSINE,
    STARVED_STEPS,
    Alarm,
    Alarms,
    ChanceAlarm,
    CollapseAlarm,
    StarvationAlarm,
)

PROTOTYPES = 64
CHANCE = math.log(PROTOTYPES)


def rings(alarm: Alarm, name: str, values: list[float], images: int = 10) -> list[int]:
    return [
        step
        for step, value in enumerate(values)
        if alarm.update({name: value, "progress/images_seen": float(images * (step + 1))}) is not None
    ]


def collapses(alarm: CollapseAlarm, cosines: list[float]) -> list[int]:
    return rings(alarm, "health/mean_cosine", cosines)


def test_a_new_network_may_map_all_tiles_to_one_token() -> None:
    assert collapses(CollapseAlarm(warmup_images=1000), [0.999] * 90) == []


def test_it_rings_once_after_tokens_have_met_again() -> None:
    cosines = [0.999] * 5 + [0.5] * 5 + [0.999] * 3 * COLLAPSE_STEPS
    assert collapses(CollapseAlarm(warmup_images=10**6), cosines) == [9 + COLLAPSE_STEPS]


def test_it_rings_for_a_network_that_never_parts_tokens() -> None:
    assert collapses(CollapseAlarm(warmup_images=100), [0.999] * 100) == [9 + COLLAPSE_STEPS]


def test_a_short_meeting_is_no_collapse() -> None:
    cosines = ([0.5] + [0.999] * (COLLAPSE_STEPS - 1)) * 4
    assert collapses(CollapseAlarm(warmup_images=0), cosines) == []


def test_it_says_what_and_what_to_do() -> None:
    alarm = CollapseAlarm(warmup_images=0)
    values = {"health/mean_cosine": 0.99, "progress/images_seen": 1.0}
    said = [alarm.update(values) for _ in range(COLLAPSE_STEPS)][-1]
    assert said is not None
    assert str(COLLAPSED_COSINE) in said
    assert "0.9900" in said
    assert "loss.kde_weight" in said


def test_a_new_student_may_be_no_better_than_chance() -> None:
    assert rings(ChanceAlarm("dino", PROTOTYPES, 10**6), "loss/dino", [CHANCE] * 300) == []


def test_a_student_that_is_back_at_chance_rings_once_each_time() -> None:
    good, bad = [0.8 * CHANCE] * 100, [CHANCE] * 100
    found = rings(ChanceAlarm("dino", PROTOTYPES, 10**6), "loss/dino", good + bad + good + bad)
    assert len(found) == 2
    assert 100 < found[0] < 100 + CHANCE_STEPS
    assert 300 < found[1] < 300 + CHANCE_STEPS


def test_a_student_that_is_at_chance_after_the_warmup_rings() -> None:
    assert rings(ChanceAlarm("ibot", PROTOTYPES, 1000), "loss/ibot", [CHANCE] * 200) == [100]


def test_one_bad_step_is_no_divergence() -> None:
    curve = ([0.8 * CHANCE] * (CHANCE_STEPS - 1) + [5 * CHANCE]) * 6
    assert rings(ChanceAlarm("dino", PROTOTYPES, 0), "loss/dino", curve) == []


def test_training_that_waits_for_tiles_rings_once() -> None:
    shares = [0.05] * 100 + [0.9] * 100 + [0.0] * 100 + [0.9] * 100
    found = rings(StarvationAlarm(), "time/wait_share", shares)
    assert len(found) == 2
    assert 100 < found[0] < 100 + STARVED_STEPS
    assert rings(StarvationAlarm(), "time/wait_share", [1.0] + [0.0] * 100) == [], "the first step waits for all"


@pytest.mark.parametrize("distill", [None, {"teacher": "/runs/a"}, {"teacher": "/exports/a", "mode": "features"}])
def test_a_run_has_the_alarms_that_its_loss_allows(distill: dict[str, str] | None) -> None:
    values: dict[str, object] = {"model": {"drop_path": 0.0}, "distill": distill}
    if distill and "mode" in distill:
        values["crops"] = {"local_count": 0}
    alarms = Alarms(Recipe.model_validate(values))
    healthy = {"health/mean_cosine": 0.1, "time/wait_share": 0.0, "progress/images_seen": 1e9}
    if not distill or "mode" not in distill:
        healthy |= {"loss/dino": 5.0, "loss/ibot": 5.0}
    assert [said for _ in range(200) for said in alarms.update(healthy)] == []
    ill = healthy | {"health/mean_cosine": 1.0, "time/wait_share": 1.0, "loss/dino": 12.0, "loss/ibot": 12.0}
    said = [said.split(":")[0] for _ in range(200) for said in alarms.update(ill)]
    expected = {
        "the model collapses": 1,
        "training starves": 1,
        "the student is at chance": 2 if "loss/dino" in healthy else 0,
    }
    assert {what: said.count(what) for what in expected} == expected
