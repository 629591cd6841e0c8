"""A cluster that tests of several jobs share the making of; each module starts its own."""

import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import ray


@pytest.fixture(scope="module")
def cluster(s3_server: Any) -> Iterator[None]:
    """A cluster of two CPUs whose processes have the credentials of the S3 server."""
    folder = tempfile.mkdtemp(prefix="hsi", dir="/tmp")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**s3_server.environment(), "RAY_AUTH_MODE": "disabled"}.items():
            environment.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=2,
            _temp_dir=folder,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=2**28,
        )
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
