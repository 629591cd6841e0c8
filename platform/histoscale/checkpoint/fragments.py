"""The part of the training state that this rank owns, as fragments of named parameters.

A fragment is a range of one flattened parameter with its fp32 master weights and Adam moments, as views into
DeepSpeed's buffers. It looks the same for ZeRO 1, 2 and 3, and this is the only place that knows where DeepSpeed keeps
what.
Nothing here communicates, `refresh_parameters` apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MASTER = "fp32"
EMA = "ema"  # the teacher's, which `train/teacher.py` keeps beside the master weights
MOMENTS = ("exp_avg", "exp_avg_sq")
CENTER_PREFIX = "center."  # of names that stand for centres of the teacher's logits, and for no parameter


@dataclass(frozen=True)
class Fragment:
    """Elements `offset` to `offset + numel` of a flattened parameter.

    Attributes:
        shape: Shape of the whole parameter.
        tensors: kind -> fp32 [numel]; views, so writing to one changes the state.
    """

    offset: int
    numel: int
    shape: tuple[int, ...]
    tensors: dict[str, Tensor]


def parameter_shapes(engine: "DeepSpeedEngine") -> dict[str, tuple[int, ...]]:
    """Name -> shape of every whole parameter, however the engine shards it."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
    }


def master_fragments(engine: "DeepSpeedEngine") -> dict[str, Fragment]:
    """Name -> this rank's fp32 master weights; parameters that lie on other ranks only are absent."""
    return _fragments(engine, ())


def local_fragments(engine: "DeepSpeedEngine") -> dict[str, Fragment]:
    """Name -> this rank's fp32 master weights and Adam moments; needs one step, or `materialise_moments`."""
    if _stage(engine) < 3:
        # DeepSpeed links the moments once, after the first group's first step, when later groups have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return _fragments(engine, MOMENTS)


def materialise_moments(engine: "DeepSpeedEngine", step: int) -> None:
    """Give every fp32 buffer Adam moments of zero and a count of `step` updates, as if it had been stepped."""
    optimizer = engine.optimizer.optimizer
    for buffer in _flat_buffers(engine):
        optimizer.state[buffer] = {
            "step": torch.tensor(float(step), dtype=torch.float32, device=buffer.device),
            **{kind: torch.zeros_like(buffer) for kind in MOMENTS},
        }


def refresh_parameters(engine: "DeepSpeedEngine") -> None:
    """Bring the parameters that the network computes with up to date with the fp32 master weights (collective)."""
    zero = engine.optimizer
    if _stage(engine) < 3:
        zero.update_lp_params()
        return
    for index, master in enumerate(zero.fp32_partitioned_groups_flat):
        zero.fp16_partitioned_groups_flat[index].data.copy_(master.data)
        zero._unflatten_partitioned_parameters(index)


def _stage(engine: "DeepSpeedEngine") -> int:
    return int(engine.zero_optimization_stage())


def _flat_buffers(engine: "DeepSpeedEngine") -> list[Tensor]:
    zero = engine.optimizer
    if _stage(engine) < 3:
        return [buffer for group in zero.param_groups for buffer in group["params"]]
    return list(zero.fp32_partitioned_groups_flat)


def _fragments(engine: "DeepSpeedEngine", moments: tuple[str, ...]) -> dict[str, Fragment]:
    whole = _whole_fragments(engine, moments) if _stage(engine) < 3 else _split_fragments(engine, moments)
    return dict(whole)


def _whole_fragments(engine: "DeepSpeedEngine", moments: tuple[str, ...]) -> Iterator[tuple[str, Fragment]]:
    """ZeRO 1 and 2: ranks own ranges of all parameters laid end to end."""
    for name, parameter in engine.module.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue
        address = mapping.lp_fragment_address
        tensors = {MASTER: mapping.hp_fragment, **{kind: mapping.optim_fragment[kind] for kind in moments}}
        flat = {kind: tensor.detach().view(-1) for kind, tensor in tensors.items()}
        yield name, Fragment(int(address.start), int(address.numel), tuple(parameter.shape), flat)


def _split_fragments(engine: "DeepSpeedEngine", moments: tuple[str, ...]) -> Iterator[tuple[str, Fragment]]:
    """ZeRO 3: every rank owns an equal range of each parameter, the last ones padded."""
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    rank = dist.get_rank()
    for name, parameter in engine.module.named_parameters():
        share = int(parameter.ds_tensor.numel())
        offset = rank * share
        numel = max(0, min(share, int(parameter.ds_numel) - offset))
        if not numel:
            continue
        tensors = {
            MASTER: safe_get_local_fp32_param(parameter),
            **{kind: safe_get_local_optimizer_state(parameter, kind) for kind in moments},
        }
        flat = {kind: tensor.detach().view(-1)[:numel] for kind, tensor in tensors.items()}
        yield name, Fragment(offset, numel, tuple(parameter.ds_shape), flat)
