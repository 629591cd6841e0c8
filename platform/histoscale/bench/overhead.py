"""Seconds that a person waits for the tool itself: importing it, and asking it for help."""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from histoscale.bench.figure import Figure

_REPEATS = 5


def overhead() -> Iterator[Figure]:
    """`overhead.import_s` and `overhead.help_s`, each the median of five, against a bare Python."""
    bare_s = _median_s(["-c", "pass"])
    yield Figure("overhead.import_s", _median_s(["-c", "import histoscale"]), "s", bare_s)
    yield Figure("overhead.help_s", _median_s(["jobs/pretrain.py", "--help"]), "s", bare_s)


def _median_s(arguments: Sequence[str]) -> float:
    times_s = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)
