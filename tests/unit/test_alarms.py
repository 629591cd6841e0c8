"""The alarms of a run: when they are armed, that they ring once for each cause, and that a healthy run hears none."""

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from histoscale.config.decode import load_recipe
from histoscale.config.recipe import Recipe
from histoscale.observe.alarms import (
    COLLAPSE_STEPS,
    COLLAPSED_COSINE,
    HUGE_UPDATE,
    LARGEST_UPDATE,
    READINGS,
    STARVED_STEPS,
    Alarm,
    Alarms,
    CollapseAlarm,
    DivergenceAlarm,
    StarvationAlarm,
)
from histoscale.observe.group_alarm import GroupAlarm
from histoscale.observe.runaway import BASELINE_STEPS, LEAST_BASELINE_STEPS, RECENT_STEPS, Ring, Runaway
from histoscale.train.health import WATCH_EVERY_STEPS

Curves = Mapping[str, Sequence[float]]


def lines(curves: Curves, images: int = 10) -> list[dict[str, float]]:
    """What a run would write; curves of what is watched hold a value for each watched step."""
    steps = max(map(len, curves.values()))
    found = []
    for step in range(steps):
        line = {"step": step, "progress/images_seen": float(images * (step + 1))}
        for name, curve in curves.items():
            if len(curve) == steps:
                line[name] = curve[step]
            elif step % WATCH_EVERY_STEPS == 0:
                line[name] = curve[step // WATCH_EVERY_STEPS]
        found.append(line)
    return found


def rings(alarm: Alarm, curves: Curves, images: int = 10) -> list[tuple[int, Ring]]:
    """Where an alarm begins to ring, and what it says."""
    found, ringing = [], False
    for line in lines(curves, images):
        ring = alarm.update(line)
        if ring is not None and not ringing:
            found.append((int(line["step"]), ring))
        ringing = ring is not None
    return found


def starts(alarm: Alarm, curves: Curves, images: int = 10) -> list[int]:
    return [step for step, _ in rings(alarm, curves, images)]


def collapses(alarm: CollapseAlarm, cosines: list[float]) -> list[int]:
    return starts(alarm, {"health/mean_cosine": cosines})


def noisy(level: float, steps: int, seed: int = 0, share: float = 0.05) -> list[float]:
    return (level * (1.0 + share * np.random.default_rng(seed).standard_normal(steps))).tolist()


def test_a_new_network_may_map_all_tiles_to_one_token() -> None:
    assert collapses(CollapseAlarm(warmup_images=1000), [0.999] * 90) == []


def test_it_rings_once_after_tokens_have_met_again() -> None:
    cosines = [0.999] * 5 + [0.5] * 5 + [0.999] * 3 * COLLAPSE_STEPS
    [(step, ring)] = rings(CollapseAlarm(warmup_images=10**6), {"health/mean_cosine": cosines})
    assert (step, ring.alarm, ring.since) == (9 + COLLAPSE_STEPS, "collapse", 10)


def test_it_rings_for_a_network_that_never_parts_tokens() -> None:
    assert collapses(CollapseAlarm(warmup_images=100), [0.999] * 100) == [9 + COLLAPSE_STEPS]


def test_a_short_meeting_is_no_collapse() -> None:
    cosines = ([0.5] + [0.999] * (COLLAPSE_STEPS - 1)) * 4
    assert collapses(CollapseAlarm(warmup_images=0), cosines) == []


@pytest.mark.parametrize(("ranks", "expected"), [([9, 8, 1.8, 1.5, 1.2, 1.1], [40]), ([9, 1.8, 1.5, 3, 1.2, 1.1], [])])
def test_tokens_along_one_direction_are_a_collapse_whatever_their_cosine(
    ranks: list[float], expected: list[int]
) -> None:
    curves = {"health/effective_rank": ranks, "health/mean_cosine": [0.0] * 60}
    assert starts(CollapseAlarm(warmup_images=10**6), curves) == expected
    assert starts(CollapseAlarm(warmup_images=10**6), {**curves, "health/effective_rank": [1.2] * 6}) == []


def test_it_says_what_and_what_to_do() -> None:
    curves = {"health/mean_cosine": [0.99] * COLLAPSE_STEPS}
    [(_, ring)] = rings(CollapseAlarm(warmup_images=0), curves)
    assert str(COLLAPSED_COSINE) in ring.said
    assert "0.9900" in ring.said
    assert "loss.kde_weight" in ring.said


def healthy(steps: int) -> dict[str, list[float]]:
    """A warm-up in which the gradient falls from a hundred to five, and a loss that falls and goes on being noisy."""
    fall = [math.exp(-step / 15) for step in range(steps)]
    loss, norm = noisy(1.0, steps, 1, 0.02), noisy(1.0, steps, 2, 0.3)
    return {
        "loss/total": [(4.0 + 6.0 * f) * n for f, n in zip(fall, loss, strict=True)],
        "optim/grad_norm": [(5.0 + 95.0 * f) * abs(n) for f, n in zip(fall, norm, strict=True)],
        "optim/update_norm": noisy(0.002, math.ceil(steps / WATCH_EVERY_STEPS), 3),
    }


def test_a_warm_up_and_spikes_are_no_divergence() -> None:
    curves = healthy(500)
    for step in range(100, 500, 37):
        curves["optim/grad_norm"][step] *= 100.0
        curves["loss/total"][step] *= 3.0
    assert starts(DivergenceAlarm(), curves) == []


@pytest.mark.parametrize(("name", "factor"), [("loss/total", 2.0), ("optim/grad_norm", 30.0)])
def test_what_runs_away_rings_once_within_the_recent_steps_and_says_since_when(name: str, factor: float) -> None:
    curves = healthy(500)
    curves[name] = [value * (factor if step >= 300 else 1.0) for step, value in enumerate(curves[name])]
    [(step, ring)] = rings(DivergenceAlarm(), curves)
    assert 300 < step <= 300 + RECENT_STEPS
    assert 300 - RECENT_STEPS < ring.since <= 300
    assert name in ring.said
    assert "optim.lr" in ring.said


def test_updates_that_hardly_keep_the_weights_are_a_divergence_from_the_first_step_on() -> None:
    curves = healthy(60) | {"optim/update_norm": [2 * LARGEST_UPDATE] * 6}
    [(step, ring)] = rings(DivergenceAlarm(), curves)
    assert (step, ring.since) == ((READINGS - 1) * WATCH_EVERY_STEPS, 0)
    twice = [2 * LARGEST_UPDATE, 2 * LARGEST_UPDATE, 0.001]
    assert starts(DivergenceAlarm(), healthy(60) | {"optim/update_norm": twice * 2}) == []
    once = healthy(60) | {"optim/update_norm": [2 * HUGE_UPDATE, *[0.001] * 5]}
    assert [(step, ring.since) for step, ring in rings(DivergenceAlarm(), once)] == [(0, 0)]


def test_what_is_away_does_not_become_usual() -> None:
    runaway = Runaway(share=0.5)
    values = noisy(1.0, 200) + noisy(3.0, 3 * BASELINE_STEPS) + noisy(1.0, 100)
    away = [runaway.update(step, value) is not None for step, value in enumerate(values)]
    assert away.index(True) < 200 + RECENT_STEPS
    assert all(away[200 + RECENT_STEPS : 200 + 3 * BASELINE_STEPS])
    assert not any(away[-50:])


def test_nothing_is_usual_before_there_was_enough_of_it() -> None:
    runaway = Runaway(share=0.5)
    few = LEAST_BASELINE_STEPS + RECENT_STEPS - 1
    assert not [step for step in range(few) if runaway.update(step, 2.0**step) is not None]


def groups(steps: int, prefix: str = "loss_by_stratum/site=") -> dict[str, list[float]]:
    """Losses that fall together and stay noisy, one always a little above the others."""
    fall = [5.0 + 5.0 * math.exp(-step / 50) for step in range(steps)]
    return {
        prefix + name: [value + level + noise for value, noise in zip(fall, noisy(0.1, steps, seed, 1.0), strict=True)]
        for seed, (name, level) in enumerate({"A": 0.0, "B": 0.0, "C": 0.3}.items())
    }


def test_groups_that_fall_together_ring_nothing_however_far_apart() -> None:
    assert starts(GroupAlarm(), groups(500)) == []
    assert starts(GroupAlarm(), {"loss_by_mpp/0.5": [5.0] * 100 + [50.0] * 100}) == [], "there is no other"


@pytest.mark.parametrize("move", [2.0, -2.0])
@pytest.mark.parametrize(
    ("prefix", "remedy"), [("loss_by_stratum/site=", "data.weights"), ("loss_by_mpp/", "its tiles")]
)
def test_a_group_that_leaves_the_others_rings_by_name(move: float, prefix: str, remedy: str) -> None:
    curves = groups(400, prefix)
    curves[prefix + "B"] = [value + (move if step >= 200 else 0.0) for step, value in enumerate(curves[prefix + "B"])]
    [(step, ring)] = rings(GroupAlarm(), curves)
    assert 200 < step <= 200 + RECENT_STEPS
    assert 200 - RECENT_STEPS < ring.since <= 200
    assert ring.said.startswith(f"the {'stratum site=' if 'stratum' in prefix else 'magnification '}B runs away")
    assert remedy in ring.said


def test_of_two_groups_both_are_named() -> None:
    curves = {name: curve for name, curve in groups(400).items() if not name.endswith("C")}
    name = "loss_by_stratum/site=B"
    curves[name] = [value + (2.0 if step >= 200 else 0.0) for step, value in enumerate(curves[name])]
    [(_, ring)] = rings(GroupAlarm(), curves)
    assert ring.said.startswith("the strata site=A and site=B run apart")


def test_training_that_waits_for_tiles_rings_once() -> None:
    shares = [0.05] * 100 + [0.9] * 100 + [0.0] * 100 + [0.9] * 100
    found = starts(StarvationAlarm(), {"time/wait_share": shares})
    assert len(found) == 2
    assert 100 < found[0] < 100 + STARVED_STEPS
    first = {"time/wait_share": [1.0] + [0.0] * 100}
    assert starts(StarvationAlarm(), first) == [], "the first step waits for all"


WELL = {"health/mean_cosine": 0.1, "time/wait_share": 0.0, "loss/total": 1.0, "optim/grad_norm": 1.0}
ILL = WELL | {"health/mean_cosine": 1.0, "time/wait_share": 1.0, "loss/total": 9.0}


def test_a_real_quickstart_hears_none() -> None:
    """What the alarms look at in the metrics of a quickstart on two cores, to four digits."""
    content = gzip.decompress((Path(__file__).parent / "data" / "quickstart_metrics.jsonl.gz").read_bytes())
    told = [json.loads(line) for line in content.decode().splitlines()]
    recipe = load_recipe(Path(__file__).parents[2] / "jobs" / "recipes" / "quickstart.yaml")
    assert len(told) == recipe.steps
    alarms = Alarms(recipe)
    assert [ring for values in told for ring in alarms.update(values)] == []


def play(alarms: Alarms, values: Mapping[str, float], steps: range) -> list[str]:
    told = ({"step": step, "progress/images_seen": 1e9, **values} for step in steps)
    return [ring.alarm for line in told for ring in alarms.update(line)]


def test_a_run_has_all_alarms_and_a_healthy_one_hears_none() -> None:
    alarms = Alarms(Recipe())
    assert play(alarms, WELL, range(200)) == []
    assert sorted(play(alarms, ILL, range(200, 400))) == ["collapse", "divergence", "starvation"]


def test_a_resumed_run_knows_what_was_usual_and_hears_what_still_lasts() -> None:
    before = [{"step": step, "progress/images_seen": 1e9, **WELL} for step in range(200)]
    assert play(Alarms(Recipe(), before), ILL, range(200, 200 + RECENT_STEPS)) == [
        "divergence",
        "starvation",
        "collapse",
    ]
    assert play(Alarms(Recipe()), ILL, range(200, 200 + RECENT_STEPS)) == ["collapse"]
    ringing = [{"step": step, "progress/images_seen": 1e9, **ILL} for step in range(100)]
    assert sorted(play(Alarms(Recipe(), ringing), ILL, range(100, 101))) == ["collapse", "starvation"]
