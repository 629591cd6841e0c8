"""What a run's driver keeps of refused tiles: it tells of them, and ends a run with too many bad slides."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from histoscale.config.running import StreamSection
from histoscale.errors import StreamError
from histoscale.stream.faults import Fault, Quarantined, allowed_bad_slides, too_many_bad_slides

_SHOWN = 5


class BadSlides:
    """Counts quarantined slides against the recipe's bounds, and refused tiles by reason and by slide.

    Args:
        stream: The recipe's bounds.
        slides: Slides of the run.
        before: The quarantine of the commit that the run goes on from.
        tell: Called with one line for each newly quarantined slide.
    """

    def __init__(
        self, stream: StreamSection, slides: int, before: Iterable[Quarantined], tell: Callable[[str], None]
    ) -> None:
        self._slides = slides
        self._allowed = allowed_bad_slides(slides, stream.max_bad_slides, stream.max_bad_share)
        self._reasons = {slide.slide_id: slide.reason for slide in before}
        self._tell = tell
        self._tiles: Counter[tuple[str, str]] = Counter()

    def take(self, faults: Sequence[Fault]) -> None:
        """Count faults that the workers told of; replays after a restart tell them again."""
        for fault in faults:
            if not fault.whole_slide:
                self._tiles[fault.slide_id, fault.reason] += 1
            elif fault.slide_id not in self._reasons:
                self._reasons[fault.slide_id] = fault.reason
                self._tell(f"slide {fault.slide_id} is quarantined: {fault.reason}")

    @property
    def error(self) -> StreamError | None:
        """Why the run must end, or None."""
        if len(self._reasons) <= self._allowed:
            return None
        return too_many_bad_slides(self._reasons, self._slides, self._allowed)

    def summary(self) -> list[str]:
        """What was refused, as lines for a person to read; none where nothing was."""
        if not self._tiles:
            return []
        by_reason: Counter[str] = Counter()
        for (_, reason), count in self._tiles.items():
            by_reason[reason] += count
        reasons = ", ".join(f"{count} x {reason}" for reason, count in by_reason.most_common())
        most = self._tiles.most_common(_SHOWN)
        worst = ", ".join(f"{slide_id} ({count} x {reason})" for (slide_id, reason), count in most)
        return [f"tiles replaced by their next attempt: {reasons}", f"most from slides {worst}"]
