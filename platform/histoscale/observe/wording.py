"""How reports write times of day and shares: one style for all of them."""

from datetime import UTC, datetime

from histoscale.evaluate.intervals import Interval


def clock(time_s: float) -> str:
    """Date and time of day, UTC, of seconds since 1970."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def percent(share: float) -> str:
    """`71.2 %`."""
    return f"{100 * share:.1f} %"


def percents(interval: Interval) -> str:
    """`68.0 to 74.1`, of two shares, in percent."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def points(difference: float) -> str:
    """`+8.3`, of the difference of two shares, in percentage points."""
    return f"{100 * difference:+.1f}"
