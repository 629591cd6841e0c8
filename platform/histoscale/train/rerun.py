"""A step that failed, run once more under watch: which replica, which module, which term, which parameter came first.

Modules are watched wherever they are, so the teacher's are too, whoever it is. Watching waits for the device after
every module: this is for a step, not for a run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from histoscale.checkpoint.fragments import MASTER, local_fragments
from histoscale.config.recipe import Recipe
from histoscale.errors import NonFiniteError
from histoscale.train.objective import Forward, Inputs, Losses, Objective
from histoscale.train.step import MicroBatch, TrainStep
from histoscale.train.trainer import Trainer

Network = Literal["teacher", "student"]

_ENGINE_PREFIX = "module."  # DeepSpeed's engine is a module around the student


@dataclass(frozen=True)
class BadOutput:
    """The first module of a network whose output was not finite for a replica.

    Attributes:
        module: Its name in the network.
        input_finite: Whether what went into it was finite: it then made the bad values itself.
    """

    network: Network
    replica: int
    module: str
    input_finite: bool


@dataclass
class Seen:
    """What was seen of one step.

    Attributes:
        outputs: The first bad output of each network and replica, in the order of the step.
        targets: Replicas whose targets hold NaN.
        terms: Replica -> the terms of its loss, by name.
        gradients: Replica -> parameters that got a gradient that is not finite, in the order of the backward pass.
        largest_gradient: The parameter with the largest finite gradient of one replica, and that.
    """

    outputs: list[BadOutput] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    terms: dict[int, dict[str, float]] = field(default_factory=dict)
    gradients: dict[int, list[str]] = field(default_factory=dict)
    largest_gradient: tuple[str, float] = ("", 0.0)

    def bad_terms(self, replica: int) -> list[str]:
        """The terms of a replica's loss that are not finite."""
        return [name for name, value in self.terms[replica].items() if not math.isfinite(value)]


@dataclass(frozen=True)
class Rerun:
    """How a step ended that was run once more.

    Attributes:
        precision: What the networks computed in.
        failure: The error, or None where everything was finite.
        measured: The loss, its terms and the norm of the gradient, as far as the step came.
        seen: What was seen on the way.
    """

    precision: str
    failure: NonFiniteError | None
    measured: Mapping[str, float]
    seen: Seen


@dataclass(frozen=True)
class Audit:
    """What the fp32 state holds before a step.

    Attributes:
        not_finite: Kind of tensor -> parameters of which it is not finite.
        parameters: How many parameters there are.
        largest_weight: The parameter with the largest finite weight, and that.
    """

    not_finite: Mapping[str, tuple[str, ...]]
    parameters: int
    largest_weight: tuple[str, float]


def audit_state(trainer: Trainer) -> Audit:
    """Look through weights, moments and average of a trainer of one process."""
    fragments = local_fragments(trainer.student.deepspeed)
    bad: dict[str, list[str]] = {}
    largest = ("", 0.0)
    for name, part in fragments.items():
        for kind, tensor in {**part.tensors, **trainer.teacher.fragments[name].tensors}.items():
            if not _finite(tensor):
                bad.setdefault(kind, []).append(name)
            elif kind == MASTER:
                largest = max(largest, (name, float(tensor.abs().max())), key=lambda pair: pair[1])
    return Audit({kind: tuple(names) for kind, names in bad.items()}, len(fragments), largest)


def rerun_step(trainer: Trainer, recipe: Recipe, step: int, micro_batches: Sequence[MicroBatch]) -> Rerun:
    """Run a step of a restored trainer of one process under watch; where it does not fail, it updates the trainer.

    Args:
        trainer: As it was before the step.
        recipe: Its recipe.
        step: Number of the step.
        micro_batches: Those of all replicas.
    """
    watch = _Watch(trainer.objective)
    precision = "bf16" if trainer.student.dtype == torch.bfloat16 else "fp32"
    train_step = TrainStep(recipe, trainer.student, watch, trainer.teacher, trainer.groups)
    with watch.modules(), watch.gradients_of(trainer.student.deepspeed.module):
        try:
            metrics = train_step.update(step, train_step.prepare(step, micro_batches))
        except NonFiniteError as failure:
            return Rerun(precision, failure.with_traceback(None), failure.measured, watch.seen)
    measured = {**metrics.terms, "loss": metrics.loss, "grad_norm": metrics.grad_norm}
    return Rerun(precision, None, measured, watch.seen)


class _Watch:
    """An objective that passes everything on to another one, and notes what is not finite."""

    def __init__(self, objective: Objective[Any]) -> None:
        self.seen = Seen()
        self._objective = objective
        self._network: Network | None = None
        self._replica = 0
        self._depth = 0
        self._names: dict[nn.Module, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return self._objective.names

    @property
    def weights(self) -> tuple[float, ...]:
        return self._objective.weights

    @property
    def centers(self) -> dict[str, Tensor]:
        return self._objective.centers

    def advance(self) -> None:
        self._objective.advance()

    def mask(self, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self._objective.mask(sample_ids)

    def targets(self, inputs: Sequence[Inputs], temperature: float) -> list[Any]:
        self._network = "teacher"
        targets = self._objective.targets(_Followed(inputs, self._turn_to), temperature)
        self._network = None
        self.seen.targets = [
            each.replica for each, made in zip(inputs, targets, strict=True) if _any(made, torch.isnan)
        ]
        return targets

    def watch(self, targets: Sequence[Any]) -> Mapping[str, float]:
        return self._objective.watch(targets)

    def losses(self, forward: Forward, inputs: Inputs, targets: Any) -> Losses:  # noqa: ANN401 - the objective's own
        self._turn_to(inputs)
        self._network = "student"
        made = self._objective.losses(forward, inputs, targets)
        self._network = None  # blocks that run again in the backward pass are no news
        self.seen.terms[inputs.replica] = dict(zip(self.names, made.terms.detach().tolist(), strict=True))
        return made

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Look at the output of every module that runs."""
        handles = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def gradients_of(self, network: nn.Module) -> Iterator[None]:
        """Look at the gradient of every parameter, micro-batch by micro-batch."""
        handles = [
            parameter.register_hook(partial(self._note_gradient, name))  # type: ignore[no-untyped-call]
            for name, parameter in network.named_parameters()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _turn_to(self, inputs: Inputs) -> None:
        self._replica = inputs.replica

    def _enter(self, module: nn.Module, _: object) -> None:
        if self._depth == 0:
            self._names = {each: name.removeprefix(_ENGINE_PREFIX) for name, each in module.named_modules()}
        self._depth += 1

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self._depth -= 1
        if self._network is None or not _any(output, _is_bad):
            return
        known = {(bad.network, bad.replica) for bad in self.seen.outputs}
        if (self._network, self._replica) not in known:
            name = self._names.get(module) or "the network"
            self.seen.outputs.append(BadOutput(self._network, self._replica, name, not _any(inputs, _is_bad)))

    def _note_gradient(self, name: str, gradient: Tensor) -> None:
        if not _finite(gradient):
            self.seen.gradients.setdefault(self._replica, []).append(name)
            return
        largest = float(gradient.abs().max())
        if largest > self.seen.largest_gradient[1]:
            self.seen.largest_gradient = (name, largest)


class _Followed(Sequence[Inputs]):
    """Micro-batches that tell when they are taken."""

    def __init__(self, inputs: Sequence[Inputs], tell: Callable[[Inputs], None]) -> None:
        self._inputs, self._tell = inputs, tell

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, place: Any) -> Any:  # noqa: ANN401 - a number or a slice, as of every sequence
        found = self._inputs[place]
        if isinstance(found, Inputs):
            self._tell(found)
        return found


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _is_bad(tensor: Tensor) -> Tensor:
    return ~tensor.isfinite()


def _any(value: object, test: Callable[[Tensor], Tensor]) -> bool:
    """Whether some element passes the test, of a tensor or of whatever holds tensors."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and bool(test(value).any())
    if isinstance(value, Mapping):
        return any(_any(each, test) for each in value.values())
    if isinstance(value, list | tuple):
        return any(_any(each, test) for each in value)
    if is_dataclass(value):
        return any(_any(getattr(value, each.name), test) for each in fields(value))
    return False
