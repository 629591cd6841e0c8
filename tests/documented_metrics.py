"""The names in docs/metrics.md, to hold what a run writes against them."""

import re
from collections.abc import Iterable
from pathlib import Path

_TABLE = Path(__file__).parents[1] / "docs" / "metrics.md"
_PLACEHOLDERS = {"MPP": r"[0-9.]+(-[0-9.]+)?", "STRATUM": ".+"}


def documented(*, watched: bool, features: bool = False, koleo: bool = False, strata: bool = False) -> set[str]:
    """Names of the metrics of a step, by the last column of the table."""
    rows = re.findall(r"^\| `([^`]+)` \|[^|]*\|[^|]*\| ([^|]*) \|$", _TABLE.read_text(), re.MULTILINE)
    return {
        name
        for name, when in rows
        if (watched or "every 10th step" not in when)
        and ("prototypes" not in when or not features)
        and (not when.startswith("features") or features)
        and ("koleo" not in when or koleo)
        and ("strata" not in when or strata)
    }


def as_documented(names: Iterable[str], wanted: set[str]) -> set[str]:
    """Names that a step wrote, those of groups as the table has them."""
    found = set()
    for name in names:
        group, _, which = name.partition("/")
        for place, pattern in _PLACEHOLDERS.items():
            if f"{group}/{place}" in wanted and re.fullmatch(pattern, which):
                name = f"{group}/{place}"
        found.add(name)
    return found
