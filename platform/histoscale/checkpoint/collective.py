"""Agreement between ranks: a failure on one is the same error on all, never a rank that waits for ever."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from histoscale.errors import HistoscaleError

T = TypeVar("T")


def on_first_rank(compute: Callable[[], T]) -> T:
    """Run `compute` on rank 0 and give its result, or its error, to every rank."""
    outcome: list[T | HistoscaleError] = [_attempt(compute)] if dist.get_rank() == 0 else [None]  # type: ignore[list-item]
    dist.broadcast_object_list(outcome, src=0)
    return _result(outcome[0])


def on_every_rank(compute: Callable[[], T]) -> list[T]:
    """Run `compute` on all ranks and give all results to each; the first error, if any, is raised on all."""
    outcomes: list[T | HistoscaleError] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(outcomes, _attempt(compute))
    return [_result(outcome) for outcome in outcomes]


def everywhere(is_so: bool) -> bool:
    """Whether something is so on all ranks."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flag = torch.tensor(int(is_so), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


@torch.no_grad()
def receive(network: nn.Module, read: Callable[[], tuple[dict[str, Tensor], T]]) -> T:
    """Fill a network on every rank with what the first one reads, one parameter after the other (collective).

    Args:
        network: On the device of the process group. A parameter that is not read becomes that of the first rank.
        read: Gives weights by the names of parameters, and something to tell all ranks.
    """
    weights: dict[str, Tensor] = {}

    def read_all() -> T:
        found, told = read()
        weights.update(found)
        return told

    told = on_first_rank(read_all)
    for name, parameter in network.named_parameters():
        if name in weights:
            parameter.copy_(weights.pop(name))
        dist.broadcast(parameter.data, src=0)
    return told


def _attempt(compute: Callable[[], T]) -> T | HistoscaleError:
    try:
        return compute()
    except HistoscaleError as error:
        return error


def _result(outcome: T | HistoscaleError) -> T:
    if isinstance(outcome, HistoscaleError):
        raise outcome
    return outcome
