"""Agreement between ranks: a failure on one is the same error on all, never a rank that waits for ever."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

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


def _attempt(compute: Callable[[], T]) -> T | HistoscaleError:
    try:
        return compute()
    except HistoscaleError as error:
        return error


def _result(outcome: T | HistoscaleError) -> T:
    if isinstance(outcome, HistoscaleError):
        raise outcome
    return outcome
