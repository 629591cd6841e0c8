"""A run to which everything happens ends as the run to which nothing does; `make chaos SEED=n`, and a short form."""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.chaos.events import SILENCE_S, Chaos, Outcome, table
from tests.chaos.schedule import Kind, schedule
from tests.chaos.site import STORE_BYTES, WORKER_CPUS, Site, open_site, small_disk
from tests.chaos.watched import SUBMIT, WatchedRun
from tests.conftest import S3Server
from tests.integration.jobs_at_work import REPOSITORY, TINY

from histoscale.bench.watched_job import set_words
from histoscale.checkpoint.fragments import EMA, MASTER, Fragment
from histoscale.checkpoint.ledger import read_history
from histoscale.checkpoint.reader import latest_commit, load_into, read_manifest
from histoscale.observe.metrics import read_metrics
from histoscale.observe.timeline import Kind as Told
from histoscale.observe.timeline import read_events
from histoscale.slides.synthetic import make_slides
from histoscale.storage import Store, open_store

SHORT = (Kind.S3_BROKEN, Kind.BYTE_FLIPPED, Kind.DRIVER_KILLED)  # to have a byte read, a worker is killed
STEP_S = 300.0


@dataclass(frozen=True)
class Form:
    """How long a run is, and what its steps are."""

    steps: int
    tiles: int
    commit_every: int
    slides: int

    @property
    def recipe(self) -> list[str]:
        """What the run and the undisturbed one have in common."""
        settings = [
            f"batch.tiles={self.tiles}",
            "batch.chapter_steps=8",
            f"schedule.images={self.steps * self.tiles}",
            f"checkpoint.every_steps={self.commit_every}",
            "checkpoint.keep_last=2",
        ]
        return [*TINY, *set_words(*settings)]


LONG_FORM = Form(steps=400, tiles=64, commit_every=10, slides=4)
SHORT_FORM = Form(steps=60, tiles=16, commit_every=6, slides=2)


@contextlib.contextmanager
def undisturbed(server: S3Server, bucket: str, form: Form) -> Iterator["subprocess.Popen[str]"]:
    """The run that nothing happens to, beside the block; it does not read through the proxy."""
    words = ["-m", "tests.chaos.undisturbed", "--index", f"s3://{bucket}/index", "--out", f"s3://{bucket}/undisturbed"]
    with subprocess.Popen(
        [sys.executable, *words, *form.recipe],
        cwd=REPOSITORY,
        env={**os.environ, **server.environment()},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def weights(store: Store, kind: str) -> torch.Tensor:
    """All parameters of the newest commit, end to end."""
    commit = latest_commit(store)
    assert commit is not None
    shapes = read_manifest(store, commit).shapes
    whole = {
        name: Fragment(0, math.prod(shape), shape, {kind: torch.empty(math.prod(shape))})
        for name, shape in shapes.items()
    }
    load_into(store, commit, whole, shapes)
    return torch.cat([part.tensors[kind] for part in whole.values()])


def assert_as_if_nothing_had_happened(store: Store, losses: list[float], plain: Store, form: Form) -> None:
    """Each sample once in the committed history, the losses and the final weights of the undisturbed run."""
    assert dict(read_history(store, form.steps)) == {
        step: [(step * form.tiles, form.tiles)] for step in range(form.steps)
    }
    told = [values["loss/total"] for values in read_metrics(store, form.steps)]
    np.testing.assert_allclose(told, losses, rtol=1e-5)
    for kind in (MASTER, EMA):
        ours, theirs = weights(store, kind), weights(plain, kind)
        distance = float((ours - theirs).norm() / theirs.norm())
        assert distance < 1e-4, f"{kind}: {distance:g}"
    assert not list(store.list("captures"))
    assert [event.kind for event in read_events(store) if event.kind in (Told.STOP, Told.END)] == [Told.END]


def carry_out(chaos: Chaos, form: Form, kinds: tuple[Kind, ...]) -> list[Outcome]:
    """Let everything happen at its step, one after the other."""
    planned = schedule(chaos.seed, form.steps, kinds)
    tell(f"\nseed {chaos.seed}: " + ", ".join(f"{one.kind.value} at {one.step}" for one in planned))
    outcomes = []
    for one in planned:
        chaos.run.wait_for_step(one.step, STEP_S)
        outcomes.append(chaos.happen(one.kind))
        tell(table(outcomes).splitlines()[-1])
    return outcomes


def tell(text: str) -> None:
    """For whoever watches `make chaos`."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def put_index(server: S3Server, site: Site, folder: Path, count: int) -> str:
    """Draw slides, put them into a bucket and index them there; returns the bucket's name."""
    bucket = server.make_bucket()
    for slide in make_slides(folder / "slides", count=count):
        server.client.upload_file(str(slide.path), bucket, f"slides/{slide.path.name}")
    words = [sys.executable, "jobs/index.py", f"s3://{bucket}/slides", "--out", f"s3://{bucket}/index"]
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        env=direct(site),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return bucket


def direct(site: Site) -> dict[str, str]:
    """Environment of a command that joins the cluster by itself."""
    return {**site.environment, "RAY_ADDRESS": site.cluster.address}


@contextlib.contextmanager
def training(site: Site, bucket: str, run_uri: str, form: Form, *settings: str) -> Iterator[WatchedRun]:
    """The run, submitted by `jobs/submit.py` where there is a job server; it ends with the block."""
    words = ["jobs/pretrain.py", "--index", f"s3://{bucket}/index", "--out", run_uri, *form.recipe]
    common = [f"cluster.cpus_per_worker={WORKER_CPUS}", f"cluster.silence_s={SILENCE_S:g}", "cluster.max_failures=20"]
    words += set_words(*common, *settings)
    if site.job_server:
        words = [SUBMIT, "--address", site.job_server, "--", "python", *words]
    run = WatchedRun(words, site.environment if site.job_server else direct(site), REPOSITORY)
    try:
        yield run
    finally:
        run.end()


@pytest.mark.timeout(900)
def test_a_run_in_a_bucket_outlives_kills_an_outage_and_a_flipped_byte(
    s3_env: S3Server, tmp_path: Path, chaos_seed: int
) -> None:
    form = SHORT_FORM
    with open_site(s3_env, head_cpus=5, trainer_nodes=1, job_server=False) as site:
        bucket = put_index(s3_env, site, tmp_path, form.slides)
        store = open_store(f"s3://{bucket}/run")
        with (
            undisturbed(s3_env, bucket, form) as plain,
            training(site, bucket, store.uri, form, "cluster.workers=2") as run,
        ):
            outcomes = carry_out(Chaos(site, run, store, chaos_seed), form, SHORT)
            run.finish(STEP_S)
            losses = json.loads(plain.communicate()[0])
    tell(table(outcomes))
    assert_as_if_nothing_had_happened(store, losses, open_store(f"s3://{bucket}/undisturbed"), form)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_to_which_everything_happens_ends_as_one_to_which_nothing_does(
    s3_env: S3Server, tmp_path: Path, chaos_seed: int
) -> None:
    form, disk = LONG_FORM, tmp_path / "disk"
    with small_disk(disk) as mounted, open_site(s3_env, head_cpus=1, trainer_nodes=1, job_server=True) as site:
        site.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)  # trainers need two, readers fit on one
        bucket = put_index(s3_env, site, tmp_path, form.slides)
        with undisturbed(s3_env, bucket, form) as plain:
            losses = json.loads(plain.communicate()[0])
        store = open_store(disk / "run")
        kinds = tuple(kind for kind in Kind if mounted or kind is not Kind.DISK_FILLED)
        with training(site, bucket, store.uri, form, "cluster.workers=[1, 2]") as run:
            outcomes = carry_out(Chaos(site, run, store, chaos_seed, disk), form, kinds)
            run.finish(4 * STEP_S)
        tell(table(outcomes))
        assert_as_if_nothing_had_happened(store, losses, open_store(f"s3://{bucket}/undisturbed"), form)
    if not mounted:
        pytest.skip("all but the full disk was tried: this user may not mount a small one")
