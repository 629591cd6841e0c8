"""What boto3's errors mean, and what to do about each."""

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
    TokenRetrievalError,
)

from histoscale.errors import StorageError

_WRONG_CREDENTIALS = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_DENIED = {"403", "AccessDenied", "AccountProblem", "AllAccessDisabled", "Forbidden"}
_SLOW_DOWN = {
    "429",
    "503",
    "RequestLimitExceeded",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}
# What a server that is away for a while says, or the one before it.
_AWAY = {"408", "500", "502", "504", "InternalError", "RequestTimeout", "RequestTimeTooLong"}
_FULL = {"507", "QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"}
_CREDENTIAL_ERRORS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    TokenRetrievalError,
)


def code(error: Exception) -> str:
    """S3's word for a refusal, or the bare HTTP status where the answer had no body; "" for boto3's own errors."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def is_missing_key(error: Exception) -> bool:
    """Whether there is no such object."""
    return code(error) in {"404", "NoSuchKey", "NotFound"}


def is_precondition(error: Exception) -> bool:
    """Whether If-Match or If-None-Match failed."""
    return code(error) in {"412", "PreconditionFailed"}


def is_conflict(error: Exception) -> bool:
    """Whether another conditional write is under way."""
    return code(error) in {"409", "ConditionalRequestConflict"}


def is_not_implemented(error: Exception) -> bool:
    """Whether the server knows no such header."""
    return code(error) in {"501", "NotImplemented"}


def is_past_end(error: Exception) -> bool:
    """Whether a range starts at or after the object's end."""
    return code(error) in {"416", "InvalidRange", "RequestedRangeNotSatisfiable"}


def is_passing(error: Exception) -> bool:
    """Whether a server refuses because it is overloaded or away, which passes when nobody changes anything."""
    if not isinstance(error, ClientError) or code(error) in _FULL or is_not_implemented(error):
        return False
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or is_passing_code(code(error))


def is_passing_code(word: str) -> bool:
    """As `is_passing`, of S3's word alone."""
    return word in _SLOW_DOWN or word in _AWAY


def no_bucket(bucket: str, root: str) -> StorageError:
    """The error for a bucket that does not exist."""
    return StorageError(
        f"bucket {bucket!r} does not exist",
        value=root,
        remedy="create it, or correct the URI or AWS_ENDPOINT_URL",
    )


def no_client(error: Exception, root: str) -> StorageError:
    """The error for AWS settings from which boto3 can make no client."""
    if isinstance(error, ProfileNotFound):
        return StorageError(f"{root} cannot be reached: {error}", remedy="set AWS_PROFILE to a profile that exists")
    return StorageError(
        f"{root} cannot be reached: boto3 cannot use the AWS settings ({error})",
        expected="AWS_ENDPOINT_URL, where set, to be a URL such as https://host:9000",
        remedy="check the variables AWS_* and ~/.aws/config",
    )


def diagnosis(error: ClientError | BotoCoreError, bucket: str, root: str, endpoint: str) -> StorageError:
    """The error for a failed request; holds no key, for boto3's texts may."""
    if isinstance(error, ClientError):
        return _refusal(error, bucket, root)
    if isinstance(error, _CREDENTIAL_ERRORS):
        return StorageError(
            f"there are no AWS credentials for {root}",
            remedy="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, on every node",
        )
    if isinstance(error, ParamValidationError):
        return StorageError(
            f"{bucket!r} is no valid bucket, or a key is too long",
            value=root,
            expected="a bucket of 3 to 63 lower-case letters, digits, dots and hyphens, and keys up to 1024 bytes",
        )
    if isinstance(error, SSLError):
        return StorageError(
            f"the certificate of {endpoint} is not trusted", remedy="point AWS_CA_BUNDLE to the certificate authority"
        )
    if isinstance(error, ConnectionError | HTTPClientError):
        return StorageError(
            f"{endpoint} cannot be reached for {root}",
            value=type(error).__name__,
            remedy="check AWS_ENDPOINT_URL, the network and whether the server runs",
            transient=True,
        )
    return StorageError(f"boto3 cannot use {root}", value=type(error).__name__, remedy="check the variables AWS_*")


def _refusal(error: ClientError, bucket: str, root: str) -> StorageError:
    word = code(error)
    if word == "NoSuchBucket":
        return no_bucket(bucket, root)
    if word in _WRONG_CREDENTIALS:
        return StorageError(
            f"the server refuses the AWS credentials for {root}",
            value=word,
            remedy="check the access key, its secret, its expiry and the region",
        )
    if word in _DENIED:
        return StorageError(
            f"access to {root} is denied",
            value=word,
            remedy="check the credentials, and that they allow s3:ListBucket, s3:GetObject, s3:PutObject and "
            f"s3:DeleteObject on bucket {bucket!r}",
        )
    if word in _SLOW_DOWN:
        return StorageError(
            f"the server of {root} is overloaded, after every retry",
            value=word,
            remedy="use fewer readers",
            transient=True,
        )
    if word in _FULL:
        return StorageError(
            f"the server of {root} has no room left", value=word, remedy="make room, or raise the quota"
        )
    if word == "RequestTimeTooSkewed":
        return StorageError(f"the clock of this machine differs from that of {root}", remedy="synchronise the clocks")
    return StorageError(
        f"the server refuses a request to {root}",
        value=word,
        remedy="see the server's log",
        transient=is_passing(error),
    )
