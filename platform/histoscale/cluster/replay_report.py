"""What a replay tells: where a step stopped being finite, by which tiles, and what to do. Pure: findings to lines."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoscale.checkpoint.capture import Capture
from histoscale.checkpoint.fragments import EMA, MASTER, MOMENTS
from histoscale.stream.feed import MicroBatch
from histoscale.train.rerun import Audit, Rerun
from histoscale.units import describe_mpp

_SHOWN = 3  # names in one line
_KINDS = {MASTER: "weights", EMA: "average", MOMENTS[0]: "first moments", MOMENTS[1]: "second moments"}
_AGAIN = "run the same job again: it goes on from its last commit"
_NEW_RUN = "a run keeps its recipe, so start another with a new --out"


@dataclass(frozen=True)
class TileFacts:
    """One tile, by numbers.

    Attributes:
        mean: Of red, green and blue.
    """

    sample_id: int
    row: int
    slide_id: str
    mpp: float
    minimum: int
    maximum: int
    mean: tuple[float, float, float]

    def line(self) -> str:
        """All of it, for people."""
        red, green, blue = self.mean
        constant = ", constant" if self.minimum == self.maximum else ""
        return (
            f"sample {self.sample_id}: slide {self.slide_id} (row {self.row}) at {describe_mpp(self.mpp)}, "
            f"min {self.minimum}, max {self.maximum}, mean {red:.0f} {green:.0f} {blue:.0f}{constant}"
        )


@dataclass(frozen=True)
class Origin:
    """Where values stopped being finite first.

    Attributes:
        place: The module, the term or the parameter, for people.
        replicas: In which replicas; none where only their sum was not finite, or where nothing failed.
    """

    place: str
    replicas: tuple[int, ...]


@dataclass(frozen=True)
class Replayed:
    """All that a replay found.

    Attributes:
        audit: Of the state before the step.
        rerun: The step in the precision of the run, or of the overrides.
        finer: The step in fp32, where it failed in bf16.
        replicas: How many there are.
        tiles_changed: Whether the tiles are not all those that the run saw.
        overrides: What the replay changed in the recipe.
    """

    audit: Audit
    rerun: Rerun
    finer: Rerun | None
    replicas: int
    tiles_changed: bool
    overrides: tuple[str, ...]


def tile_facts(sample_id: int, row: int, slide_id: str, mpp: float, tile: NDArray[np.uint8]) -> TileFacts:
    """The facts of one tile, uint8 [R, R, 3]."""
    red, green, blue = tile.reshape(-1, 3).mean(axis=0).tolist()
    return TileFacts(sample_id, row, slide_id, mpp, int(tile.min()), int(tile.max()), (red, green, blue))


def describe_capture(capture: Capture) -> Iterator[str]:
    """What was captured."""
    state = capture.state
    writer = ", ".join(f"{name} {value}" for name, value in state.written_by.items())
    yield f"step {state.step}, captured at {capture.created} by {writer}"
    yield f"the run said: {_numbers(capture.measured)}"


def describe_reading(batches: Sequence[MicroBatch], changed: Sequence[int]) -> str:
    """How the tiles that were read now compare with those that the run saw."""
    count = sum(len(batch.sample_ids) for batch in batches)
    read = f"tiles: {count} of {len(batches)} replicas read again"
    if not changed:
        return f"{read}, pixel by pixel those of the run"
    return f"{read}; {_replicas(changed)} differ from what the run saw: a slide was withdrawn or replaced since"


def describe_rerun(audit: Audit, rerun: Rerun, device: str) -> Iterator[str]:
    """The state before the step, and how the step ended."""
    name, value = audit.largest_weight
    bad = "; ".join(f"{_KINDS[kind]}: {_some(names)}" for kind, names in audit.not_finite.items())
    yield f"state: {audit.parameters} parameters, {f'not finite in {bad}' if bad else 'all finite'}"
    yield f"largest weight: {value:.3g} in {name}"
    outcome = "reproduced" if rerun.failure else "finite, so not reproduced"
    yield f"again, in {rerun.precision} on {device}: {outcome} ({_numbers(rerun.measured)})"


def find_origin(rerun: Rerun) -> Origin:
    """Where a step stopped being finite: the teacher, its targets, the student, the terms, or the gradient."""
    seen = rerun.seen
    if rerun.failure is None:
        return Origin("nowhere", ())
    for network in ("teacher", "student"):
        bad = [output for output in seen.outputs if output.network == network]
        if bad:
            inside = "its input was finite" if bad[0].input_finite else "its input was not finite: see what feeds it"
            replicas = tuple(output.replica for output in bad)
            others = dict.fromkeys(output.module for output in bad if output.module != bad[0].module)
            elsewhere = f", or of {_some(list(others))}" if others else ""
            return Origin(f"the output of the {network}'s {bad[0].module} ({inside}){elsewhere}", replicas)
        if network == "teacher" and seen.targets:
            return Origin("the teacher's targets, although its outputs were finite", tuple(seen.targets))
    terms = {replica: names for replica in seen.terms if (names := seen.bad_terms(replica))}
    if terms:
        names = sorted({name for bad_names in terms.values() for name in bad_names})
        return Origin(f"the loss {' and '.join(names)}, although the outputs were finite", tuple(terms))
    if seen.gradients:
        first = next(iter(seen.gradients.values()))
        return Origin(f"the gradient of {_some(first)}, in the order of the backward pass", tuple(seen.gradients))
    name, value = seen.largest_gradient
    return Origin(f"the norm of a gradient that is finite but too large: up to {value:.3g} in {name}", ())


def diagnose(found: Replayed, origin: Origin) -> Iterator[str]:
    """What it comes down to, in two lines."""
    if found.rerun.failure is None:
        cause, remedy = _not_reproduced(found)
    else:
        cause, remedy = _cause(found, origin)
        among = f", in {_replicas(origin.replicas)} of {found.replicas}" if origin.replicas else ""
        yield f"first: {origin.place}{among}"
    yield f"diagnosis: {cause}"
    yield f"what to do: {remedy}"


def _not_reproduced(found: Replayed) -> tuple[str, str]:
    if found.overrides:
        return (
            f"with {' '.join(found.overrides)} the step is finite",
            f"if the step fails without, that is the way out; {_NEW_RUN}",
        )
    if found.tiles_changed:
        return "the tiles that failed are not those that can be read now, and these are fine", _AGAIN
    return (
        "the same state and the same tiles give a finite step here: neither is the cause",
        f"{_AGAIN}; if it fails again and no replay shows it, suspect the machine (of a GPU: nvidia-smi -q -d ECC)",
    )


def _cause(found: Replayed, origin: Origin) -> tuple[str, str]:
    if found.audit.not_finite:
        kinds = " and ".join(_KINDS[kind] for kind in found.audit.not_finite)
        return (
            f"the {kinds} were not finite before the step: an earlier update made them so, not these tiles",
            f"{_AGAIN}; if that fails at once, its commit holds them too: delete the marker of that commit first, "
            "and if they come back, lower optim.lr or optim.clip_norm",
        )
    if found.finer is not None and found.finer.failure is None:
        return (
            "fp32 computes this step and bf16 does not",
            f"use precision=fp32, or in bf16 a lower optim.lr or model.qk_norm=true; {_NEW_RUN}",
        )
    name, value = found.audit.largest_weight
    if not origin.replicas or len(origin.replicas) == found.replicas:
        return (
            f"all replicas are affected, so the cause is the weights, not a tile; the largest is {value:.3g} in {name}",
            f"the run diverged: lower optim.lr or optim.clip_norm, or lengthen optim.warmup_images; {_NEW_RUN}",
        )
    return (
        f"only {_replicas(origin.replicas)} of {found.replicas} are affected: the tiles above bring it about, with "
        f"weights of up to {value:.3g} ({name})",
        "look at these slides; withdraw what is no tissue (jobs/index.py --exclude), or raise data.min_tile_tissue",
    )


def _replicas(replicas: Sequence[int]) -> str:
    return f"replica{'s' if len(replicas) > 1 else ''} {_some([str(replica) for replica in replicas])}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _numbers(measured: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measured.items())
