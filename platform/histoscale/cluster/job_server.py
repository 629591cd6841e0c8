"""Ray's job server at one address, through Ray's own client."""

import asyncio
import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from histoscale.cluster.job import last_line, token_refused
from histoscale.cluster.submit import POLL_S, JobState, Log, Unreachable
from histoscale.errors import ClusterError

HTTP_TIMEOUT_S = 30.0

logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it tells of every closed connection
_STATUS = re.compile(r"status code (\d{3})")
_NOT_FOUND = 404
_HEADERS = "RAY_JOB_HEADERS"
# Either turns Ray's client to the cluster that it names, whatever address the client is given.
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class RayJobServer:
    """The job server of one cluster.

    Args:
        address: Its URL.
        entrypoint: Command line of the job that is submitted here.
        runtime_env: Its runtime environment; local folders in it are sent along.

    Raises:
        Unreachable: It does not answer.
        ClusterError: It answers, but not to us, or RAY_JOB_HEADERS is no JSON object of strings.
    """

    def __init__(self, address: str, entrypoint: str, runtime_env: Mapping[str, Any]) -> None:
        self._address = address
        self._entrypoint = entrypoint
        self._runtime_env = dict(runtime_env)
        for name in _OVERRIDES:
            os.environ.pop(name, None)
        headers = _headers()
        with self._reaching():
            try:
                self._client = _TimedClient(address, headers=headers)
            except RuntimeError as error:  # another service, such as the proxy of a head that is away
                raise Unreachable(last_line(error)) from error

    def state(self, submission_id: str) -> JobState | None:
        """What the server knows of a job, or None."""
        with self._reaching():
            try:
                job = self._client.get_job_info(submission_id)
            except RuntimeError as error:
                if _status_in(error) == _NOT_FOUND:
                    return None
                raise
        return JobState(str(job.status), job.entrypoint, job.driver_exit_code, job.message or "")

    def submit(self, submission_id: str) -> None:
        """Start the job; its folders are sent along first.

        Raises:
            Unreachable: The server does not answer, or has no node to run the job on yet.
            ClusterError: The server refuses the job, or a folder cannot be sent.
        """
        with self._reaching():
            self._client.submit_job(
                entrypoint=self._entrypoint, submission_id=submission_id, runtime_env=self._runtime_env
            )

    def follow(self, submission_id: str, log: Log) -> None:
        """Pass the job's log on until the job has ended.

        The job's state is asked for beside the log: a connection that is cut between the machines ends no log.

        Raises:
            Unreachable: The server does not answer any more.
        """
        with self._reaching():
            asyncio.run(self._follow(submission_id, log))
            with contextlib.suppress(RuntimeError):  # the log of a node that is gone
                log.show(self._client.get_job_logs(submission_id), 0)

    async def _follow(self, submission_id: str, log: Log) -> None:
        tail = asyncio.create_task(self._tail(submission_id, log))
        try:
            while not (await asyncio.to_thread(self._client.get_job_info, submission_id)).status.is_terminal():
                if tail.done():
                    tail = asyncio.create_task(self._tail(submission_id, log))
                await asyncio.sleep(POLL_S)
        finally:
            tail.cancel()

    async def _tail(self, submission_id: str, log: Log) -> None:
        position = 0
        # Whether the job is lost is not the log's to say.
        with contextlib.suppress(aiohttp.ClientError, OSError, RuntimeError):
            async for text in self._client.tail_job_logs(submission_id):
                position = log.show(text, position)

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            raise token_refused("the job server", self._address) from error
        except (requests.ConnectionError, requests.Timeout, ConnectionError, TimeoutError) as error:
            raise Unreachable(type(error).__name__) from error
        except (requests.HTTPError, requests.JSONDecodeError, LookupError) as error:  # likewise a proxy's answers
            raise Unreachable(last_line(error)) from error
        except (RuntimeError, ValueError, OSError) as error:
            status = _status_in(error)
            if status is not None and status >= 500:  # a head that has just started answers so
                raise Unreachable(f"status {status}: {last_line(error)}") from error
            raise ClusterError(
                "the job server does not take the job",
                value=last_line(error),
                expected=f"a job that {self._address} accepts",
                remedy="correct the runtime environment, the folders in it or the address",
            ) from error


class _TimedClient(JobSubmissionClient):
    """Ray's client waits for an answer for ever; this one does not."""

    def _do_request(self, method: str, endpoint: str, **keywords: Any) -> requests.Response:  # noqa: ANN401
        return super()._do_request(method, endpoint, **{"timeout": HTTP_TIMEOUT_S, **keywords})


def _headers() -> dict[str, str]:
    """What `ray job` sends with each request, too: for a gateway before the job server."""
    text = os.environ.get(_HEADERS, "{}")
    try:
        headers = json.loads(text)
    except json.JSONDecodeError:
        headers = None
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise ClusterError(
            f"{_HEADERS} cannot be used",
            value=f"{len(text)} characters, not shown, for they may hold a secret",
            expected='a JSON object of strings, such as {"X-Gateway": "VALUE"}',
            remedy=f"correct {_HEADERS}, or unset it",
        )
    return headers


def _status_in(error: Exception) -> int | None:
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None
