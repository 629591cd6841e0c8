"""A small archive of large slides of real tissue in a real S3 server, with its index: what benchmarks read from."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config

from histoscale.bench.ray_local import local_ray
from histoscale.bench.s3_server import s3_server
from histoscale.errors import DatasetError
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.build import build_index
from histoscale.slides.catalogue import open_catalogue
from histoscale.slides.tile_check import TileCheck
from histoscale.stream.reader import ReaderSpec

_SHARED = Path("../shared")
_TOOL = _SHARED / "tools" / "make_large_slide.py"
_SECTIONS = _SHARED / "data" / "sections"
MIX = ((0.25, 0.2), (0.5, 0.4), (1.0, 0.2), (2.0, 0.2))
"""The four magnifications of Virchow2 and their shares."""


@dataclass(frozen=True)
class Archive:
    """Slides in a bucket, the same files here, and the index.

    Attributes:
        endpoint: Of the S3 server.
        slides_uri: Root of the slides.
        paths: Slide id -> the file that was uploaded.
        index_uri: Their index, in a folder.
        snapshot_id: The snapshot of it.
        folder: A scratch folder.
    """

    endpoint: str
    slides_uri: str
    paths: dict[str, Path]
    index_uri: str
    snapshot_id: str
    folder: Path

    def reader(self, tiles_per_step: int = 64, replicas: int = 8) -> ReaderSpec:
        """Four magnifications, regions of 392 px, chapters of 32 tiles, visits of four."""
        plan = PlanSpec(
            seed=0,
            tiles=10**9,
            tiles_per_step=tiles_per_step,
            replicas=replicas,
            chapter_steps=4,
            tiles_per_visit=4,
            region_px=392,
            mix=MIX,
            max_upsample=1.1,
            min_tissue=0.4,
        )
        check = TileCheck(0.0, 0.0)  # the baseline has no such test, and the fixtures' glass is of no interest here
        return ReaderSpec(self.index_uri, self.snapshot_id, plan, {}, check, self.folder / "copies", 2**30)


@contextlib.contextmanager
def large_archive(slides: int = 2, grid: int = 4) -> Iterator[Archive]:
    """Make, upload and index slides of about 100 MB each (at grid 4), scanned at 0.25 um/px.

    Raises:
        DatasetError: The sections that they are made of are not there.
    """
    sections = sorted(_SECTIONS.glob("*.jpg"))
    if not sections or not _TOOL.exists():
        raise DatasetError("no sections to make slides of", value=str(_SECTIONS), expected="whole sections as JPEG")
    with tempfile.TemporaryDirectory(prefix="histoscale-bench-") as name, s3_server() as endpoint:
        folder = Path(name)
        files = [folder / f"large-{n}.svs" for n in range(slides)]
        for n, file in enumerate(files):
            turned = sections[n % len(sections) :] + sections[: n % len(sections)]
            command = [sys.executable, *map(os.fspath, (_TOOL, file, *turned)), "--grid", str(grid), "--mpp", "0.25"]
            subprocess.run(command, check=True, stdout=sys.stderr)
        _upload(endpoint, files)
        with local_ray(cpus=2):
            build_index("s3://slides", str(folder / "index"))
        catalogue = open_catalogue(str(folder / "index"))
        by_size = {file.stat().st_size: file for file in files}
        paths = {catalogue.slide_id(row): by_size[int(entry["size_bytes"])] for row, entry in enumerate(catalogue.rows)}
        yield Archive(endpoint, "s3://slides", paths, str(folder / "index"), catalogue.snapshot_id, folder)


def _upload(endpoint: str, files: list[Path]) -> None:
    client = boto3.Session().client("s3", endpoint_url=endpoint, config=Config(s3={"addressing_style": "path"}))
    client.create_bucket(Bucket="slides")
    for file in files:
        client.upload_file(os.fspath(file), "slides", file.name)
