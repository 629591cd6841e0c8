"""Which rank computes which replica: the only place where the world size meets the plan."""

from histoscale.errors import PlanError


def replicas_of(rank: int, workers: int, replicas: int) -> tuple[int | None, ...]:
    """Replicas of one rank in the order in which it computes them: rank, workers + rank, 2 * workers + rank, ...

    Every rank gets ceil(replicas / workers) entries, so that collectives stay matched; None is padding, a
    micro-step of weight zero.

    Raises:
        PlanError: There are more workers than replicas, or no such rank.
    """
    if not 1 <= workers <= replicas:
        raise PlanError(
            "the number of workers does not fit the recipe's replicas",
            value=workers,
            expected=f"1 to {replicas} workers",
            remedy="start fewer workers, or a new run with a larger batch.replicas",
        )
    if not 0 <= rank < workers:
        raise PlanError("no such rank", value=rank, expected=f"0 to {workers - 1}")
    turns = -(-replicas // workers)
    candidates = (turn * workers + rank for turn in range(turns))
    return tuple(replica if replica < replicas else None for replica in candidates)
