r"""Probe a run's newest checkpoint on labelled tiles, beside the same network untrained and plain colour statistics.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/evaluate.py --run RUN --dataset DIR [--probes knn,linear] [--embedding both] [--seeds 3]

RUN is the --out of jobs/pretrain.py. DIR is a folder or an s3:// prefix that holds one folder per class with PNG, JPEG
or TIFF tiles in it, or another layout of docs/guides/datasets.md. The table is printed;
all figures go to RUN/evaluations/. A GPU is used where the cluster has one.
docs/guides/evaluation.md explains every figure. Probes, from fast to slow:

    knn              votes of the 20 nearest tiles; fits nothing, and names the run's best step
    few_shot_1       nearest class mean of 1 tile per class, ten draws; likewise few_shot_4 and few_shot_16
    ridge            least squares in closed form; for many tiles
    linear           logistic regression, its strength chosen on a part of the training tiles
    virchow_linear   the protocol of the Virchow papers: SGD, 12,500 iterations of 4,096; minutes on a CPU

A report of the same step and dataset is replaced. Exit status: 0; 2 with a one-line diagnosis as the last line; 75 with
one where the same command may succeed later, as a bucket was away.
"""

import argparse

from histoscale.cluster.job import connect, location, run_job


def main() -> None:
    """Read the arguments, evaluate on a node of the cluster, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="RUN", help="the run folder (a folder or an s3:// prefix)")
    parser.add_argument(
        "--dataset", required=True, metavar="DIR", help="a labelled dataset; a CSV that names tiles, too"
    )
    parser.add_argument(
        "--layout", default="auto", help="of the dataset, such as breakhis:200x, where it cannot be told by itself"
    )
    parser.add_argument("--probes", default="knn,linear", metavar="LIST", help="with commas between; see above")
    parser.add_argument(
        "--embedding",
        default="both",
        metavar="LIST",
        help="cls (class token), patch_mean, or both of them side by side; several with commas between",
    )
    parser.add_argument("--seeds", type=int, default=3, help="splits to draw where the dataset has none of its own")
    arguments = parser.parse_args()

    import ray

    from histoscale.cluster.failures import diagnosis_in
    from histoscale.cluster.run_folder import require_run
    from histoscale.evaluate.assess import EvaluationPlan
    from histoscale.evaluate.report import EvaluationReport, evaluate_run
    from histoscale.storage import join, open_store

    plan = EvaluationPlan.parse(arguments.probes, arguments.embedding, arguments.seeds)
    run_uri, dataset_uri = location(arguments.run, "--run"), location(arguments.dataset, "--dataset")
    recipe = require_run(open_store(run_uri))

    def evaluate(device: str) -> EvaluationReport:
        import torch

        return evaluate_run(open_store(run_uri), recipe, dataset_uri, torch.device(device), plan, arguments.layout)

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
