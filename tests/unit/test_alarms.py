"""The alarms of a run: when they are armed, that they ring once for each cause, and that a healthy run hears none."""

from histoscale.config.recipe import Recipe
from histoscale.observe.alarms import (
    COLLAPSE_STEPS,
    COLLAPSED_COSINE,
    STARVED_STEPS,
    Alarm,
    Alarms,
    CollapseAlarm,
    StarvationAlarm,
)


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


def test_training_that_waits_for_tiles_rings_once() -> None:
    shares = [0.05] * 100 + [0.9] * 100 + [0.0] * 100 + [0.9] * 100
    found = rings(StarvationAlarm(), "time/wait_share", shares)
    assert len(found) == 2
    assert 100 < found[0] < 100 + STARVED_STEPS
    assert rings(StarvationAlarm(), "time/wait_share", [1.0] + [0.0] * 100) == [], "the first step waits for all"


def test_a_run_has_all_alarms_and_a_healthy_one_hears_none() -> None:
    alarms = Alarms(Recipe())
    healthy = {"health/mean_cosine": 0.1, "time/wait_share": 0.0, "progress/images_seen": 1e9}
    assert [said for _ in range(200) for said in alarms.update(healthy)] == []
    ill = healthy | {"health/mean_cosine": 1.0, "time/wait_share": 1.0}
    said = [said.split(":")[0] for _ in range(200) for said in alarms.update(ill)]
    assert sorted(said) == ["the model collapses", "training starves"]
