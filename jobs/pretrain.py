r"""Pretrain a backbone on the slides of an index; running the same command again resumes the run.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/pretrain.py --recipe jobs/recipes/quickstart.yaml --index INDEX --out RUN [--set model.arch=vit_s14]

INDEX is the --out of jobs/index.py. RUN is a folder or an s3:// prefix that will hold the resolved recipe, the
checkpoints, the ledger and the TensorBoard events. --fork-from OTHER[@STEP] begins a new run from a checkpoint of
another one, under any recipe with the same network; see docs/guides/fork.md. Exit status: 0 when the run is complete
or was stopped with a committed checkpoint; with a one-line diagnosis as the last line 2, or 75 where the same command
may succeed later: a bucket was away, or nodes did not come in time.
"""

import argparse

from histoscale.cluster.job import connect, job_name, location, run_job


def main() -> None:
    """Read the arguments, check them, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a YAML file; jobs/recipes has examples")
    parser.add_argument("--index", required=True, help="the index of the slides (a folder or an s3:// prefix)")
    parser.add_argument("--out", required=True, metavar="RUN", help="the run folder (a folder or an s3:// prefix)")
    parser.add_argument("--fork-from", metavar="OTHER[@STEP]", help="begin from a checkpoint of another run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field of the recipe, as often as needed: --set model.arch=vit_s14 --set cluster.workers=8",
    )
    arguments = parser.parse_args()

    from histoscale.cluster.fork import fork_source
    from histoscale.cluster.pretrain import PretrainRequest, check_request, pretrain
    from histoscale.config.decode import load_recipe

    request = PretrainRequest(
        recipe=load_recipe(arguments.recipe, arguments.set),
        index_uri=location(arguments.index, "--index"),
        run_uri=location(arguments.out, "--out"),
        holder=job_name(),
        fork_from=fork_source(arguments.fork_from) if arguments.fork_from else None,
    )
    checked = check_request(request)
    connect()
    outcome = pretrain(checked, tell=lambda line: print(line, flush=True))
    if outcome.stopped:
        print(f"stopped at step {outcome.step} of {outcome.steps}; run the same command again to resume")
    else:
        print(f"complete: {outcome.steps} steps; run folder {request.run_uri}")


if __name__ == "__main__":
    run_job(main)
