"""Pictures that are charts: embeddings as points, and the mixture that was seen beside the one that was asked for."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from histoscale.observe.drawing import Pair, paired_bars, scatter, side_by_side
from histoscale.observe.projection import principal_components
from histoscale.observe.tile_pictures import Picture
from histoscale.sampling.gallery import Mpp, place_of
from histoscale.sampling.plan import Plan
from histoscale.sampling.report import PlanReport
from histoscale.units import describe_mpp

_PANELS = 2  # side by side
_MOST_BARS = 24
_MOST_COUNTED = 65_536  # tiles of the run

Kind = tuple[str, str]  # magnification, stratum


def points_picture(
    name: str,
    title: str,
    about: str,
    embeddings_ND: NDArray[np.floating],
    guide_N: NDArray[np.floating],
    names: Mapping[str, Sequence[str]],
) -> Picture:
    """The first two principal components of embeddings, coloured in several ways.

    Args:
        name: Of the picture.
        title: Of the picture.
        about: What the points are, as the start of a sentence, and what to look for.
        embeddings_ND: The embeddings.
        guide_N: See `principal_components`.
        names: What colours mean -> name of each point.
    """
    found = principal_components(embeddings_ND, 2, guide_N)
    panels = [scatter(f"by {meaning}", found.scores, of_points) for meaning, of_points in names.items()]
    return Picture(
        name,
        title,
        f"{about} The two main directions of the embeddings hold {found.share.sum():.0%} of what differs; darker tiles "
        "lie more to the right and to the top at every checkpoint.",
        side_by_side(panels, _PANELS),
    )


def asked_for(report: PlanReport, mix: Sequence[Mpp]) -> dict[Kind, float]:
    """Share of the tiles that the plan gives each magnification of the mix and stratum; together 1."""
    shares: dict[Kind, float] = {}
    for scale in report.magnifications:
        magnification = describe_mpp(mix[place_of(scale.mpp, mix)])
        for stratum in scale.strata:
            kind = (magnification, stratum.name)
            shares[kind] = shares.get(kind, 0.0) + scale.share * stratum.share
    return shares


def seen_until(plan: Plan, stop: int, mix: Sequence[Mpp]) -> tuple[dict[Kind, float], int]:
    """Shares of the tiles of steps 0 to `stop - 1`, and over how many of these steps, evenly spread, they are counted.

    A tile that the content refuses gives way to one of the same magnification and stratum, so the plan tells.
    """
    steps = min(stop, max(1, _MOST_COUNTED // plan.spec.tiles_per_step))
    counts: Counter[Kind] = Counter()
    for number in range(steps):
        step = number * stop // steps
        for replica in range(plan.spec.replicas):
            chapter = plan.chapter(replica, step, step)
            strata = plan.strata_of(chapter.rows[0])
            scales = [describe_mpp(mix[place_of(mpp, mix)]) for mpp in chapter.mpp[0].tolist()]
            counts.update(zip(scales, strata, strict=True))
    total = counts.total() or 1
    return {kind: count / total for kind, count in counts.items()}, steps


def mixture_picture(asked: Mapping[Kind, float], seen: Mapping[Kind, float], counted: int, stop: int) -> Picture:
    """Magnifications and strata as they were seen, beside what was asked for.

    Args:
        asked: Shares that the plan gives.
        seen: Shares that were seen.
        counted: Over how many steps.
        stop: Of how many.
    """
    kinds = sorted({*asked, *seen}, key=lambda kind: (-asked.get(kind, 0.0), kind))
    scales = list(dict.fromkeys(scale for scale, _ in [*asked, *seen]))
    pairs = [Pair(scale, _sum(asked, scale), _sum(seen, scale)) for scale in scales]
    if len(kinds) > len(scales):
        pairs += [Pair(", ".join(kind), asked.get(kind, 0.0), seen.get(kind, 0.0)) for kind in kinds[:_MOST_BARS]]
    rest = f" The {_MOST_BARS} largest of {len(kinds)} kinds are shown." if len(kinds) > _MOST_BARS else ""
    counted_over = (
        f"{counted:,} of the first {stop:,} steps, evenly spread" if counted < stop else f"the first {stop:,} steps"
    )
    return Picture(
        "mixture",
        "Tiles seen against tiles asked for",
        "Shares of each magnification, and of each group of slides that the recipe balances within it: what the recipe "
        f"comes down to on this archive (grey), and what {counted_over} held (blue). The bars should be equally "
        f"long.{rest}",
        paired_bars(pairs),
    )


def _sum(shares: Mapping[Kind, float], scale: str) -> float:
    return sum(share for kind, share in shares.items() if kind[0] == scale)
