r"""Which model, how much data, and how small it may become: sweeps that plan, run, survive, fit and decide.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/sweep.py scaling --spec jobs/sweeps/scaling.yaml --index INDEX --out SWEEP
    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/sweep.py distillation --spec jobs/sweeps/distillation.yaml --teacher MODEL --index INDEX --out SWEEP

INDEX is the --out of jobs/index.py; MODEL a run of jobs/pretrain.py (the spec's mode heads) or an export (features).
--dry-run prints every trial with its predicted work, memory, time and cost, and starts nothing. Each trial is an
ordinary run folder SWEEP/trials/NAME. The same command again goes on after any interruption: no trial that has ended is
run again, and one that was interrupted goes on from its last commit. A trial that fails is recorded with its reason.
The end is SWEEP/report.html, SWEEP/trials.csv and .parquet, and the answer as the last line.
docs/guides/sweeps.md says how to write a spec and how to read the report. Exit status: 0; 2 with a one-line diagnosis
as the last line; 75 with one where the same command may succeed later.
"""

import argparse

from histoscale.cluster.job import connect, job_name, location, run_job


def main() -> None:
    """Read the arguments, plan, run, answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("scaling", "distillation"))
    parser.add_argument("--spec", required=True, metavar="FILE", help="a YAML file; jobs/sweeps has examples")
    parser.add_argument("--index", required=True, help="the index of the slides (a folder or an s3:// prefix)")
    parser.add_argument("--out", required=True, metavar="SWEEP", help="the folder of the sweep, or an s3:// prefix")
    parser.add_argument("--teacher", metavar="MODEL", help="of a distillation: a run folder or an export")
    parser.add_argument("--dry-run", action="store_true", help="print the trials and what they will cost")
    arguments = parser.parse_args()
    if (arguments.kind == "distillation") != (arguments.teacher is not None):
        parser.error("argument --teacher: is for distillation, which needs one")

    from histoscale.sweeps.job import SweepRequest, plan_distillation, plan_scaling, run_sweep

    request = SweepRequest(
        spec_file=arguments.spec,
        index_uri=location(arguments.index, "--index"),
        out=location(arguments.out, "--out"),
        holder=job_name(),
        teacher=location(arguments.teacher, "--teacher") if arguments.teacher else None,
    )
    planned = (plan_scaling if arguments.kind == "scaling" else plan_distillation)(request)
    for line in planned.lines():
        print(line)
    if arguments.dry_run:
        return
    connect()
    print(run_sweep(planned, lambda line: print(line, flush=True)))


if __name__ == "__main__":
    run_job(main)
