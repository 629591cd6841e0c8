"""What every job script shares: its cluster, its exit status and its places."""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import ray
from ray.exceptions import AuthenticationError, RayError

from histoscale.errors import ClusterError, HistoscaleError
from histoscale.storage import open_store

DIAGNOSED = 2
TRANSIENT = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130
MIN_LOCAL_CPUS = 8  # logical: a trainer, its readers and the job must fit on a laptop with two cores

# Set for every process of a job; jobs/runtime_env.yaml repeats them, and a test compares the two.
ENVIRONMENT = {
    "RAY_JOB_STOP_WAIT_TIME_S": "120",  # `ray job stop` kills after 3 s unless told that a checkpoint takes longer
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "-1",  # a long checkpoint is no reason to end the stream
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # a dead worker is found a second sooner than by default
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",  # of a dead rank's group; the default holds a restart up for 30 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def run_job(main: Callable[[], None]) -> NoReturn:
    """Run a job's main function; a diagnosis becomes the last line and exit status 2, or 75 where it may pass."""
    try:
        main()
    except HistoscaleError as error:
        ray.shutdown()
        sys.stdout.flush()
        may_pass = " This may pass by itself: run the same command again." if error.transient else ""
        sys.stderr.write(f"error: {error}{may_pass}\n")
        sys.exit(TRANSIENT if error.transient else DIAGNOSED)
    except KeyboardInterrupt:
        ray.shutdown()
        sys.stderr.write("interrupted: run the same command again to go on\n")
        sys.exit(INTERRUPTED)
    sys.exit(0)


def connect() -> None:
    """Join the cluster of this job, or start one on this machine when the script is run directly.

    Raises:
        ClusterError: `RAY_ADDRESS` names a cluster that does not answer or refuses the token, or none can be started.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports every start, end and missing bar
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except AuthenticationError as error:
            raise token_refused("the Ray cluster", address) from error
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise ClusterError(
                "the Ray cluster does not answer",
                value=address,
                expected="the address of a running cluster in RAY_ADDRESS",
                remedy="start one with `ray start --head`, or unset RAY_ADDRESS to run on this machine alone",
            ) from error
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        ray.init(
            address="local",
            num_cpus=max(MIN_LOCAL_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except AuthenticationError as error:
        raise token_refused("the Ray cluster that was started here", "local") from error
    except Exception as error:  # Ray's own are bare ones where a process of it does not come up
        raise ClusterError(
            "Ray cannot be started on this machine",
            value=f"{type(error).__name__}: {last_line(error)}",
            expected="a Ray head of this process",
            remedy="look at the memory and at the disk of /tmp, end what is left of heads of yours by its process ids, "
            "or set RAY_ADDRESS to a cluster",
        ) from error


def token_refused(who: str, address: str) -> ClusterError:
    """The error for a cluster, or its job server, that does not take our token, or gets none."""
    return ClusterError(
        f"{who} refuses the token",
        value=address,
        expected="the cluster's token, in RAY_AUTH_TOKEN or in the file of RAY_AUTH_TOKEN_PATH",
        remedy="set it, and RAY_AUTH_MODE=token, where this command runs",
    )


def last_line(error: Exception) -> str:
    """The last line of an error's text, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def inside_a_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return _JOB_CONFIG in os.environ


def job_name() -> str:
    """The submission id of this job, or the process when the script was run directly."""
    metadata = json.loads(os.environ.get(_JOB_CONFIG, "{}")).get("metadata", {})
    return str(metadata.get("job_submission_id", f"process {os.getpid()}"))


def location(text: str, what: str) -> str:
    """A place that every node of the cluster understands: an s3:// URI or an absolute path.

    Raises:
        ClusterError: A relative path inside a submitted job, where it would name a folder that is thrown away.
        StorageError: A URI of another kind.
    """
    if "://" in text:
        return open_store(text).uri
    path = Path(text).expanduser()
    if not path.is_absolute() and inside_a_job():
        raise ClusterError(
            f"{what} is a relative path",
            value=text,
            expected="an absolute path or an s3:// URI",
            remedy="a submitted job runs in a temporary copy of the working directory, so say where from the root on",
        )
    return str(path.absolute())
