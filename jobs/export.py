r"""Export the backbone of a run's newest checkpoint (the EMA teacher) in the layout that timm loads.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/export.py --run RUN --format timm --out DIR

RUN is the --out of jobs/pretrain.py, DIR a folder or an s3:// prefix that is empty or holds an earlier export.
Prints the largest difference between all tokens of timm's model and of ours. Exit status: 0, or with a one-line
diagnosis as the last line 2, or 75 where the same command may succeed later, as a bucket was away.
"""

import argparse

from histoscale.cluster.job import location, run_job


def main() -> None:
    """Read the arguments, export, say what was compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="RUN", help="the run folder (a folder or an s3:// prefix)")
    parser.add_argument("--format", required=True, help="timm")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the export goes")
    arguments = parser.parse_args()

    from histoscale.cluster.run_folder import recorded_origins, require_run
    from histoscale.export.timm_layout import export_run
    from histoscale.storage import open_store

    run_store = open_store(location(arguments.run, "--run"))
    recipe = require_run(run_store)
    out = location(arguments.out, "--out")
    result = export_run(run_store, recipe, out, arguments.format, recorded_origins(run_store))
    print(f"exported {recipe.model.arch} at step {result.step}: {result.parameters:,} parameters")
    if result.difference is None:
        print("timm is not installed here: that its model equals ours was not checked")
    else:
        print(f"largest difference of tokens between timm's model and ours: {result.difference:.2e}")
    print(f"export: {result.uri}")


if __name__ == "__main__":
    run_job(main)
