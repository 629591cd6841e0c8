"""A curve that leaves where it was: its recent median against the median and the spread of the steps before.

Medians take no notice of single spikes, and the spread is that of the curve itself: a curve that is noisy, or falls
fast, as all do in a warm-up, has to go further before it is away.
"""

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

RECENT_STEPS = 20
BASELINE_STEPS = 100
LEAST_BASELINE_STEPS = 40
SPREADS = 8.0
_DEVIATIONS_TO_SPREAD = 1.4826  # of a normal distribution: its standard deviation over its median absolute deviation

Values = Mapping[str, float]
"""What `metrics.jsonl` holds of a step."""


@dataclass(frozen=True)
class Ring:
    """What an alarm tells.

    Attributes:
        alarm: Which one.
        since: The first step of the trouble, as far as can be told: what was before can be trusted.
        said: A sentence for the log, with cause and remedy.
    """

    alarm: str
    since: int
    said: str


@dataclass(frozen=True)
class Drift:
    """How a curve has moved.

    Attributes:
        since: First of the recent steps when it was found to be away.
        usual: Its median before.
        now: Its median over the recent steps.
    """

    since: int
    usual: float
    now: float


@dataclass
class Runaway:
    """Watches one curve for a rise, or for any move.

    What is away does not become usual: the baseline stands still until the curve is back.

    Attributes:
        share: The move must be more than this share of the usual size.
        spreads: And more than so many times the spread of the curve.
        falls: Whether a fall is as bad as a rise.
    """

    share: float
    spreads: float = SPREADS
    falls: bool = False
    _recent: deque[tuple[int, float]] = field(default_factory=deque)
    _before: deque[float] = field(default_factory=lambda: deque(maxlen=BASELINE_STEPS))
    _since: int | None = None

    def update(self, step: int, value: float, size: float | None = None) -> Drift | None:
        """Where the curve has moved to, while it is away.

        Args:
            step: Of the value.
            value: Of the curve.
            size: What the share is of; None is the usual value itself.
        """
        self._recent.append((step, value))
        if len(self._recent) > RECENT_STEPS:
            _, oldest = self._recent.popleft()
            if self._since is None:
                self._before.append(oldest)
        if len(self._before) < LEAST_BASELINE_STEPS:
            return None
        usual = statistics.median(self._before)
        now = statistics.median(value for _, value in self._recent)
        spread = _DEVIATIONS_TO_SPREAD * statistics.median(abs(each - usual) for each in self._before)
        least = max(self.spreads * spread, self.share * abs(usual if size is None else size))
        moved = abs(now - usual) if self.falls else now - usual
        if moved <= least:
            self._since = None
            return None
        if self._since is None:
            self._since = self._recent[0][0]
        return Drift(self._since, usual, now)
