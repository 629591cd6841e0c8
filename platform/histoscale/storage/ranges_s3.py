"""Byte ranges of objects in a bucket: many conditional GETs at once, through obstore, in one thread per process."""

import asyncio
import atexit
import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import botocore.session
import obstore
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    ResponseStreamingError,
)
from obstore.exceptions import BaseError
from obstore.store import S3Store as ObstoreS3

from histoscale.errors import StorageError
from histoscale.storage import ranges_retry, s3_errors
from histoscale.storage.local import diagnosed_files
from histoscale.storage.ranges_core import (
    RangeRequest,
    RangeStats,
    check_in_flight,
    check_request,
    check_usable,
    gone,
    replaced,
    too_short,
)

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from mypy_boto3_s3 import S3Client
    from obstore.store import ClientConfig, S3Credential

_CONNECT_TIMEOUT_S = 5
_REQUEST_TIMEOUT_S = 30
_CREDENTIALS_LAST_S = 60
# obstore can ask for nothing else: it refuses empty names of folders, dots and control characters, and takes slashes
# from the ends.
_COMPONENT = r"(?!\.{1,2}(?:/|\Z))[^/\x00-\x1f\x7f]+"
_PLAIN_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class _Answer:
    """The body of an answer, and what its headers say: the end of the range, the object's size and its ETag."""

    body: bytes
    end: int
    size_bytes: int
    etag: str | None


class S3Ranges:
    """The ranges of the objects under a prefix of a bucket; see `RangeReader` for what the methods promise.

    A read is tried up to 8 times within a minute, with exponential backoff and jitter; each try has half a minute,
    so what is larger than a few hundred megabytes goes in several requests.

    Args:
        bucket: Name of the bucket; `AWS_ENDPOINT_URL` or the AWS profile says at which server.
        prefix: Folder in the bucket without slashes at its ends; "" is the whole bucket.
        in_flight: Most GETs at once, over all callers.

    Raises:
        StorageError: There are no credentials, or the AWS settings cannot be used.
    """

    def __init__(self, bucket: str, prefix: str, in_flight: int) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._in_flight = check_in_flight(in_flight)
        self._root = f"s3://{bucket}/{prefix}".rstrip("/")
        self._opener_pid = os.getpid()
        self._boto, self._obstore = _clients(bucket, self._root)
        self._slots = asyncio.Semaphore(in_flight)
        self._closed = False
        self._open: set[Future[list[bytes]]] = set()
        self._stats = RangeStats(0, 0, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Ranges, (self._bucket, self._prefix, self._in_flight)

    def submit(self, requests: Sequence[RangeRequest]) -> "Future[list[bytes]]":
        """Start to read, in the thread of this process."""
        check_usable(self._root, self._opener_pid, closed=self._closed)
        future = asyncio.run_coroutine_threadsafe(self._fetch_all(tuple(requests)), _loop(self._root))
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def fetch(self, requests: Sequence[RangeRequest]) -> list[bytes]:
        """Read, and wait for the result."""
        return self.submit(requests).result()

    @property
    def stats(self) -> RangeStats:
        """What was done so far."""
        return self._stats

    def close(self) -> None:
        """Cancel what is under way."""
        self._closed = True
        for future in list(self._open):
            future.cancel()

    async def _fetch_all(self, requests: Sequence[RangeRequest]) -> list[bytes]:
        tasks = [asyncio.create_task(self._fetch(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _fetch(self, request: RangeRequest) -> bytes:
        check_request(request, self._root)
        if request.length == 0:
            return b""
        began_s = time.monotonic()
        failures = 0
        while True:
            try:
                async with self._slots:
                    if self._closed:
                        raise asyncio.CancelledError  # one whose turn came because another was cancelled
                    return await self._get(request)
            except (ClientError, BotoCoreError) as error:
                failure = error
            failures += 1
            if not ranges_retry.may_try_again(failure, failures, time.monotonic() - began_s):
                raise self._diagnosis(failure, failures)
            self._count(retries=1)
            await asyncio.sleep(ranges_retry.pause_s(failures, random.random()))

    async def _get(self, request: RangeRequest) -> bytes:
        """One try.

        Raises:
            ObjectChanged: The answer tells of another object.
            ClientError: The server refuses.
            BotoCoreError: There is no answer, or only a part of it.
        """
        name = f"{self._prefix}/{request.key}" if self._prefix else request.key
        self._count(requests=1)
        if _PLAIN_NAME.fullmatch(name):
            answer = await self._get_through_obstore(name, request)
        else:
            answer = await asyncio.to_thread(self._get_through_boto, name, request)
        # Some servers take no notice of If-Match.
        if answer.etag is not None and answer.etag.strip('"') != request.etag:
            raise replaced(self._root)
        if answer.end == answer.size_bytes < request.start + request.length:
            raise too_short(self._root)
        if len(answer.body) != request.length:
            raise IncompleteReadError(actual_bytes=len(answer.body), expected_bytes=request.length)
        self._count(received_bytes=request.length)
        return answer.body

    async def _get_through_obstore(self, name: str, request: RangeRequest) -> _Answer:
        end = request.start + request.length
        try:
            result = await obstore.get_async(
                self._obstore, name, options={"range": (request.start, end), "if_match": f'"{request.etag}"'}
            )
            body = bytes(await result.bytes_async())
        except (BaseError, FileNotFoundError) as error:
            failure = ranges_retry.in_boto_terms(error, self._boto.meta.endpoint_url)
        else:
            meta = result.meta
            return _Answer(body, result.range[1], meta["size"], meta["e_tag"])
        raise failure

    def _get_through_boto(self, name: str, request: RangeRequest) -> _Answer:
        wanted = f"bytes={request.start}-{request.start + request.length - 1}"
        answer = self._boto.get_object(Bucket=self._bucket, Key=name, Range=wanted, IfMatch=f'"{request.etag}"')
        part = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
        with contextlib.closing(answer["Body"]) as body:
            if part is None:
                raise ranges_retry.refusal(ranges_retry.WHOLE_OBJECT, 200)
            return _Answer(body.read(), int(part[2]) + 1, int(part[3]), answer.get("ETag"))

    def _count(self, requests: int = 0, received_bytes: int = 0, retries: int = 0) -> None:
        old = self._stats  # only the background thread writes
        self._stats = RangeStats(old.requests + requests, old.bytes + received_bytes, old.retries + retries)

    def _diagnosis(self, error: ClientError | BotoCoreError, failures: int) -> StorageError:
        """The error for a read that is given up; holds no key."""
        if s3_errors.is_precondition(error):
            return replaced(self._root)
        if s3_errors.is_missing_key(error):
            return gone(self._root)
        if s3_errors.is_past_end(error):
            return too_short(self._root)
        if s3_errors.code(error) == ranges_retry.WHOLE_OBJECT:
            return StorageError(
                f"the server of {self._root} answers a request for a range with the whole object",
                expected="status 206",
                remedy="use a server, or a proxy before it, that knows ranges",
            )
        if s3_errors.code(error) == ranges_retry.OTHER_REGION:
            return StorageError(
                f"the bucket of {self._root} lies in another region",
                value=self._boto.meta.region_name,
                remedy="set AWS_DEFAULT_REGION to the bucket's region",
            )
        if isinstance(error, IncompleteReadError | ResponseStreamingError):
            return StorageError(
                f"an object of {self._root} broke off {failures} times while it was read",
                remedy="check the network and the load of the server",
                transient=True,
            )
        return s3_errors.diagnosis(error, self._bucket, self._root, self._boto.meta.endpoint_url)


class _Credentials:
    """Credentials for obstore out of a boto3 session, which renews them when it wants to."""

    def __init__(self, credentials: "Credentials") -> None:
        self._credentials = credentials

    def __call__(self) -> "S3Credential":
        """The credentials of now; obstore keeps none for long that are this close to their end, and asks again."""
        frozen = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key or "",
            "secret_access_key": frozen.secret_key or "",
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=_CREDENTIALS_LAST_S),
        }


def _clients(bucket: str, root: str) -> "tuple[S3Client, ObstoreS3]":
    """Clients of boto3 and of obstore for one server, with the same credentials; neither retries.

    The bucket stands in the path of the URL, which every server understands, those of AWS included.
    """
    core = botocore.session.Session()
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_REQUEST_TIMEOUT_S,
        user_agent_extra="histoscale",
        s3={"addressing_style": "path"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        boto: S3Client = boto3.Session(botocore_session=core).client("s3", config=config)
        credentials = core.get_credentials()
    except (BotoCoreError, ValueError) as error:
        raise s3_errors.no_client(error, root) from error
    endpoint = boto.meta.endpoint_url
    if credentials is None:
        raise s3_errors.diagnosis(NoCredentialsError(), bucket, root, endpoint)
    options: ClientConfig = {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
        "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
        "user_agent": "histoscale",
    }
    if authority := core.get_config_variable("ca_bundle"):
        with diagnosed_files("the certificate authority in AWS_CA_BUNDLE", private=False):
            options["root_certificate"] = Path(authority).read_bytes()
    return boto, ObstoreS3(
        bucket,
        endpoint=endpoint,
        region=boto.meta.region_name,
        virtual_hosted_style_request=False,
        credential_provider=_Credentials(credentials),
        client_options=options,
        retry_config={"max_retries": 0},
    )


class _Background:
    """A thread with an event loop that runs until the process ends."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="ranges", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def _stop(self) -> None:
        """Cancel what still runs: a callback of obstore's into an interpreter that is gone would be fatal."""
        if self.pid == os.getpid():
            asyncio.run_coroutine_threadsafe(_cancel_all(), self.loop).result()
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


_starting = threading.Lock()


@cache
def _background() -> _Background:
    return _Background()


def _loop(root: str) -> asyncio.AbstractEventLoop:
    """The event loop of this process.

    Raises:
        StorageError: This process was forked from one that has such a loop: neither its thread nor obstore's are here.
    """
    with _starting:
        background = _background()
    check_usable(root, background.pid, closed=False)
    return background.loop
