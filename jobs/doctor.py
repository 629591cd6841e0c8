r"""Look into a run: what an archive of millions of slides would do, and why a step failed.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/doctor.py --simulate --recipe jobs/recipes/quickstart.yaml --slides 3100000 [--workers 8]

runs the real plan and feed on synthetic slides. It prints how long the plan takes to begin, which slides serve which
magnification, the mixture that comes out against the one that the recipe asks for, and how many blocks and tiles a
second the feed deals when reading costs nothing: its ceiling on this cluster.

    python jobs/doctor.py --replay RUN/captures/step-00000123.1a2b3c4d --index INDEX [--device cpu]

runs a captured step again, in one process and without a cluster: a step whose loss or gradient was not finite leaves a
capture in its run folder. It prints whether that happens again, where it begins (replica, module, term, parameter), the
tiles it begins with, whether fp32 cures it, and what to do. `--set loss.kde_weight=0` tries it under another recipe.

Exit status: 0, or with a one-line diagnosis as the last line 2, or 75 where it may pass by itself: a bucket was away.
"""

import argparse
from collections.abc import Iterable

from histoscale.cluster.job import connect, location, run_job
from histoscale.errors import ClusterError

# Options of each, and what they are when they are not given.
_SIMULATION = {"recipe": None, "slides": 100_000, "workers": 2, "blocks": 500}
_REPLAY = {"index": None, "device": "auto"}


def main() -> None:
    """Read the arguments, then simulate or replay, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--simulate", action="store_true", help="run plan and feed on synthetic slides")
    what.add_argument("--replay", metavar="CAPTURE", help="run a captured step again")
    parser.add_argument("--recipe", help="of a simulation: a YAML file; jobs/recipes has examples")
    parser.add_argument("--slides", type=int, help="slides of the archive (default: 100000)")
    parser.add_argument("--workers", type=int, help="training workers to deal to (default: 2)")
    parser.add_argument("--blocks", type=int, help="blocks to deal (default: 500)")
    parser.add_argument("--index", help="of a replay: the index that the run was started on")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="of a replay (default: auto)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a field")
    arguments = parser.parse_args()
    mode, ours, others = ("simulate", _SIMULATION, _REPLAY) if arguments.simulate else ("replay", _REPLAY, _SIMULATION)
    for name in others:
        if getattr(arguments, name) is not None:
            raise ClusterError(
                f"--{mode} has no use for --{name}",
                value=f"--{name} {getattr(arguments, name)}",
                expected=", ".join(f"--{option}" for option in [*ours, "set"]),
                remedy=f"leave --{name} out",
            )
    for name, default in ours.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        if getattr(arguments, name) is None:
            parser.error(f"--{mode} needs --{name}")
    for line in _simulation(arguments) if arguments.simulate else _replay(arguments):
        print(line, flush=True)


def _simulation(arguments: argparse.Namespace) -> Iterable[str]:
    from histoscale.cluster.simulate import Simulation, simulate
    from histoscale.config.decode import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)
    simulation = Simulation(recipe, arguments.slides, arguments.workers, arguments.blocks)
    connect()
    return simulate(simulation)


def _replay(arguments: argparse.Namespace) -> Iterable[str]:
    from histoscale.cluster.replay import ReplayRequest, replay

    places = location(arguments.replay, "--replay"), location(arguments.index, "--index")
    return replay(ReplayRequest(*places, arguments.device, tuple(arguments.set)))


if __name__ == "__main__":
    run_job(main)
