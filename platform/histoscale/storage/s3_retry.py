"""Requests of boto3's clients are tried again by the rules of `ranges_retry`, as byte ranges are.

botocore's own rules give a server that cannot be reached some three seconds, and a client as a whole a budget of
failures that a short outage spends.
"""

import os
import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from histoscale.storage import ranges_retry

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_TRIES = "AWS_MAX_ATTEMPTS"


def retry_requests(client: "S3Client") -> None:
    """Have a client that does not retry by itself do so; `AWS_MAX_ATTEMPTS` may ask for fewer or more tries.

    Raises:
        ValueError: `AWS_MAX_ATTEMPTS` is no number.
    """
    tries = int(os.environ.get(_TRIES, ranges_retry.TRIES))
    pause: Callable[..., Any] = partial(_pause_s, tries)  # the stub of `register` forgets that the answer counts
    client.meta.events.register("needs-retry.s3", pause, unique_id="histoscale-retry")


def _pause_s(
    tries: int,
    response: tuple[Any, dict[str, Any]] | None,
    attempts: int,
    caught_exception: Exception | None,
    **_: object,
) -> float | None:
    """Seconds until a request is sent again; None where it is not. The keywords are those of botocore's event."""
    error = caught_exception or _refusal(response)
    if attempts >= tries or not isinstance(error, ClientError | BotoCoreError) or not ranges_retry.is_transient(error):
        return None
    return ranges_retry.pause_s(attempts, random.random())


def _refusal(response: tuple[Any, dict[str, Any]] | None) -> ClientError | None:
    if response is None or response[0].status_code < 300:
        return None
    return ClientError(response[1], "request")  # type: ignore[arg-type]  # what botocore makes of it, too
