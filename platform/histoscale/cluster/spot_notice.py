"""What the metadata server of AWS says about this instance's future, and what follows from it; no I/O."""

import json
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

INTERRUPTION_WARNING_S = 120.0  # what AWS gives between the notice and the end

_OK, _NOT_FOUND = 200, 404


class OnRebalance(Enum):
    """What to do when AWS recommends leaving the instance: it may be interrupted, but nothing is decided."""

    DRAIN = "drain"
    IGNORE = "ignore"


@dataclass(frozen=True)
class Answer:
    """One answer of the metadata server."""

    status: int
    body: str


@dataclass(frozen=True)
class Notice:
    """A reason to drain the node.

    Attributes:
        key: The same for as long as AWS repeats the same notice.
        reason: What AWS announces, for people.
        deadline_ms: When the node is gone, in ms since the epoch.
    """

    key: str
    reason: str
    deadline_ms: int


@dataclass(frozen=True)
class Verdict:
    """What two answers of the metadata server mean: a reason to drain or none, and what people should be told."""

    notice: Notice | None = None
    remarks: tuple[str, ...] = ()


def judge(interruption: Answer, rebalance: Answer, on_rebalance: OnRebalance, now_ms: int) -> Verdict:
    """Weigh the answers; an interruption outranks a recommendation.

    Args:
        interruption: Of `/latest/meta-data/spot/instance-action`.
        rebalance: Of `/latest/meta-data/events/recommendations/rebalance`.
        on_rebalance: What a recommendation is worth.
        now_ms: The time, in ms since the epoch.
    """
    ending, leaving = _interruption(interruption, now_ms), _rebalance(rebalance, on_rebalance, now_ms)
    return Verdict(ending.notice or leaving.notice, ending.remarks + leaving.remarks)


def _interruption(answer: Answer, now_ms: int) -> Verdict:
    fields = _fields(answer, "the interruption notice")
    if not isinstance(fields, dict):
        return fields
    action, time = str(fields.get("action", "an unnamed action")), fields.get("time")
    deadline_ms = _epoch_ms(time)
    remarks: tuple[str, ...] = ()
    if deadline_ms is None:
        deadline_ms = now_ms + int(INTERRUPTION_WARNING_S * 1000)
        remarks = (
            f"warning: the interruption notice has no readable time (got {time!r}); assuming the usual"
            f" {INTERRUPTION_WARNING_S:g} s",
        )
    return Verdict(Notice(f"interruption {time}", f"spot interruption: {action} at {time}", deadline_ms), remarks)


def _rebalance(answer: Answer, on_rebalance: OnRebalance, now_ms: int) -> Verdict:
    fields = _fields(answer, "the rebalance recommendation")
    if not isinstance(fields, dict):
        return fields
    time = fields.get("noticeTime")
    if on_rebalance is OnRebalance.IGNORE:
        return Verdict(
            remarks=(f"AWS recommends leaving this instance since {time}; going on until a notice of interruption",)
        )
    # AWS names no time here; the deadline is the one that an interruption in this moment would have.
    deadline_ms = now_ms + int(INTERRUPTION_WARNING_S * 1000)
    return Verdict(Notice(f"rebalance {time}", f"rebalance recommendation of {time}", deadline_ms))


def _fields(answer: Answer, what: str) -> dict[str, object] | Verdict:
    """The fields of an answer, or the verdict where it has none."""
    if answer.status == _NOT_FOUND:
        return Verdict()
    if answer.status != _OK:
        return Verdict(remarks=(f"warning: asked for {what}, the metadata server answers status {answer.status}",))
    try:
        fields = json.loads(answer.body)
    except ValueError:
        fields = None
    if isinstance(fields, dict):
        return fields
    return Verdict(remarks=(f"warning: {what} is no JSON object, so it is left aside (got {answer.body[:80]!r})",))


def _epoch_ms(time: object) -> int | None:
    try:
        moment = datetime.fromisoformat(str(time))
    except ValueError:
        return None
    return int(moment.timestamp() * 1000) if moment.tzinfo is not None else None
