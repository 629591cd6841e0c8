"""The real S3 server of the tests, for benchmarks: OpenStack Swift on loopback, ended with the block."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from histoscale.errors import ClusterError

_SERVE = Path("tests/swift/serve.py")


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Start a server and point this process's AWS_* variables to it; gives its endpoint.

    Raises:
        ClusterError: The server does not start, or this is not the root of the repository.
    """
    if not _SERVE.exists():
        raise ClusterError(
            f"{_SERVE} is not there", value=os.getcwd(), expected="the root of the repository as working directory"
        )
    command = [sys.executable, str(_SERVE)]
    # The server ends when its standard input closes, so it cannot outlive this process, however that ends.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        if process.stdin is None or process.stdout is None:
            raise ClusterError("no pipes to the S3 server")
        answer = json.loads(process.stdout.readline() or '{"error": "the S3 server ended without a word"}')
        if "error" in answer:
            raise ClusterError("the S3 server does not start", value=answer["error"])
        try:
            with environment(
                {
                    "AWS_ENDPOINT_URL": answer["endpoint"],
                    "AWS_ACCESS_KEY_ID": answer["access_key"],
                    "AWS_SECRET_ACCESS_KEY": answer["secret_key"],
                    "AWS_DEFAULT_REGION": answer["region"],
                    "AWS_CONFIG_FILE": os.devnull,
                    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                    "AWS_EC2_METADATA_DISABLED": "true",
                }
            ):
                yield str(answer["endpoint"])
        finally:
            process.stdin.close()
            process.wait(timeout=30)


@contextlib.contextmanager
def environment(variables: Mapping[str, str], *, keep: bool = False) -> Iterator[None]:
    """Set variables of this process, which Ray's workers inherit; every other AWS_* one is taken away unless kept."""
    before = {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name in variables}
    for name in () if keep else before:
        del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)
