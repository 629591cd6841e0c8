"""Run a named benchmark: `python -m histoscale.bench NAME`, from the root of the repository.

Each figure is one line of JSON on standard output, and nothing else is; what it means stands in docs/benchmarks/.
"""

import argparse
import contextlib
import importlib
import inspect
import sys

NAMES = (
    "augment",
    "checkpoint",
    "elastic",
    "embed",
    "evaluate",
    "faults",
    "feed",
    "goodput",
    "index",
    "learning",
    "memory",
    "overhead",
    "plan",
    "quickstart",
    "step",
    "stream",
    "tissue",
)


def main() -> None:
    """Read the name, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where `augment`, `checkpoint`, `memory` and `step` train",
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not _has_gpu():
        parser.error("argument --device: this machine has no CUDA device, so give cpu")
    # Each has a module of its own, and only that is loaded: training needs no Ray, and streams need no DeepSpeed.
    benchmark = getattr(importlib.import_module(f"histoscale.bench.{arguments.name}"), arguments.name)
    options = {"device": arguments.device} if "device" in inspect.signature(benchmark).parameters else {}
    figures_to = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints warnings
        for figure in benchmark(**options):
            figures_to.write(figure.line() + "\n")
            figures_to.flush()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
