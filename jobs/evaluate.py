r"""Probe a run's newest checkpoint on labelled tiles, beside the same network untrained and plain colour statistics.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/evaluate.py --run RUN --dataset DIR

RUN is the --out of jobs/pretrain.py. DIR is a folder or an s3:// prefix that holds one folder per class with PNG, JPEG
or TIFF tiles in it, or another layout of docs/guides/datasets.md. The table is printed; all figures go to
RUN/evaluations/. A GPU is used where the cluster has one.
Exit status: 0, or 2 with a one-line diagnosis as the last line.
"""

import argparse

from histoscale.cluster.job import connect, location, run_job


def main() -> None:
    """Read the arguments, evaluate on a node of the cluster, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="RUN", help="the run folder (a folder or an s3:// prefix)")
    parser.add_argument("--dataset", required=True, metavar="DIR", help="one folder per class, with tiles in it")
    arguments = parser.parse_args()

    import ray

    from histoscale.cluster.failures import diagnosis_in
    from histoscale.cluster.run_folder import require_run
    from histoscale.evaluate.report import EvaluationReport, evaluate_run
    from histoscale.storage import join, open_store

    run_uri, dataset_uri = location(arguments.run, "--run"), location(arguments.dataset, "--dataset")
    recipe = require_run(open_store(run_uri))

    def evaluate(device: str) -> EvaluationReport:
        import torch

        return evaluate_run(open_store(run_uri), recipe, dataset_uri, torch.device(device))

    connect()
    has_gpu = ray.cluster_resources().get("GPU", 0.0) >= 1.0  # type: ignore[no-untyped-call]
    task = ray.remote(evaluate).options(num_cpus=1, num_gpus=1 if has_gpu else 0)
    try:
        report = ray.get(task.remote("cuda" if has_gpu else "cpu"))
    except ray.exceptions.RayTaskError as error:
        raise diagnosis_in(error) or error from None
    print(report.table())
    print(f"report: {join(run_uri, report.key)}")


if __name__ == "__main__":
    run_job(main)
