"""Faults that the content decides: what was wrong with an attempt at a sample, and how many bad slides a run bears.

Only these advance a sample's attempt, so that a replay finds the same tile. What may pass by itself (a server that
does not answer) is retried below this layer, and then stops the run.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from histoscale.errors import StreamError

_SHOWN = 20  # a message that names hundreds of slides is not read


@dataclass(frozen=True)
class Fault:
    """An attempt at a sample that was given up for the next one.

    Attributes:
        sample_id: The sample.
        attempt: Which attempt at it; 0 is the plan's own.
        slide_id: The slide that it was to come from.
        reason: Why, without any name.
        whole_slide: No tile can come from this slide (it changed or cannot be opened), so it is quarantined.
    """

    sample_id: int
    attempt: int
    slide_id: str
    reason: str
    whole_slide: bool

    def to_dict(self) -> dict[str, Any]:
        """The fault as a row."""
        return asdict(self)


@dataclass(frozen=True)
class Quarantined:
    """A slide that gives no tiles from a step on; committed with the checkpoint."""

    slide_id: str
    step: int
    reason: str


def allowed_bad_slides(slides: int, count: int, share: float) -> int:
    """How many of `slides` slides may be quarantined: at most `count` and at most `share`.

    A share is one slide at least: one bad slide in a small archive is no reason to stop a run. A count of 0 bears none.
    """
    return min(count, max(1, int(share * slides)))


def too_many_bad_slides(reasons: Mapping[str, str], slides: int, allowed: int) -> StreamError:
    """The error that ends a run with more quarantined slides than it bears; names them by id."""
    shown = "; ".join(f"{slide_id}: {reason}" for slide_id, reason in sorted(reasons.items())[:_SHOWN])
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return StreamError(
        f"{len(reasons)} of {slides} slides cannot be read any more: {shown}{more}",
        expected=f"at most {allowed} (stream.max_bad_slides and stream.max_bad_share)",
        remedy="repair these slides and index them again, or raise the bounds: either way start a run with a new --out",
    )
