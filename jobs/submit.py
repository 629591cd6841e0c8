r"""Submit a job and stay with it until it has an outcome, whatever happens to the cluster; for schedulers too.

    python jobs/submit.py --address http://HEAD:8265 [--address http://OTHER:8265] -- \
        python jobs/pretrain.py --recipe jobs/recipes/quickstart.yaml --index INDEX --out RUN

It follows the job's log on standard output. When the cluster dies or the job is lost, it waits until an address answers
(of a new head, mostly at the same address; a second address is another door to the cluster, or a standby) and submits
again, and pretrain goes on from its last checkpoint. A job that still runs is followed, never submitted twice. A retry
sends the working directory as it is then, and counts only while attempts fail within ten minutes. Ctrl-C leaves the job
running; the same command with the same --submission-id finds it again. A cluster with token authentication is reached
as by `ray job submit`.

Exit status, unlike that of `ray job submit`, the job's own: 0, also when it was stopped; 2 after a one-line diagnosis
of what another attempt would refuse too; 1, or the job's, when retries or patience are spent (75: what failed may pass
by itself); 130 after Ctrl-C.
"""

import argparse
import secrets
import shlex
import sys

from histoscale.cluster.job import INTERRUPTED, run_job


def main() -> None:
    """Read the arguments, submit, follow, and end as the job does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", action="append", required=True, metavar="URL", help="of a job server; repeat")
    parser.add_argument("--retries", type=int, default=5, metavar="N", help="after a lost or failed job (default: 5)")
    parser.add_argument(
        "--wait-s", type=float, default=3600.0, metavar="S", help="for an address that answers (default: 3600)"
    )
    parser.add_argument("--runtime-env", default="jobs/runtime_env.yaml", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--working-dir", default=".", metavar="DIR", help="sent along with the job (default: .)")
    parser.add_argument("--submission-id", metavar="ID", help="the job's name; finds a job of an earlier call again")
    parser.add_argument("command", nargs="+", help="after `--`: the command to run")
    arguments = parser.parse_args()

    from histoscale.cluster.job_server import RayJobServer
    from histoscale.cluster.submit import Submission, Submitter, read_runtime_env

    submission = Submission(
        addresses=tuple(arguments.address),
        entrypoint=shlex.join(arguments.command),
        submission_id=arguments.submission_id or f"histoscale-{secrets.token_hex(6)}",
        retries=arguments.retries,
        wait_s=arguments.wait_s,
    )
    runtime_env = read_runtime_env(arguments.runtime_env, arguments.working_dir)
    submitter = Submitter(
        submission,
        connect=lambda address: RayJobServer(address, submission.entrypoint, runtime_env),
        write=lambda text: print(text, end="", flush=True),
        tell=lambda line: print(f"submit: {line}", file=sys.stderr, flush=True),
    )
    try:
        sys.exit(submitter.run())
    except KeyboardInterrupt:
        print(f"\nsubmit: stopped following; {submitter.how_to_go_on()}", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    run_job(main)
