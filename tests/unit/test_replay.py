"""What a replay makes of a step: which module, term or parameter came first, and what that comes down to."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from histoscale.augment.crops import Views
from histoscale.cluster.replay_report import Origin, Replayed, describe_rerun, diagnose, find_origin, tile_facts
from histoscale.errors import NonFiniteError
from histoscale.train.objective import Inputs, Losses
from histoscale.train.rerun import Audit, BadOutput, Rerun, Seen, _Watch

FAILURE = NonFiniteError("the loss is not finite")


# What is seen of a step.


class Squares:
    """Two terms of a network's output, the second one rooted; its teacher doubles."""

    names, weights = ("plain", "rooted"), (1.0, 1.0)

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.centers: dict[str, Tensor] = {"a": torch.zeros(1)}
        self.advanced = 0

    def mask(self, sample_ids: Any) -> Any:
        return np.ones((len(sample_ids), 1), np.bool_)

    def targets(self, inputs: Any, temperature: float) -> list[Tensor]:
        return [self.teacher(each.views.global_crops) for each in inputs]

    def losses(self, forward: Any, inputs: Inputs, targets: Tensor) -> Losses:
        out = forward(inputs.views.global_crops)
        terms = torch.stack([(out - targets).square().mean(), out.square().sum().sqrt()])
        return Losses(terms, out.detach()[:, 0], out.detach())

    def watch(self, targets: Any) -> dict[str, float]:
        return {"health/targets": float(len(targets))}

    def advance(self) -> None:
        self.advanced += 1


def inputs_of(replica: int, value: float) -> Inputs:
    return Inputs(replica, Views(torch.full((2, 1), value), None), torch.ones(2, 1, dtype=torch.bool))


def watched(values: list[float], bias: float = 1.0) -> Seen:
    """A step of a student of two layers over one replica per value."""
    student, teacher = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))
    for layer in (*student, *teacher):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.constant_(teacher[0].bias, bias)
    objective = Squares(teacher)
    watch = _Watch(objective)
    inputs = [inputs_of(10 + place, value) for place, value in enumerate(values)]
    with watch.modules(), watch.gradients_of(student):
        for each, target in zip(inputs, watch.targets(inputs, 1.0), strict=True):
            watch.losses(student, each, target).terms.sum().backward()
    student(torch.full((2, 1), math.inf))
    watch.advance()
    assert watch.watch([1, 2]) == {"health/targets": 2.0}
    assert (watch.names, watch.weights, watch.centers) == (objective.names, objective.weights, objective.centers)
    assert (objective.advanced, watch.mask(np.arange(2)).shape) == (1, (2, 1))
    return watch.seen


def rerun(seen: Seen, failure: NonFiniteError | None = FAILURE, precision: str = "fp32") -> Rerun:
    return Rerun(precision, failure, {"dino": math.nan, "loss": 2.0}, seen)


def test_the_first_module_of_each_network_is_named_with_its_replica() -> None:
    seen = watched([1.0, 3e38, math.nan])
    assert seen.outputs == [
        BadOutput("teacher", 12, "0", input_finite=False),
        BadOutput("student", 12, "0", input_finite=False),
    ]
    assert seen.targets == [12]
    assert seen.bad_terms(12) == ["plain", "rooted"]
    origin = find_origin(rerun(seen))
    assert origin == Origin("the output of the teacher's 0 (its input was not finite: see what feeds it)", (12,))


def test_a_term_that_overflows_is_named() -> None:
    seen = watched([1.0, 3e38])
    assert not seen.outputs
    assert seen.bad_terms(10) == []
    assert find_origin(rerun(seen)) == Origin("the loss rooted, although the outputs were finite", (11,))


def test_parameters_are_named_in_the_order_of_the_backward_pass() -> None:
    seen = watched([1.0, 0.0])
    assert seen.bad_terms(11) == []
    [(replica, names)] = seen.gradients.items()
    assert replica == 11
    assert {name[0] for name in names[:2]} == {"1"}
    assert {name[0] for name in names[2:]} == {"0"}
    origin = find_origin(rerun(seen))
    assert origin.replicas == (11,)
    assert origin.place.startswith("the gradient of 1.")
    assert origin.place.endswith(" and 1 more, in the order of the backward pass")


def test_targets_and_norms_are_told_apart_from_outputs() -> None:
    targets = Seen(targets=[1, 2], terms={1: {"dino": math.nan}})
    assert find_origin(rerun(targets)) == Origin("the teacher's targets, although its outputs were finite", (1, 2))
    norm = Seen(largest_gradient=("a.weight", 1e30))
    assert find_origin(rerun(norm)) == Origin(
        "the norm of a gradient that is finite but too large: up to 1e+30 in a.weight", ()
    )
    assert find_origin(rerun(norm, failure=None)) == Origin("nowhere", ())
    elsewhere = Seen(outputs=[BadOutput("student", 0, "a", True), BadOutput("student", 1, "b", True)])
    assert find_origin(rerun(elsewhere)).place == "the output of the student's a (its input was finite), or of b"


# What it comes down to.

SOUND = Audit({}, 3, ("a.weight", 2.5))
FOUND = Replayed(SOUND, rerun(Seen()), None, replicas=4, tiles_changed=False, overrides=())
SOME = Origin("the loss kde", (1, 3))


@pytest.mark.parametrize(
    ("found", "origin", "cause", "remedy"),
    [
        (FOUND, SOME, "only replicas 1, 3 of 4 are affected: the tiles above", "look at these slides"),
        (FOUND, Origin("x", (0, 1, 2, 3)), "all replicas are affected", "the run diverged"),
        (FOUND, Origin("x", ()), "all replicas are affected", "the run diverged"),
        (
            replace(FOUND, audit=Audit({"fp32": ("a",), "exp_avg_sq": ("a",)}, 3, ("", 0.0))),
            SOME,
            "the weights and second moments were not finite before the step",
            "run the same job again",
        ),
        (replace(FOUND, finer=rerun(Seen(), None)), SOME, "fp32 computes this step", "use precision=fp32"),
        (replace(FOUND, finer=rerun(Seen())), SOME, "only replicas 1, 3 of 4", "look at these slides"),
    ],
)
def test_a_reproduced_failure_gets_its_diagnosis(found: Replayed, origin: Origin, cause: str, remedy: str) -> None:
    first, diagnosis, advice = diagnose(found, origin)
    assert first.startswith(f"first: {origin.place}")
    assert diagnosis.startswith(f"diagnosis: {cause}")
    assert advice.startswith(f"what to do: {remedy}")


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, "the same state and the same tiles give a finite step here"),
        ({"tiles_changed": True}, "the tiles that failed are not those that can be read now"),
        ({"overrides": ("precision=fp32",)}, "with precision=fp32 the step is finite"),
    ],
)
def test_a_failure_that_does_not_come_again_gets_its_diagnosis(changes: dict[str, Any], cause: str) -> None:
    diagnosis, advice = diagnose(replace(FOUND, rerun=rerun(Seen(), None), **changes), Origin("nowhere", ()))
    assert diagnosis.startswith(f"diagnosis: {cause}")
    assert advice.startswith("what to do: ")


def test_the_state_is_described() -> None:
    bad = Audit({"ema": ("a", "b", "c", "d")}, 9, ("a.weight", 2.5))
    assert list(describe_rerun(bad, rerun(Seen(), None), "cpu")) == [
        "state: 9 parameters, not finite in average: a, b, c and 1 more",
        "largest weight: 2.5 in a.weight",
        "again, in fp32 on cpu: finite, so not reproduced (dino nan, loss 2)",
    ]


def test_a_tile_is_told_by_numbers() -> None:
    tile = np.zeros((2, 2, 3), np.uint8)
    tile[..., 1] = 9
    assert tile_facts(5, 2, "ab", 0.5, tile).line() == (
        "sample 5: slide ab (row 2) at 0.5 um/px (20x), min 0, max 9, mean 0 9 0"
    )
    assert tile_facts(5, 2, "ab", 0.5, tile * 0).line().endswith("mean 0 0 0, constant")
