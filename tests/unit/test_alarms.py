"""The alarm for collapse: when it is armed, and that it rings once."""

from histoscale.observe.alarms import COLLAPSED_COSINE, PATIENCE_STEPS, CollapseAlarm


def rings(alarm: CollapseAlarm, cosines: list[float], images: int = 10) -> list[int]:
    return [step for step, cosine in enumerate(cosines) if alarm.update(images * (step + 1), cosine) is not None]


def test_a_new_network_may_map_all_tiles_to_one_token() -> None:
    assert rings(CollapseAlarm(warmup_images=1000), [0.999] * 90) == []


def test_it_rings_once_after_tokens_have_met_again() -> None:
    cosines = [0.999] * 5 + [0.5] * 5 + [0.999] * 3 * PATIENCE_STEPS
    assert rings(CollapseAlarm(warmup_images=10**6), cosines) == [9 + PATIENCE_STEPS]


def test_it_rings_for_a_network_that_never_parts_tokens() -> None:
    assert rings(CollapseAlarm(warmup_images=100), [0.999] * 100) == [9 + PATIENCE_STEPS]


def test_a_short_meeting_is_no_collapse() -> None:
    cosines = ([0.5] + [0.999] * (PATIENCE_STEPS - 1)) * 4
    assert rings(CollapseAlarm(warmup_images=0), cosines) == []


def test_it_says_what_and_what_to_do() -> None:
    alarm = CollapseAlarm(warmup_images=0)
    said = [alarm.update(1, 0.99) for _ in range(PATIENCE_STEPS)][-1]
    assert said is not None
    assert str(COLLAPSED_COSINE) in said
    assert "0.9900" in said
    assert "loss.kde_weight" in said
