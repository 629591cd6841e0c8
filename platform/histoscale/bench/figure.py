"""What a benchmark prints: one figure with its unit, its baseline and how it came about."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        figure: Its name, which scripts rely on.
        value: The number.
        unit: Of the number.
        baseline: The same measured of what it is compared with, in the same call; None where there is nothing.
        details: Whatever else a reader needs to judge it.
    """

    figure: str
    value: float
    unit: str
    baseline: float | None = None
    details: Mapping[str, object] = field(default_factory=dict)

    def line(self) -> str:
        """The figure as a line of JSON."""
        return json.dumps(asdict(self))
