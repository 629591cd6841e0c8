"""Which slides are out of a run and from when; how many a run bears; what it says of them."""

import pytest

from histoscale.cluster.bad_slides import BadSlides
from histoscale.cluster.segments import Segment, next_segments, out_from, read_segments, write_segments
from histoscale.config.recipe import StreamSection
from histoscale.errors import RunError
from histoscale.storage import open_store
from histoscale.stream.faults import Fault, Quarantined, allowed_bad_slides

A, B, C = "a" * 32, "b" * 32, "c" * 32


@pytest.mark.parametrize(
    ("slides", "count", "share", "allowed"),
    [(8, 1000, 0.05, 1), (100, 1000, 0.05, 5), (3_000_000, 1000, 0.05, 1000), (100, 0, 0.05, 0), (10, 5, 0.0, 1)],
)
def test_the_lower_bound_counts_and_a_share_is_one_slide_at_least(
    slides: int, count: int, share: float, allowed: int
) -> None:
    assert allowed_bad_slides(slides, count, share) == allowed


def fault(slide_id: str, reason: str = "the object changed", *, whole_slide: bool = True) -> Fault:
    return Fault(1, 0, slide_id, reason, whole_slide)


def test_a_run_ends_past_its_bound_and_names_the_slides() -> None:
    told: list[str] = []
    bad = BadSlides(StreamSection(max_bad_slides=2, max_bad_share=0.5), 10, [Quarantined(A, 3, "gone")], told.append)
    bad.take([fault(A), fault(B), fault(B)])
    assert bad.error is None
    assert told == [f"slide {B} is quarantined: the object changed"]
    bad.take([fault(C)])
    assert bad.error is not None
    text = str(bad.error)
    assert text.startswith("3 of 10 slides cannot be read any more: ")
    assert all(slide_id in text for slide_id in (A, B, C))
    assert "at most 2" in text


def test_a_list_of_hundreds_is_cut() -> None:
    bad = BadSlides(StreamSection(max_bad_slides=1), 1000, [], lambda line: None)
    bad.take([fault(f"{n:032x}") for n in range(300)])
    assert "and 280 more" in str(bad.error)


def test_refused_tiles_are_counted_by_reason_and_slide_and_quarantine_nothing() -> None:
    bad = BadSlides(StreamSection(max_bad_slides=0), 10, [], lambda line: None)
    assert bad.summary() == []
    bad.take([fault(A, "blur", whole_slide=False), fault(A, "pen", whole_slide=False)])
    bad.take([fault(B, "blur", whole_slide=False)])
    assert bad.error is None
    assert bad.summary() == [
        "tiles replaced by their next attempt: 2 x blur, 1 x pen",
        f"most from slides {A} (1 x blur), {A} (1 x pen), {B} (1 x blur)",
    ]


def test_an_exclusion_opens_a_segment_at_the_step_where_the_run_goes_on() -> None:
    first = next_segments((), 0, [B])
    assert first == (Segment(0, (B,)),)
    assert next_segments(first, 50, [B]) == first
    assert next_segments(first, 50, [A, B, C]) == (Segment(0, (B,)), Segment(50, (A, C)))


def test_a_segment_whose_steps_were_lost_begins_where_the_run_goes_on() -> None:
    assert next_segments((Segment(50, (A,)),), 30, [A]) == (Segment(30, (A,)),)


def test_a_slide_is_out_from_the_first_step_that_anything_says() -> None:
    segments = (Segment(0, (A,)), Segment(50, (B, C)))
    quarantine = (Quarantined(A, 7, "gone"), Quarantined(B, 9, "gone"))
    assert out_from(segments, quarantine) == {A: 0, B: 9, C: 50}


def test_segments_come_back_from_the_run_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = open_store(tmp_path_factory.mktemp("run"))
    assert read_segments(store) == ()
    segments = (Segment(0, ()), Segment(50, (A,)))
    write_segments(store, segments)
    assert read_segments(store) == segments


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"format": 9, "segments": []}', b'{"format": 1}'])
def test_segments_that_cannot_be_read_stop_the_run(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    store = open_store(tmp_path_factory.mktemp("run"))
    store.put("plan.json", text)
    with pytest.raises(RunError, match="cannot be read"):
        read_segments(store)
