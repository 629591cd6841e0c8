"""The whole path with one command, on this machine: slides, index, pretraining, evaluation, export.

    python jobs/quickstart.py [--slides SLIDES] [--dataset DIR] [--out DIR] [--seed N] [--set FIELD=VALUE]

Starts a Ray head of its own on 127.0.0.1, submits every step to it with `ray job submit`, and ends it. Without --slides
it draws eight procedural slides and labelled tiles. Running the same command again goes on where it stopped. Exit
status: 0, or 2 with a one-line diagnosis as the last line.
"""

import argparse
from pathlib import Path

from histoscale.cluster.job import location, run_job


def main() -> None:
    """Read the arguments, run the steps, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", help="your slides: a folder or an s3:// prefix")
    parser.add_argument("--dataset", metavar="DIR", help="labelled tiles: one folder per class (a folder or s3://)")
    parser.add_argument("--out", default="quickstart-run", metavar="DIR", help="a folder of this machine")
    parser.add_argument("--seed", type=int, default=0, help="of the slides and of the run")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override the recipe")
    arguments = parser.parse_args()

    from histoscale.cluster.quickstart import QuickstartRequest, run_quickstart
    from histoscale.errors import RunError
    from histoscale.storage import is_remote

    if is_remote(arguments.out):
        raise RunError("--out must be a folder of this machine", value=arguments.out, expected="a path")
    request = QuickstartRequest(
        repository=Path(__file__).resolve().parents[1],
        out=Path(arguments.out).expanduser().absolute(),
        slides_uri=location(arguments.slides, "--slides") if arguments.slides else None,
        dataset_uri=location(arguments.dataset, "--dataset") if arguments.dataset else None,
        seed=arguments.seed,
        overrides=tuple(arguments.set),
    )
    report = run_quickstart(request, tell=lambda line: print(line, flush=True))
    print(f"\n{report}")
    print(f"this report: {request.out / 'report.md'}")


if __name__ == "__main__":
    run_job(main)
