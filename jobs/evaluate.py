r"""Probe a network on labelled tiles, beside the same network untrained, plain colour statistics, and others.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/evaluate.py --run RUN --dataset DIR [--probes knn,linear] [--embedding both] [--beside MODEL ...]

RUN is the --out of jobs/pretrain.py; its newest checkpoint is taken. DIR is a folder or an s3:// prefix that holds one
folder per class with PNG, JPEG or TIFF tiles in it, or another layout of docs/guides/datasets.md. The table is printed;
all figures go to RUN/evaluations/. MODEL is another run, an export, or ARCH=FILE of published weights: all are asked
about the same tiles, so their differences have intervals. Other calls:

    python jobs/evaluate.py --model MODEL --out DIR --dataset DIR      a network that is no run of yours
    python jobs/evaluate.py --run RUN --suite jobs/suites/virchow2.yaml --dataset FOLDER
        every task of a suite whose dataset is in FOLDER, with the paper's figures beside; again, to go on

docs/guides/evaluation.md explains every figure. Probes, from fast to slow:

    knn              votes of the 20 nearest tiles; fits nothing, and names the run's best step
    few_shot_1       nearest class mean of 1 tile per class, ten draws; likewise few_shot_4 and few_shot_16
    ridge            least squares in closed form; for many tiles
    linear           logistic regression, its strength chosen on a part of the training tiles
    virchow_linear   the protocol of the Virchow papers: SGD, 12,500 iterations of 4,096; minutes on a CPU

A report of the same step and dataset is replaced. A GPU is used where the cluster has one. Exit status: 0; 2 with a
one-line diagnosis as the last line; 75 with one where the same command may succeed later, as a bucket was away.
"""

import argparse
from functools import partial

from histoscale.cluster.job import connect, location, run_job


def main() -> None:
    """Read the arguments, evaluate on a node of the cluster, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--run", metavar="RUN", help="the run folder (a folder or an s3:// prefix)")
    subject.add_argument("--model", metavar="MODEL", help="an export, a run of others, or ARCH=FILE")
    parser.add_argument("--out", metavar="DIR", help="where reports go; by default the run folder")
    parser.add_argument("--dataset", required=True, metavar="DIR", help="labelled tiles, or a CSV that names them")
    parser.add_argument("--suite", metavar="FILE", help="tasks to measure; --dataset then holds all their datasets")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="MODEL", help="another network; may come again"
    )
    parser.add_argument(
        "--layout", default="auto", help="of the dataset, such as breakhis:200x, where it cannot be told"
    )
    parser.add_argument("--probes", default="knn,linear", metavar="LIST", help="with commas between; see above")
    parser.add_argument("--embedding", default="both", metavar="LIST", help="cls, patch_mean, or both side by side")
    parser.add_argument("--seeds", type=int, default=3, help="splits to draw where the dataset has none of its own")
    parser.add_argument("--cpus", type=int, default=1, help="of the node that evaluates")
    arguments = parser.parse_args()
    if arguments.model and not arguments.out:
        parser.error("argument --out: is needed with --model, to say where the report goes")

    from histoscale.cluster.evaluate import EvaluateRequest, evaluate, model_place

    request = EvaluateRequest(
        subject=location(arguments.run, "--run") if arguments.run else model_place(arguments.model, "--model"),
        is_run=arguments.run is not None,
        out=location(arguments.out or arguments.run, "--out"),
        dataset=location(arguments.dataset, "--dataset"),
        suite=arguments.suite,
        beside=tuple(model_place(place, "--beside") for place in arguments.beside),
        layout=arguments.layout,
        probes=arguments.probes,
        embeddings=arguments.embedding,
        seeds=arguments.seeds,
        cpus=arguments.cpus,
    )
    for line in evaluate(request, connect, partial(print, flush=True)):
        print(line)


if __name__ == "__main__":
    run_job(main)
