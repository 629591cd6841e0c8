"""Run a named benchmark: `python -m histoscale.bench NAME`, from the root of the repository.

Each figure is one line of JSON on standard output, and nothing else is; what it means stands in docs/benchmarks/.
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator

from histoscale.bench.faults import faults
from histoscale.bench.feed import feed
from histoscale.bench.figure import Figure
from histoscale.bench.index import index
from histoscale.bench.overhead import overhead
from histoscale.bench.plan import plan
from histoscale.bench.quickstart import quickstart
from histoscale.bench.stream import stream
from histoscale.bench.tissue import tissue

BENCHMARKS: dict[str, Callable[[], Iterator[Figure]]] = {
    "faults": faults,
    "feed": feed,
    "index": index,
    "overhead": overhead,
    "plan": plan,
    "quickstart": quickstart,
    "stream": stream,
    "tissue": tissue,
}


def main() -> None:
    """Read the name, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    benchmark, figures_to = BENCHMARKS[parser.parse_args().name], sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints warnings
        for figure in benchmark():
            figures_to.write(figure.line() + "\n")
            figures_to.flush()


if __name__ == "__main__":
    main()
