"""Submit a job and stay with it: across a broken connection, a dead head and a new cluster.

Ray runs a job once, and it dies with its cluster. Here an attempt is one job of Ray's: the first has the submission id
that was asked for, the next ones `ID-2`, `ID-3` and so on.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

import yaml

from histoscale.cluster.job import DIAGNOSED, INTERRUPTED, TRANSIENT
from histoscale.errors import ClusterError

POLL_S = 2.0
# An attempt that lasted this long got somewhere, so the next failure has the whole budget again.
PROGRESS_S = 600.0
# A job that we cannot see may well run, so its address is given this long before another one is asked.
STAY_S = 30.0

_FAILED = 1
_SUBMISSION_ID = re.compile(r"[A-Za-z0-9._-]+")
_LINE_EVERY_S = 30.0
# Exit statuses that another attempt would only repeat: lasting diagnoses, commands that do not run, an interrupt.
_FINAL = (DIAGNOSED, 126, 127, INTERRUPTED)


@dataclass(frozen=True)
class JobState:
    """What a job server says of a job.

    Attributes:
        status: Ray's word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        entrypoint: Its command line.
        exit_code: Of the command, negative for a signal; None where it did not end by itself.
        message: Ray's explanation.
    """

    status: str
    entrypoint: str
    exit_code: int | None = None
    message: str = ""


class Step(Enum):
    """What to do next."""

    SUBMIT = "submit the job"
    FOLLOW = "follow the job that runs"
    RETRY = "submit it again"
    DONE = "end with the job's exit status"
    GIVE_UP = "end, for the budget of retries is spent"


@dataclass(frozen=True)
class Decision:
    """The next step; why; and the exit status where it is the last."""

    step: Step
    why: str = ""
    status: int = 0


def decide(job: JobState | None, submitted: bool, retries_left: int) -> Decision:
    """What an attempt's state calls for.

    Args:
        job: The state of the newest attempt, None where the cluster does not know it.
        submitted: Whether a cluster had accepted that attempt.
        retries_left: How many more attempts may follow a lost or failed one.
    """
    if job is None:
        if not submitted:
            return Decision(Step.SUBMIT)
        return _again("is unknown to the cluster, whose head must be a new one", _FAILED, retries_left)
    if job.status == "SUCCEEDED":
        return Decision(Step.DONE, "succeeded")
    if job.status == "STOPPED":
        return Decision(Step.DONE, "was stopped")
    if job.status != "FAILED":
        return Decision(Step.FOLLOW)
    if job.exit_code is None:
        return _again(f"was lost: {(job.message.splitlines() or ['no reason given'])[0]}", _FAILED, retries_left)
    status = job.exit_code if job.exit_code >= 0 else 128 - job.exit_code  # as a shell says it
    if status in _FINAL:
        return Decision(Step.DONE, f"ended with exit status {status}", status)
    passing = ", of what may pass by itself" if status == TRANSIENT else ""
    return _again(f"failed with exit status {status}{passing}", status, retries_left)


def _again(why: str, status: int, retries_left: int) -> Decision:
    return Decision(Step.RETRY if retries_left > 0 else Step.GIVE_UP, why, status)


class Unreachable(Exception):
    """A job server does not answer, or cannot serve now; worth another try."""


class JobServer(Protocol):
    """The job server at one address. Every method raises Unreachable where it does not answer."""

    def state(self, submission_id: str) -> JobState | None:
        """What it knows of a job, or None."""

    def submit(self, submission_id: str) -> None:
        """Start the job. Raises ClusterError where it is refused."""

    def follow(self, submission_id: str, log: "Log") -> None:
        """Pass the job's log on until the job has ended."""


@dataclass(frozen=True)
class Clock:
    """Monotonic seconds, and how to let some pass."""

    now_s: Callable[[], float]
    sleep: Callable[[float], None]


REAL_TIME = Clock(time.monotonic, time.sleep)


class Log:
    """Where a job's log goes, each character once, however often it is read from the start.

    Args:
        write: Takes the text.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._written = 0

    def show(self, text: str, position: int) -> int:
        """Write what is new of a part of the log; answers where the part ends.

        Args:
            text: The part.
            position: Where in the log it begins.
        """
        new = text[max(0, self._written - position) :]
        if new:
            self._write(new)
        self._written = max(self._written, position + len(text))
        return position + len(text)


@dataclass(frozen=True)
class Submission:
    """What to submit, where, and how patiently.

    Attributes:
        addresses: URLs of job servers, tried in turn.
        entrypoint: The job's command line.
        submission_id: Of the first attempt.
        retries: Attempts that may follow a lost or failed one.
        wait_s: How long to wait for an address that answers.

    Raises:
        ClusterError: A value that cannot work.
    """

    addresses: tuple[str, ...]
    entrypoint: str
    submission_id: str
    retries: int
    wait_s: float

    def __post_init__(self) -> None:
        for address in self.addresses:
            if not address.startswith(("http://", "https://")):
                raise ClusterError("--address is no URL of a job server", value=address, expected="http://HOST:8265")
        if not _SUBMISSION_ID.fullmatch(self.submission_id):  # it becomes a part of URLs and of a file's name
            raise ClusterError(
                "--submission-id is no name", value=self.submission_id, expected="letters, digits, '.', '_' and '-'"
            )
        if self.retries < 0:
            raise ClusterError("--retries is negative", value=self.retries, expected="0 or more")
        if not self.wait_s >= 0.0:
            raise ClusterError("--wait-s is no duration", value=self.wait_s, expected="seconds, 0 or more")


def read_runtime_env(file: str, working_dir: str) -> dict[str, object]:
    """The runtime environment of a job, as `ray job submit` puts it together.

    Args:
        file: A YAML file with Ray's fields; relative folders in it are relative to where we are.
        working_dir: Folder that is sent along, or a URI.

    Raises:
        ClusterError: The file or a folder is not there, or the file is not what Ray reads.
    """
    try:
        found = yaml.safe_load(Path(file).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ClusterError(
            "the runtime environment cannot be read", value=f"{file}: {error}", expected="a YAML file"
        ) from error
    if not isinstance(found, dict):
        raise ClusterError("the runtime environment is no mapping", value=file, expected="`name: value` lines")
    if "://" not in working_dir and not Path(working_dir).is_dir():
        raise ClusterError(
            "--working-dir is no folder", value=working_dir, expected="a folder of this machine or a URI"
        )
    return found | {"working_dir": working_dir}


class Submitter:
    """Sees a submission through.

    Args:
        submission: What to submit.
        connect: Gives the job server at an address.
        write: Takes the job's log.
        tell: Takes a line of our own.
        clock: Monotonic seconds, and how to wait for some; tests do not wait.
    """

    def __init__(
        self,
        submission: Submission,
        connect: Callable[[str], JobServer],
        write: Callable[[str], None],
        tell: Callable[[str], None],
        clock: Clock = REAL_TIME,
    ) -> None:
        self._submission = submission
        self._connect = connect
        self._write = write
        self._tell = tell
        self._clock = clock
        self._turn = 0
        self._attempt = 1
        self._left = submission.retries
        self._picked_up = False
        self._submitted = False
        self._began_s = self._seen_s = clock.now_s()
        self._lost_since_s: float | None = None
        self._said_s = 0.0
        self._log = Log(write)

    @property
    def address(self) -> str:
        """The address that is used now."""
        return self._submission.addresses[self._turn % len(self._submission.addresses)]

    @property
    def job_id(self) -> str:
        """The submission id of the newest attempt."""
        return self._id_of(self._attempt)

    def run(self) -> int:
        """Submit, follow and retry until the job has an outcome; answers the exit status.

        Raises:
            ClusterError: No address has ever answered, or the job server refuses the job.
        """
        while True:
            try:
                server = self._connect(self.address)
                if not self._picked_up:
                    self._pick_up(server)
                if self._seen_s - self._began_s >= PROGRESS_S:
                    self._left = self._submission.retries
                decision = decide(server.state(self.job_id), self._submitted, self._left)
                if decision.why:
                    self._tell(f"job {self.job_id} {decision.why}")
                if decision.step is Step.GIVE_UP:
                    self._tell(f"gave up: {self._submission.retries} retries, none with {PROGRESS_S:g} s of work")
                if decision.step in (Step.DONE, Step.GIVE_UP):
                    return decision.status
                self._act(decision.step, server)
            except Unreachable as error:
                if not self._wait(str(error)):
                    return _FAILED

    def how_to_go_on(self) -> str:
        """What to do about the job when following it ends early."""
        if not self._submitted:
            return "no job of it runs"
        job = f"--address {self.address} {self.job_id}"
        return (
            f"the job goes on where its cluster lives: `ray job logs --follow {job}` follows it, `ray job stop {job}`"
            f" stops it, and this command with --submission-id {self._submission.submission_id} stays with it again"
        )

    def _id_of(self, attempt: int) -> str:
        return self._submission.submission_id + (f"-{attempt}" if attempt > 1 else "")

    def _pick_up(self, server: JobServer) -> None:
        """Go on with the job of an earlier call with the same id, unless it failed or was stopped."""
        newest, attempt = None, 1
        while (state := server.state(self._id_of(attempt))) is not None:
            if state.entrypoint != self._submission.entrypoint:
                raise ClusterError(
                    "the submission id belongs to a job with another command",
                    value=f"{self._id_of(attempt)}: {state.entrypoint}",
                    expected=self._submission.entrypoint,
                    remedy="choose another --submission-id, or leave it out",
                )
            newest, attempt = state, attempt + 1
        self._submitted = newest is not None and newest.status not in ("FAILED", "STOPPED")
        self._attempt = attempt - 1 if self._submitted else attempt
        self._picked_up = True

    def _act(self, step: Step, server: JobServer) -> None:
        if step is Step.FOLLOW:
            self._note_answer()
            self._submitted = True
            try:
                server.follow(self.job_id, self._log)
            finally:
                self._seen_s = self._clock.now_s()
            return
        if step is Step.RETRY:
            self._begin_again()
        server.submit(self.job_id)
        self._note_answer()
        self._submitted = True
        self._began_s = self._seen_s = self._clock.now_s()
        self._tell(f"submitted {self.job_id} to {self.address}")

    def _begin_again(self) -> None:
        self._left -= 1
        self._attempt += 1
        self._submitted = False
        self._log = Log(self._write)
        self._clock.sleep(POLL_S)

    def _note_answer(self) -> None:
        if self._lost_since_s is not None:
            self._tell(f"{self.address} answers after {self._clock.now_s() - self._lost_since_s:.0f} s")
            self._lost_since_s = None

    def _wait(self, why: str) -> bool:
        """Tell now and then what is waited for, and since when; turn to another address where this one stays silent.

        Returns:
            Whether to go on; False where an address has answered before and none has for too long.
        """
        now_s = self._clock.now_s()
        addresses = " or ".join(self._submission.addresses)
        if self._lost_since_s is None:
            self._lost_since_s = self._said_s = now_s
            self._tell(f"no answer from {self.address} ({why}); waiting for {addresses}")
        waited_s = now_s - self._lost_since_s
        if waited_s >= self._submission.wait_s and not self._picked_up:
            raise ClusterError(
                "no job server answers",
                value=f"{addresses}: {why}",
                expected=f"an answer within {self._submission.wait_s:g} s",
                remedy="start the cluster or correct --address; --wait-s is the patience",
            )
        if waited_s >= self._submission.wait_s:
            self._tell(f"gave up: no answer for {waited_s:.0f} s ({why}); {self.how_to_go_on()}")
            return False
        if now_s - self._said_s >= _LINE_EVERY_S:
            self._said_s = now_s
            self._tell(f"still waiting for {addresses}, for {waited_s:.0f} s now ({why})")
        if not self._submitted or waited_s >= STAY_S:
            self._turn += 1
        self._clock.sleep(POLL_S)
        return True
