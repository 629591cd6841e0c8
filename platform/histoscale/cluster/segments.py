"""Plan segments: which slides are out of a run, and from which step on; recorded in the run folder.

The plan of a run changes only where a slide leaves it: a withdrawn patient (an exclusion list of the index, recorded
here), or a slide that was quarantined (recorded in the commit). Both take effect at a recorded step, so that a resumed
run equals an uninterrupted one, and nothing else of the plan moves: a sample that would have come from such a slide
takes its next attempt.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from histoscale.errors import RunError
from histoscale.storage import Store
from histoscale.stream.faults import Quarantined

SEGMENTS_KEY = "plan.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Segment:
    """The plan from `first_step` on: these slides are out, beside those of earlier segments."""

    first_step: int
    excluded: tuple[str, ...]


def next_segments(segments: tuple[Segment, ...], step: int, excluded: Iterable[str]) -> tuple[Segment, ...]:
    """The segments of a run that goes on at `step` under the exclusions that the index has by now.

    A segment that was to begin later (its steps were lost with an uncommitted part of the run) begins now.
    """
    pulled = tuple(Segment(min(segment.first_step, step), segment.excluded) for segment in segments)
    known = {slide_id for segment in pulled for slide_id in segment.excluded}
    new = tuple(sorted(set(excluded) - known))
    return (*pulled, Segment(step, new)) if new else pulled


def out_from(segments: Iterable[Segment], quarantine: Iterable[Quarantined]) -> Mapping[str, int]:
    """Slide id -> first step at which it is out."""
    first: dict[str, int] = {}
    for segment in segments:
        for slide_id in segment.excluded:
            first[slide_id] = min(segment.first_step, first.get(slide_id, segment.first_step))
    for slide in quarantine:
        first[slide.slide_id] = min(slide.step, first.get(slide.slide_id, slide.step))
    return first


def read_segments(store: Store) -> tuple[Segment, ...]:
    """The segments that a run has recorded; none where it has not begun.

    Raises:
        RunError: What is recorded cannot be read.
    """
    if not store.exists(SEGMENTS_KEY):
        return ()
    try:
        recorded = json.loads(store.get(SEGMENTS_KEY))
        if recorded["format"] != FORMAT_VERSION:
            raise _unreadable(store, recorded["format"])
        return tuple(Segment(int(entry["first_step"]), tuple(entry["excluded"])) for entry in recorded["segments"])
    except (ValueError, KeyError, TypeError):
        raise _unreadable(store, None) from None


def write_segments(store: Store, segments: tuple[Segment, ...]) -> None:
    """Record the segments of a run."""
    record = {"format": FORMAT_VERSION, "segments": [asdict(segment) for segment in segments]}
    store.put(SEGMENTS_KEY, json.dumps(record, indent=1).encode())


def _unreadable(store: Store, version: object) -> RunError:
    return RunError(
        f"{SEGMENTS_KEY} of run {store.uri} cannot be read",
        value=version,
        expected=f"the segments of the plan, format {FORMAT_VERSION}",
        remedy="restore it: without it nobody can tell which slides were excluded",
    )
