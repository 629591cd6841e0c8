"""A bucket as a store, through boto3: any S3-compatible endpoint, credentials as boto3 finds them."""

import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError

from histoscale.errors import StorageError
from histoscale.storage import s3_errors
from histoscale.storage.joined import joined
from histoscale.storage.local import atomic_file, diagnosed_files
from histoscale.storage.s3_retry import retry_requests
from histoscale.storage.store import (
    ObjectInfo,
    check_key,
    check_range,
    name_object,
    object_changed,
    object_missing,
    range_past_end,
    refuse_root,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ObjectIdentifierTypeDef

_log = logging.getLogger(__name__)

_BODY_ATTEMPTS = 4  # botocore retries no answer whose body breaks off
_CONFLICT_ATTEMPTS = 6  # S3 answers 409 while another conditional write or delete is under way
_CONFLICT_PAUSE_S = 0.5
_CONNECT_TIMEOUT_S = 10
_READ_TIMEOUT_S = 60
_CONNECTIONS = 32
_PAGE_KEYS = 1000  # most that S3 gives or deletes at once
_PART_BYTES = 16 * 1024**2
_PARTS_AT_ONCE = 4
_OWNERS_FILE = 0o600
_TRANSFER = TransferConfig(
    multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE
)


class S3Store:
    """The objects under a prefix of a bucket; see `Store` for what the methods promise.

    Args:
        bucket: Name of the bucket; `AWS_ENDPOINT_URL` or the AWS profile says at which server.
        prefix: Folder in the bucket without slashes at its ends; "" is the whole bucket.
        private: Errors show no key, and hide boto3's own error, which may.

    Raises:
        StorageError: The URI names no bucket.
    """

    def __init__(self, bucket: str, prefix: str, *, private: bool = False) -> None:
        if not bucket:
            raise StorageError("the URI names no bucket", value="s3://", expected="s3://bucket/prefix")
        self._bucket = bucket
        self._folder = f"{prefix}/" if prefix else ""
        self._private = private

    @property
    def uri(self) -> str:
        """The URI of the prefix."""
        return f"s3://{self._bucket}/{self._folder}".rstrip("/")

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object below a prefix, page by page; the empty objects that consoles make as folders are left out."""
        for info in self._everything(prefix):
            if not info.key.endswith("/"):
                yield info

    def get(self, key: str) -> bytes:
        """The whole object."""
        return self._read(key, {})

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Part of an object, in one request."""
        check_range(start, length, self.uri)
        # HTTP has no empty range; one byte tells as well whether the start lies in the object.
        piece = self._read(key, {"Range": f"bytes={start}-{start + max(length, 1) - 1}"})
        return piece[:length]

    def put(self, key: str, data: bytes) -> None:
        """Write or replace an object in one request."""
        name = self._name(key)
        try:
            self._s3().put_object(Bucket=self._bucket, Key=name, Body=data)
        except (ClientError, BotoCoreError) as error:
            raise self._diagnosis(error, key) from self._cause(error)

    def put_parts(self, key: str, parts: Sequence[memoryview]) -> None:
        """Write or replace an object straight from memory, several pieces at once where it is large."""
        name = self._name(key)
        try:
            self._s3().upload_fileobj(joined(parts), self._bucket, name, Config=_TRANSFER)
        except (ClientError, BotoCoreError) as error:
            raise self._diagnosis(error, key) from self._cause(error)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one, by `If-None-Match: *`; as atomic as the server's own check.

        A server that has no conditional writes is asked first and written to afterwards. One that ignores the header
        cannot be told from one that obeys it.
        """
        for _ in range(_CONFLICT_ATTEMPTS):
            try:
                self._s3().put_object(Bucket=self._bucket, Key=self._name(key), Body=data, IfNoneMatch="*")
            except (ClientError, BotoCoreError) as error:
                if s3_errors.is_precondition(error):
                    return False
                if s3_errors.is_not_implemented(error):
                    return self._put_after_asking(key, data)
                if not s3_errors.is_conflict(error):
                    raise self._diagnosis(error, key) from self._cause(error)
            else:
                return True
            time.sleep(random.uniform(0, _CONFLICT_PAUSE_S))
        raise StorageError(
            f"{name_object(key, self.uri, private=self._private)} is being written by others again and again",
            remedy="find out which jobs share this folder, and try again",
        )

    def exists(self, key: str) -> bool:
        """Whether there is an object of this key; a bucket that does not exist is an error all the same."""
        return self._head(key) is not None

    def delete(self, key: str) -> None:
        """Remove an object."""
        name = self._name(key)
        try:
            self._s3().delete_object(Bucket=self._bucket, Key=name)
        except (ClientError, BotoCoreError) as error:
            if not s3_errors.is_missing_key(error):
                raise self._diagnosis(error, key) from self._cause(error)

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object below a prefix, a thousand per request."""
        refuse_root(prefix, self.uri)
        batch: list[ObjectIdentifierTypeDef] = []
        for info in self._everything(prefix):
            batch.append({"Key": self._folder + info.key})
            if len(batch) == _PAGE_KEYS:
                self._delete_batch(batch)
                batch = []
        if batch:
            self._delete_batch(batch)

    def download(self, key: str, path: Path, etag: str | None = None) -> None:
        """Copy an object to a file, several parts at once, all of them of the same version."""
        head = self._head(key)
        if head is None:
            raise object_missing(key, self.uri, private=self._private)
        if etag is not None and head.etag != etag:
            raise object_changed(key, self.uri, private=self._private)
        starts = range(0, head.size_bytes, _PART_BYTES)
        with (
            diagnosed_files(f"a copy in {path.parent}", private=self._private),
            atomic_file(path, _OWNERS_FILE) as file,
            ThreadPoolExecutor(_PARTS_AT_ONCE) as pool,
        ):
            os.ftruncate(file.fileno(), head.size_bytes)
            for _ in pool.map(partial(self._copy_part, head, file.fileno()), starts):
                pass

    def upload(self, path: Path, key: str) -> None:
        """Copy a file to an object, in several parts where it is large."""
        name = self._name(key)
        with diagnosed_files(f"the file to upload, in {path.parent},", private=self._private):
            path.open("rb").close()
        try:
            self._s3().upload_file(str(path), self._bucket, name, Config=_TRANSFER)
        except S3UploadFailedError as error:
            refused = error.__context__
            if not isinstance(refused, ClientError | BotoCoreError):
                raise
            raise self._diagnosis(refused, key) from self._cause(refused)
        except (ClientError, BotoCoreError) as error:
            raise self._diagnosis(error, key) from self._cause(error)

    def local_path(self, key: str) -> Path | None:  # noqa: ARG002 - as of every store
        """None: the objects are on a server."""
        return None

    def _put_after_asking(self, key: str, data: bytes) -> bool:
        _log.warning("the server of %s has no conditional writes: one job at a time may use it", self.uri)
        if self.exists(key):
            return False
        self.put(key, data)
        return True

    def _everything(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = self._folder + (f"{prefix.strip('/')}/" if prefix.strip("/") else "")
        pages = self._s3().get_paginator("list_objects_v2")
        try:
            for page in pages.paginate(Bucket=self._bucket, Prefix=folder, PaginationConfig={"PageSize": _PAGE_KEYS}):
                for entry in page.get("Contents", []):
                    key = entry["Key"][len(self._folder) :]
                    if key:
                        yield ObjectInfo(key, entry["Size"], entry["ETag"].strip('"'))
        except (ClientError, BotoCoreError) as error:
            raise self._diagnosis(error, prefix) from self._cause(error)

    def _head(self, key: str) -> ObjectInfo | None:
        """Size and ETag of an object; None when the bucket exists and the object does not."""
        name = self._name(key)
        try:
            answer = self._s3().head_object(Bucket=self._bucket, Key=name)
        except (ClientError, BotoCoreError) as error:
            if not s3_errors.is_missing_key(error):
                raise self._diagnosis(error, key) from self._cause(error)
        else:
            return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'))
        # The answer to HEAD has no body to say which of the two is missing.
        try:
            self._s3().head_bucket(Bucket=self._bucket)
        except (ClientError, BotoCoreError) as error:
            if s3_errors.is_missing_key(error):
                raise s3_errors.no_bucket(self._bucket, self.uri) from self._cause(error)
            raise self._diagnosis(error, key) from self._cause(error)
        return None

    def _read(self, key: str, conditions: dict[str, str]) -> bytes:
        request: dict[str, Any] = {"Bucket": self._bucket, "Key": self._name(key), **conditions}
        broken: BotoCoreError | None = None
        for _ in range(_BODY_ATTEMPTS):
            try:
                body = self._s3().get_object(**request)["Body"]
            except (ClientError, BotoCoreError) as error:
                raise self._diagnosis(error, key) from self._cause(error)
            try:
                return body.read()
            except (HTTPClientError, IncompleteReadError) as error:
                broken = error
        raise StorageError(
            f"{name_object(key, self.uri, private=self._private)} broke off {_BODY_ATTEMPTS} times while it was read",
            remedy="check the network and the load of the server",
            transient=True,
        ) from (self._cause(broken) if broken else None)

    def _copy_part(self, head: ObjectInfo, descriptor: int, start: int) -> None:
        length = min(_PART_BYTES, head.size_bytes - start)
        part = self._read(head.key, {"Range": f"bytes={start}-{start + length - 1}", "IfMatch": f'"{head.etag}"'})
        if len(part) != length:
            raise object_changed(head.key, self.uri, private=self._private)
        os.pwrite(descriptor, part, start)

    def _delete_batch(self, batch: "Sequence[ObjectIdentifierTypeDef]") -> None:
        try:
            answer = self._s3().delete_objects(Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True})
        except (ClientError, BotoCoreError) as error:
            raise self._diagnosis(error, "") from self._cause(error)
        if refused := answer.get("Errors"):
            raise StorageError(
                f"{len(refused)} objects of {self.uri} cannot be deleted",
                value=str(refused[0].get("Code")),
                remedy="give the credentials the permission s3:DeleteObject",
                transient=all(s3_errors.is_passing_code(str(each.get("Code"))) for each in refused),
            )

    def _name(self, key: str) -> str:
        return self._folder + check_key(key, self.uri, private=self._private)

    def _cause(self, error: Exception) -> Exception | None:
        return None if self._private else error

    def _diagnosis(self, error: ClientError | BotoCoreError, key: str) -> StorageError:
        if s3_errors.is_precondition(error):
            return object_changed(key, self.uri, private=self._private)
        if s3_errors.is_past_end(error):
            return range_past_end(key, self.uri, private=self._private)
        if s3_errors.is_missing_key(error):
            return object_missing(key, self.uri, private=self._private)
        return s3_errors.diagnosis(error, self._bucket, self.uri, self._s3().meta.endpoint_url)

    def _s3(self) -> "S3Client":
        settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
        try:
            return _client(os.getpid(), settings)
        except (BotoCoreError, ValueError) as error:
            raise s3_errors.no_client(error, self.uri) from error


@lru_cache(maxsize=4)
def _client(pid: int, settings: tuple[tuple[str, str], ...]) -> "S3Client":  # noqa: ARG001 - what the cache goes by
    """The client that all stores and threads of a process share; a forked process must not share its sockets.

    A client takes tenths of a second to make, and a job opens a store per slide.
    """
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        max_pool_connections=_CONNECTIONS,
        user_agent_extra="histoscale",
    )
    session = boto3.Session()  # the default session is not safe between threads
    client: S3Client = session.client("s3", config=config)
    if ".amazonaws." not in (urlsplit(client.meta.endpoint_url).hostname or ""):
        # Servers other than AWS seldom have a host name per bucket, and not all know its newer checksums.
        compatible = Config(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        client = session.client("s3", config=config.merge(compatible))
    retry_requests(client)
    return client
