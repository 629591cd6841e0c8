"""Slides embedded by a cluster: as a loop does it, to a bucket, past bad slides and killed processes, and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tests.unit.embeddings_on_disk import exported_network, indexed

from histoscale.cluster import embedding_pipeline
from histoscale.cluster.embedding import EmbeddingPlan, EmbeddingSummary, embed_slides
from histoscale.cluster.embedding_pipeline import Workforce
from histoscale.cluster.slide_tasks import SlideTask, run_task
from histoscale.embeddings.files import SlideTiles, read_embedding
from histoscale.embeddings.folder import LEFT_OUT, MANIFEST, files_of, read_folder
from histoscale.embeddings.network import TileEmbedder
from histoscale.embeddings.progress import EmbeddingProgress
from histoscale.embeddings.reading import tiles_of
from histoscale.embeddings.selection import Selection
from histoscale.embeddings.slide_probe import ProbePlan
from histoscale.embeddings.tiling import Tiling
from histoscale.errors import ClusterError, EmbeddingError, SlideIndexError
from histoscale.slides.catalogue import open_catalogue
from histoscale.slides.exclusions import append_exclusion
from histoscale.slides.openslide_reader import open_slide
from histoscale.slides.synthetic import make_slides
from histoscale.storage import open_store

ROOT = Path(__file__).parents[2]
FORCE = Workforce(readers=1, embedders=1, device="cpu")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three synthetic slides, their index and an export."""
    folder = tmp_path_factory.mktemp("archive")
    make_slides(folder / "slides", count=3)
    indexed(folder / "slides", folder / "index")
    exported_network(folder / "export")
    return folder


def plan_of(archive: Path, out: str | Path, **changes: Any) -> EmbeddingPlan:
    settings: dict[str, Any] = {
        "index_uri": str(archive / "index"),
        "out_uri": str(out),
        "network": exported_network(archive / "export"),
        "tiling": Tiling.of(0.5, 56, None, 0.65),
        "embedding": "cls_mean",
        "dtype": "float32",
        "name": "m",
    }
    return EmbeddingPlan(**settings | changes)


def embed(plan: EmbeddingPlan, tell: Callable[[EmbeddingProgress], None] = lambda _: None) -> EmbeddingSummary:
    return embed_slides(plan, FORCE, tell)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def folder_of(out: Path) -> Path:
    return out / "20x_56px_0px_overlap" / "features_m"


@pytest.fixture(scope="module")
def undisturbed(cluster: None, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that nobody disturbed."""
    out = tmp_path_factory.mktemp("undisturbed")
    summary = embed(plan_of(archive, out))
    assert summary.folder_uri == str(folder_of(out))
    assert (summary.progress.done, summary.progress.before, summary.left_out) == (3, 0, ())
    return folder_of(out)


def test_two_real_slides_equal_a_loop_and_hold_no_name(cluster: None, shared_data: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    scales = {"CMU-1-Small-Region.svs": 0.499, "TCGA-CR-7395-01A-01-TS1.svs": 0.2525}
    for name in scales:
        (slides / name).write_bytes((shared_data / "slides" / name).read_bytes())
    catalogue = indexed(slides, tmp_path / "index", scales)
    network = exported_network(tmp_path / "export")
    tiling = Tiling.of(0.5, 224, None, 0.65)
    plan = plan_of(tmp_path, tmp_path / "out", network=network, tiling=tiling)
    summary = embed(plan)
    plain = TileEmbedder(network.load(), torch.device("cpu"), "cls_mean", "fp32", "float32")
    by_size = {path.stat().st_size: path for path in slides.glob("*.svs")}
    for row in range(2):
        path = by_size[int(catalogue.rows[row]["size_bytes"])]
        wanted = tiles_of(catalogue, row, tiling)
        assert isinstance(wanted, SlideTiles)
        found = read_embedding(open_store(summary.folder_uri), wanted.slide_id)
        np.testing.assert_array_equal(found.coords, wanted.coords)
        slide = open_slide(path, mpp=scales[path.name])
        for place, features in list(zip(found.coords.tolist(), found.features, strict=True))[::5]:
            tile = slide.read(*map(float, place), 224, 0.5)
            np.testing.assert_allclose(features, plain(tile[None])[0], atol=2e-3)
        stem = path.stem.encode()
        assert all(
            stem not in data and str(slides).encode() not in data
            for data in contents(Path(summary.folder_uri)).values()
        )


def test_a_second_job_has_nothing_to_do_and_other_settings_are_refused(archive: Path, undisturbed: Path) -> None:
    before = contents(undisturbed)
    out = undisturbed.parents[1]
    summary = embed(plan_of(archive, out))
    assert (summary.progress.done, summary.progress.before) == (0, 3)
    assert contents(undisturbed) == before
    with pytest.raises(EmbeddingError, match="holds other embeddings"):
        embed(plan_of(archive, out, dtype="float16"))
    with pytest.raises(EmbeddingError, match="tiles do not fit"):
        embed(plan_of(archive, out, tiling=Tiling.of(0.5, 57, None, 0.65)))
    assert contents(undisturbed) == before


def test_to_a_bucket_and_on_from_a_part_of_it(s3_server: Any, archive: Path, undisturbed: Path) -> None:
    uri = f"s3://{s3_server.make_bucket()}/out"
    summary = embed(plan_of(archive, uri, selection=Selection(limit=2)))
    store = open_store(summary.folder_uri)
    assert len(files_of(store)) == 2
    summary = embed(plan_of(archive, uri))
    assert (summary.progress.done, summary.progress.before) == (1, 2)
    assert {info.key: store.get(info.key) for info in store.list()} == contents(undisturbed)


def processes(name: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ray::{name}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("name", ["ReaderActor", "EmbedderActor"])
def test_a_killed_process_has_its_slides_done_again(
    name: str, archive: Path, undisturbed: Path, tmp_path: Path
) -> None:
    killed = []

    def kill_after_the_first(progress: EmbeddingProgress) -> None:
        if progress.done == 1 and not killed:
            (process,) = processes(name)
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)

    summary = embed(plan_of(archive, tmp_path), kill_after_the_first)
    assert killed
    assert summary.progress.done == 3
    assert contents(folder_of(tmp_path)) == contents(undisturbed)


def kill_a_reader(progress: EmbeddingProgress) -> None:
    """Kill the reader at the first slide that is done."""
    if (progress.done, progress.left_out) == (1, 0):
        for process in processes("ReaderActor"):
            process.send_signal(signal.SIGKILL)


def test_a_slide_whose_processes_die_again_and_again_is_left_out(
    cluster: None, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_pipeline, "_TRIES", 1)
    summary = embed(plan_of(archive, tmp_path, max_bad_slides=3, max_bad_share=1.0), kill_a_reader)
    assert summary.left_out
    assert {each.reason for each in summary.left_out} == {"the processes that read and embedded it died"}
    assert summary.progress.done + len(summary.left_out) == 3


def test_processes_that_only_die_end_the_job(
    cluster: None, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_pipeline, "_DEATHS_IN_A_ROW", 0)
    with pytest.raises(ClusterError, match="die before they have done anything"):
        embed(plan_of(archive, tmp_path), kill_a_reader)


def test_what_is_learnt_from_embeddings_is_told_and_so_is_what_cannot_be(undisturbed: Path, tmp_path: Path) -> None:
    plan = ProbePlan("t", seeds=1)
    lines: list[str] = []
    task = SlideTask(str(undisturbed), None, None, plan, clusters=2, sample=100, seed=0)
    found = run_task(task, "auto", lines.append)
    assert found[-1] == f"strata: {undisturbed}/clusters/2/clusters.csv"
    assert lines[-1].startswith("slides clustered: 3 of 3")
    shutil.rmtree(undisturbed / "clusters")
    with pytest.raises(SlideIndexError, match="the CSV of labels is not there"):
        run_task(replace(task, labels_uri=str(tmp_path / "labels.csv")), "cpu", lines.append)
    with pytest.raises(ClusterError, match="the cluster has no GPU"):
        run_task(task, "cuda", lines.append)


def test_a_job_that_is_killed_goes_on_to_the_same_files(archive: Path, undisturbed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "jobs/embed.py", "--index", str(archive / "index"), "--export", str(archive / "export")]
    command += ["--out", str(tmp_path), "--tile-px", "56", "--dtype", "float32", "--name", "m", "--readers", "1"]
    command += ["--embedders", "1"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as job:
        deadline_s = time.monotonic() + 120
        while not list(folder_of(tmp_path).glob("*.h5")) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGKILL)
    left = len(list(folder_of(tmp_path).glob("*.h5")))
    assert 1 <= left < 3
    assert not read_folder(open_store(folder_of(tmp_path))).is_complete
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == f"embeddings: {folder_of(tmp_path)}"
    assert f"and {left} before" in ran.stdout
    assert contents(folder_of(tmp_path)) == contents(undisturbed)


def test_bad_and_withdrawn_slides_are_left_out_and_told_within_the_budget(cluster: None, tmp_path: Path) -> None:
    make_slides(tmp_path / "slides", count=3)
    catalogue = indexed(tmp_path / "slides", tmp_path / "index")
    exported_network(tmp_path / "export")
    path = next(iter((tmp_path / "slides").glob("*.svs")))
    bad = next(row for row in range(3) if int(catalogue.rows[row]["size_bytes"]) == path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-10])
    summary = embed(plan_of(tmp_path, tmp_path / "out"))
    folder = folder_of(tmp_path / "out")
    (line,) = [json.loads(line) for line in (folder / LEFT_OUT).read_text().splitlines()]
    assert (line["slide_id"], line["bad"]) == (catalogue.slide_id(bad), True)
    assert "changed" in line["reason"]
    assert any(text.startswith("left out: 1 slides") for text in summary.lines())
    assert json.loads((folder / MANIFEST).read_text())["left_out"] == 1
    with pytest.raises(EmbeddingError, match="1 of 3 slides cannot be embedded"):
        embed(plan_of(tmp_path, tmp_path / "strict", max_bad_slides=0))
    good = next(row for row in range(3) if row != bad)
    append_exclusion(open_store(tmp_path / "index"), [catalogue.slide_id(good)])
    summary = embed(plan_of(tmp_path, tmp_path / "out"))
    assert summary.withdrawn == (catalogue.slide_id(good),)
    assert summary.progress.total == 2


def test_a_slide_that_was_indexed_anew_is_embedded_anew(cluster: None, tmp_path: Path) -> None:
    make_slides(tmp_path / "slides", count=2)
    first = indexed(tmp_path / "slides", tmp_path / "index")
    exported_network(tmp_path / "export")
    embed(plan_of(tmp_path, tmp_path / "out"))
    before = contents(folder_of(tmp_path / "out"))
    paths = sorted((tmp_path / "slides").glob("*.svs"))
    make_slides(tmp_path / "others", count=1, seed=5)
    paths[0].write_bytes((tmp_path / "others" / paths[0].name).read_bytes())
    second = indexed(tmp_path / "slides", tmp_path / "index")
    assert first.snapshot_id != second.snapshot_id
    summary = embed(plan_of(tmp_path, tmp_path / "out"))
    assert (summary.progress.done, summary.progress.before) == (1, 1)
    after = contents(folder_of(tmp_path / "out"))
    assert sum(before[name] != after[name] for name in before if name.endswith(".h5")) == 1
    assert read_folder(open_store(folder_of(tmp_path / "out"))).snapshots == (second.snapshot_id,)
    indexed(tmp_path / "slides", tmp_path / "elsewhere")
    (tmp_path / "slides" / "slides.csv").write_text(f"slide,mpp\n{paths[0].name},0.3\n")
    other = indexed(tmp_path / "slides", tmp_path / "elsewhere")
    assert open_catalogue(str(tmp_path / "elsewhere")).snapshot_id == other.snapshot_id
    with pytest.raises(EmbeddingError, match="begun with another index"):
        embed(plan_of(tmp_path, tmp_path / "out", index_uri=str(tmp_path / "elsewhere")))
