"""The whole path on real slides, submitted to a real head: from a folder, and from a real S3 server to S3."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from tests.conftest import S3Server
from tests.integration.jobs_at_work import TINY, run_to_the_end

from histoscale.cluster.local import HeadSize, LocalHead
from histoscale.slides.index import read_index, read_locations
from histoscale.storage import join, open_store

SLIDES = ["CMU-1-Small-Region.svs", "CMU-1-Small-Region-dicom", "TCGA-CR-7395-01A-01-TS1.svs"]
TCGA_SIDECAR = "slide,mpp\nTCGA-CR-7395-01A-01-TS1.svs,0.5\n"
# No slide of the three is finer than 0.499 um/px.
MIX = ["--set", "data.mix=[{mpp: 0.5, share: 2}, {mpp: 1, share: 1}, {mpp: 2, share: 1}]"]
SHORT = ["--set", "schedule.images=128", "--set", "checkpoint.every_steps=4"]


@dataclass(frozen=True)
class Place:
    """Where one pass of the path reads and writes."""

    root: str

    def __call__(self, *parts: str) -> str:
        return join(self.root, *parts)


@pytest.fixture(scope="module")
def head(s3_server: S3Server) -> Iterator[LocalHead]:
    import os

    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with LocalHead(HeadSize(8, 500_000_000), environment | s3_server.environment()) as running:
        yield running


@pytest.fixture(params=[pytest.param("folder", marks=pytest.mark.slow), "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, shared_data: Path, s3_env: S3Server) -> Place:
    """The three slides with a sidecar, and a few labelled tiles, in a folder or in a bucket."""
    folder = tmp_path / "place"
    for name in SLIDES:
        source = shared_data / "slides" / name
        if source.is_dir():
            shutil.copytree(source, folder / "slides" / name)
        else:
            (folder / "slides").mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / "slides" / name)
    for kind in ("Normal", "OSCC"):
        tiles = sorted((shared_data / "tiles" / "oral_oscc_cc0" / kind).iterdir())[:12]
        (folder / "tiles" / kind).mkdir(parents=True)
        for number, tile in enumerate(tiles):
            Image.open(tile).resize((56, 56)).save(folder / "tiles" / kind / f"{number}.png")
    if request.param == "folder":
        return Place(str(folder))
    root = f"s3://{s3_env.make_bucket()}/a hospital"
    store = open_store(root)
    for path in folder.rglob("*"):
        if path.is_file():
            store.upload(path, path.relative_to(folder).as_posix())
    return Place(root)


def test_slides_to_export(head: LocalHead, place: Place) -> None:
    index_job = ["python", "jobs/index.py", place("slides"), "--out", place("index")]
    text = run_to_the_end(head, index_job)
    assert "accepted: 2 slides" in text
    assert "1 x slide has no microns per pixel" in text
    assert "slide,mpp" in text

    open_store(place("slides")).put("slides.csv", TCGA_SIDECAR.encode())
    text = run_to_the_end(head, index_job)
    assert "accepted: 3 slides" in text
    assert "2 unchanged" in text
    index = read_index(open_store(place("index")))
    assert {record.mpp_origin for record in index.records} == {"vendor", "sidecar"}
    assert set(read_locations(open_store(place("index")))) == {record.slide_id for record in index.records}

    pretrain = ["python", "jobs/pretrain.py", "--index", place("index"), "--out", place("run")]
    text = run_to_the_end(head, [*pretrain, *TINY, *MIX, *SHORT])
    assert "0.5 um/px (20x): 50% of the tiles, 3 slides serve it" in text
    assert "complete: 8 steps" in text
    keys = [info.key for info in open_store(place("run")).list()]
    assert any(key.startswith("events/events.out.tfevents") for key in keys)
    assert "checkpoints/step-00000008.json" in keys
    assert "metrics.jsonl" in keys

    text = run_to_the_end(head, ["python", "jobs/evaluate.py", "--run", place("run"), "--dataset", place("tiles")])
    assert "pretrained" in text
    assert "colour statistics" in text

    export = ["python", "jobs/export.py", "--run", place("run"), "--format", "timm", "--out", place("export")]
    text = run_to_the_end(head, export)
    assert "largest difference of tokens between timm" in text
    assert "over 16 tiles: tiles of the run's own slides, from step 7" in text
    exported = {info.key for info in open_store(place("export")).list()}
    assert {"model.safetensors", "config.json", "README.md", "parity.json", "export.json"} <= exported

    probe = ["python", "jobs/evaluate.py", "--model", place("export"), "--dataset", place("tiles")]
    assert "pretrained" in run_to_the_end(head, [*probe, "--out", place("reports")])
