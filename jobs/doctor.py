"""See what an archive of millions of slides would do before it is rented: the real plan and feed on synthetic slides.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/doctor.py --simulate --recipe jobs/recipes/quickstart.yaml --slides 3100000 [--workers 8]

Prints how long the plan takes to begin, which slides serve which magnification, the mixture that comes out against the
one that the recipe asks for, and how many blocks and tiles a second the feed deals when reading costs nothing: its
ceiling on this cluster. Exit status: 0, or 2 with a one-line diagnosis as the last line.
"""

import argparse

from histoscale.cluster.job import connect, run_job


def main() -> None:
    """Read the arguments, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", required=True, help="run plan and feed on synthetic slides")
    parser.add_argument("--recipe", required=True, help="a YAML file; jobs/recipes has examples")
    parser.add_argument("--slides", type=int, default=100_000, help="slides of the archive (default: 100000)")
    parser.add_argument("--workers", type=int, default=2, help="training workers to deal to (default: 2)")
    parser.add_argument("--blocks", type=int, default=500, help="blocks to deal (default: 500)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field")
    arguments = parser.parse_args()

    from histoscale.cluster.simulate import Simulation, simulate
    from histoscale.config.decode import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)
    simulation = Simulation(recipe, arguments.slides, arguments.workers, arguments.blocks)
    connect()
    for line in simulate(simulation):
        print(line, flush=True)


if __name__ == "__main__":
    run_job(main)
