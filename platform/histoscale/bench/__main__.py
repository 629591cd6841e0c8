"""Run a named benchmark: `python -m histoscale.bench NAME`, from the root of the repository.

Each figure is one line of JSON on standard output, and nothing else is; what it means stands in docs/benchmarks/.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

from histoscale.bench.figure import Figure
from histoscale.bench.index import index
from histoscale.bench.overhead import overhead
from histoscale.bench.plan import plan
from histoscale.bench.quickstart import quickstart
from histoscale.bench.tissue import tissue

BENCHMARKS: dict[str, Callable[[], Iterator[Figure]]] = {
    "index": index,
    "overhead": overhead,
    "plan": plan,
    "quickstart": quickstart,
    "tissue": tissue,
}


def main() -> None:
    """Read the name, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    for figure in BENCHMARKS[parser.parse_args().name]():
        sys.stdout.write(figure.line() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
