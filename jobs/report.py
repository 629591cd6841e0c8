r"""Report on a run, its tiles and slides, or compare runs; without a cluster.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/report.py RUN [RUN2 ...] [--out compare.html] [--slide SLIDE_ID | --step N]

RUN is the --out of jobs/pretrain.py. With one RUN it prints the run's goodput, the time lost by cause, restarts and
alarms, and writes RUN/report.html: evaluations, curves, pictures, timeline, code, left-out slides, how to go on. With
two to eight it writes one page that compares them, the first with each of the others; see docs/guides/compare.md.

With --slide it answers for a slide id (32 hexadecimal digits, as in INDEX and in logs) how many of its tiles entered
which checkpoint. With --step it writes RUN/steps/step-N.html: the tiles of a step, as where a curve has a spike.
Exit status: 0; 2 with a one-line diagnosis as the last line; 75 with one where the same command may succeed later.
"""

import argparse

from histoscale.cluster.job import location, run_job


def main() -> None:
    """Read the arguments, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder (a folder or an s3:// prefix)")
    parser.add_argument("--out", metavar="FILE", help="of the comparison: a file or an s3:// URI (compare.html)")
    about = parser.add_mutually_exclusive_group()
    about.add_argument("--slide", metavar="SLIDE_ID", help="which checkpoints of the run have seen this slide")
    about.add_argument("--step", type=int, metavar="N", help="the tiles of this step of the run, as a page")
    arguments = parser.parse_args()
    several = len(arguments.runs) > 1
    if several and (arguments.slide or arguments.step is not None):
        parser.error("--slide and --step are about one RUN")
    if arguments.out and not several:
        parser.error("--out is of a comparison: give two RUNs at least; the report of one is RUN/report.html")
    runs = [location(run, "RUN") for run in arguments.runs]

    if several:
        from histoscale.cluster.compare import compare_runs

        compare_runs(runs, location(arguments.out or "compare.html", "--out"), print)
        return

    from histoscale.checkpoint.reader import latest_commit, require_commit
    from histoscale.cluster.run_folder import require_run
    from histoscale.cluster.slide_history import slide_history
    from histoscale.cluster.step_report import write_step_page
    from histoscale.observe.run_report import write_report
    from histoscale.storage import open_store

    store = open_store(runs[0])
    if arguments.slide is not None:
        for line in slide_history(store, arguments.slide).lines():
            print(line)
        return
    if arguments.step is not None:
        uri, lines = write_step_page(store, require_run(store), require_commit(store), arguments.step)
        for line in (*lines, f"tiles of step {arguments.step}: {uri}"):
            print(line)
        return
    uri, lines = write_report(store, require_run(store), latest_commit(store))
    for line in lines:
        print(line)
    print(f"report: {uri}")


if __name__ == "__main__":
    run_job(main)
