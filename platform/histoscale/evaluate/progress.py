"""How far a pass over tiles is, for a person to read."""

import time
from collections.abc import Callable

from histoscale.units import describe_duration

Tell = Callable[[str], None]


def silent(_line: str) -> None:
    """Takes a line for people, and nobody reads it."""


class TileProgress:
    """Tells now and then how many tiles are done, how fast they go and how long the rest will take.

    Args:
        total: Tiles of the pass.
        tell: Takes a line for people.
        every_s: Seconds between two lines.
        clock: Seconds, never backwards.
    """

    def __init__(
        self, total: int, tell: Tell, every_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total = total
        self._tell = tell
        self._every_s = every_s
        self._clock = clock
        self._begun_s = self._told_s = clock()

    def done(self, tiles: int) -> None:
        """So many are done by now."""
        now_s = self._clock()
        if now_s - self._told_s < self._every_s or tiles == 0:
            return
        self._told_s = now_s
        per_s = tiles / (now_s - self._begun_s)
        left = describe_duration((self._total - tiles) / per_s)
        self._tell(f"{tiles:,} of {self._total:,} tiles embedded, {per_s:,.1f} tiles/s, {left} left")
