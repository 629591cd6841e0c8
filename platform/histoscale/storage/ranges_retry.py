"""When a request to a server is tried again, and what obstore's errors mean in boto3's words. Pure."""

import re

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
    TokenRetrievalError,
)
from obstore import exceptions

from histoscale.storage import s3_errors

TRIES = 8
TOTAL_S = 60.0  # no try starts later than this after the first
FIRST_PAUSE_S = 0.4
_LONGEST_PAUSE_S = 20.0

_STATUS = re.compile(r"Server returned non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_NOT_PARTIAL = re.compile(r"non-partial|NotPartial", re.IGNORECASE)
_TRANSIENT_STATUS = {408, 429, 500, 502, 503, 504, 507, 509, 520, 522, 524}
_TRANSIENT_CODE = {
    "InternalError",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    # Between two requests the session renews its credentials.
    "ExpiredToken",
    "RequestExpired",
    "TokenRefreshRequired",
}
_TRANSIENT_ERRORS = (
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    TokenRetrievalError,
)
OTHER_REGION = "PermanentRedirect"
WHOLE_OBJECT = "WholeObject"  # our word beside S3's


def pause_s(failures: int, uniform: float) -> float:
    """Seconds to wait after a number of failures: exponential, the second half of it by chance.

    All of them together are 22 to 45 s: a server that is away for 20 s is always waited for.

    Args:
        failures: Tries that failed so far, at least 1.
        uniform: A draw from [0, 1).
    """
    return (0.5 + uniform / 2.0) * min(_LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (failures - 1))


def may_try_again(error: ClientError | BotoCoreError, failures: int, elapsed_s: float) -> bool:
    """Whether a failed read is worth another try.

    Args:
        error: Why the last try failed.
        failures: Tries that failed so far, that one included.
        elapsed_s: Seconds since the first try began.
    """
    return failures < TRIES and elapsed_s < TOTAL_S and is_transient(error)


def is_transient(error: ClientError | BotoCoreError) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status in _TRANSIENT_STATUS or s3_errors.code(error) in _TRANSIENT_CODE
    return isinstance(error, _TRANSIENT_ERRORS) and not isinstance(error, SSLError)


def in_boto_terms(error: Exception, endpoint: str) -> ClientError | BotoCoreError:
    """boto3's error for one of obstore's, which says all but its kind in a text; holds nothing of that text but codes.

    Args:
        error: An error of obstore's, or the FileNotFoundError that it raises for status 404.
        endpoint: URL of the server.
    """
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return refusal("NoSuchBucket" if "<Code>NoSuchBucket</Code>" in text else "NoSuchKey", 404)
    if isinstance(error, exceptions.PreconditionError):
        return refusal("PreconditionFailed", 412)
    if status := _STATUS.search(text):
        code = _CODE.search(text)
        return refusal(code[1] if code else status[1], int(status[1]))
    if isinstance(error, exceptions.UnauthenticatedError):
        return CredentialRetrievalError(provider="boto3", error_msg="the session gives none")
    if _NOT_PARTIAL.search(text):
        return refusal(WHOLE_OBJECT, 200)
    if "Received redirect" in text:
        return refusal(OTHER_REGION, 301)
    if "error: InvalidCertificate(" in text:
        return SSLError(endpoint_url=endpoint, error=ValueError("certificate"))
    if "source: TimedOut" in text:
        return ReadTimeoutError(endpoint_url=endpoint)
    if "response body error" in text:
        return ResponseStreamingError(error="the answer broke off")
    return EndpointConnectionError(endpoint_url=endpoint)


def refusal(code: str, status: int) -> ClientError:
    """A server's refusal, as boto3 tells it: S3's word and the HTTP status."""
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # type: ignore[typeddict-item]  # the stub wants every field
