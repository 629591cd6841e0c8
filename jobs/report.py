r"""Report on a run, without a cluster: all of it, the tiles of a step, or which checkpoints have seen a slide.

    ray job submit --address http://127.0.0.1:8265 --working-dir . --runtime-env jobs/runtime_env.yaml -- \
        python jobs/report.py --run RUN [--slide SLIDE_ID | --step N]

RUN is the --out of jobs/pretrain.py. Alone it prints the run's goodput, the time lost by cause and the restarts, and
writes RUN/report.html: evaluations, curves, pictures, timeline, code, left-out slides, how to go on. With --slide it
answers for a slide id (32 hexadecimal digits, as in INDEX and in logs) how many of its tiles entered which checkpoint.
With --step it writes RUN/steps/step-N.html: the tiles of a step, for example where a curve has a spike.

Exit status: 0; 2 with a one-line diagnosis as the last line; 75 with one where the same command may succeed later, as a
bucket was away.
"""

import argparse

from histoscale.cluster.job import location, run_job


def main() -> None:
    """Read the arguments, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="RUN", help="the run folder (a folder or an s3:// prefix)")
    about = parser.add_mutually_exclusive_group()
    about.add_argument("--slide", metavar="SLIDE_ID", help="which checkpoints have seen this slide")
    about.add_argument("--step", type=int, metavar="N", help="the tiles of this step, as a page")
    arguments = parser.parse_args()

    from histoscale.checkpoint.reader import latest_commit, require_commit
    from histoscale.cluster.run_folder import require_run
    from histoscale.cluster.slide_history import slide_history
    from histoscale.cluster.step_report import write_step_page
    from histoscale.observe.run_report import write_report
    from histoscale.storage import open_store

    store = open_store(location(arguments.run, "--run"))
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
