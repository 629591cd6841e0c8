"""Lines on how far a pass over tiles is."""

from histoscale.evaluate.progress import TileProgress
from histoscale.units import describe_duration


def test_progress_is_told_now_and_then_with_rate_and_rest() -> None:
    now_s, said = [0.0], []  # type: tuple[list[float], list[str]]
    progress = TileProgress(1000, said.append, every_s=10.0, clock=lambda: now_s[0])
    for seconds, tiles in ((0.0, 0), (5.0, 100), (10.0, 200), (12.0, 240), (20.0, 500)):
        now_s[0] = seconds
        progress.done(tiles)
    assert said == [
        "200 of 1,000 tiles embedded, 20.0 tiles/s, 40.0 s left",
        "500 of 1,000 tiles embedded, 25.0 tiles/s, 20.0 s left",
    ]


def test_durations_read_as_people_say_them() -> None:
    assert [describe_duration(s) for s in (8.51, 99.9, 720.0, 5940.0, 6000.0, 11100.0)] == [
        "8.5 s", "99.9 s", "12 min", "99 min", "1:40 h", "3:05 h",
    ]  # fmt: skip
