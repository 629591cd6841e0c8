"""Which checkpoints have seen a slide: the answer holds against every tile of the run, drawn one by one."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from histoscale.checkpoint.fragments import Fragment
from histoscale.checkpoint.ledger import StepRecord
from histoscale.checkpoint.parent import Parent, write_parent
from histoscale.checkpoint.writer import Snapshot, write_checkpoint
from histoscale.cluster.run_folder import start_run
from histoscale.cluster.segments import Segment, write_segments
from histoscale.cluster.slide_history import slide_history
from histoscale.config.decode import decode_recipe, fingerprint
from histoscale.errors import CheckpointError, SlideIndexError
from histoscale.sampling.plan import Plan
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.catalogue import open_catalogue
from histoscale.slides.index import make_index, write_index
from histoscale.slides.records import SlideLocation, SlideRecord
from histoscale.storage import ObjectInfo, Store, open_store
from histoscale.stream.faults import Fault, Quarantined

STEPS, TILES = 12, 8
RECIPE = decode_recipe(
    {
        "precision": "fp32",
        "data": {"mix": [{"mpp": 0.5, "share": 1}]},
        "batch": {"tiles": TILES, "replicas": 2, "chapter_steps": 2, "tiles_per_visit": 2},
        "schedule": {"images": STEPS * TILES},
    }
)
IDS = [f"{number:032x}" for number in range(1, 6)]
WITHDRAWN, BAD = IDS[3], IDS[4]


pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = open_store(tmp_path_factory.mktemp("index"))
    records = [
        SlideRecord(one, "aperio", 4096, 4096, 0.5, "vendor", 9, (1.0, 4.0), np.ones((256, 256), bool), 16.0)
        for one in IDS
    ]
    objects = (ObjectInfo("slide.svs", 9, "x"),)
    write_index(store, make_index(records, []), {one: SlideLocation("/slides", objects, None) for one in IDS})
    return store


def plan_of(index: Store) -> Plan:
    catalogue = open_catalogue(index.uri)
    out = {catalogue.row_of(WITHDRAWN): 6, catalogue.row_of(BAD): 3}
    return Plan(PlanSpec.from_recipe(RECIPE), catalogue.rows, catalogue.columns, catalogue.values, catalogue.mask, out)


def faults_of(index: Store) -> dict[int, list[Fault]]:
    """Tiles that were refused: some for their content, and all of a slide that became unreadable at step 3."""
    plan, catalogue = plan_of(index), open_catalogue(index.uri)
    found: dict[int, list[Fault]] = {}
    for k in range(0, STEPS * TILES, 7):
        tile = plan.tile(k)
        found[k] = [Fault(k, tile.attempt, catalogue.slide_id(tile.row), "blur", whole_slide=False)]
    k = 3 * TILES + 1
    found[k] = [Fault(k, 0, BAD, "gone", whole_slide=True), Fault(k, 1, IDS[0], "blur", whole_slide=False)]
    return found


@pytest.fixture
def run(index: Store, tmp_path: Path) -> Store:
    store = open_store(tmp_path / "run")
    start_run(store, RECIPE, index.uri, open_catalogue(index.uri).snapshot_id)
    write_segments(store, (Segment(6, (WITHDRAWN,)),))
    faults = faults_of(index)
    quarantine: tuple[Quarantined, ...] = ()
    for first, stop in ((0, 5), (5, 9)):
        records = [
            StepRecord(
                step,
                ((step * TILES, TILES),),
                tuple(fault for k in range(step * TILES, (step + 1) * TILES) for fault in faults.get(k, [])),
            )
            for step in range(first, stop)
        ]
        fragments = {"a": Fragment(0, 2, (2,), {"fp32": torch.zeros(2)})}
        content = fingerprint(RECIPE), fragments, {"a": (2,)}, records, {"workers": "1"}, quarantine
        quarantine = write_checkpoint(store, Snapshot(stop, stop * TILES, *content), keep_last=3).quarantine
    return store


def test_the_answer_holds_against_every_tile_of_the_run(index: Store, run: Store) -> None:
    plan, faults, catalogue = plan_of(index), faults_of(index), open_catalogue(index.uri)
    steps: dict[str, list[int]] = {one: [] for one in IDS}
    for k in range(9 * TILES):
        attempt = faults[k][-1].attempt + 1 if k in faults else 0
        steps[catalogue.slide_id(plan.tile(k, attempt).row)].append(k // TILES)
    for one in IDS:
        history = slide_history(run, one)
        assert Counter(history.steps.tolist()) == Counter(steps[one]), one
        assert (history.committed, history.checkpoints) == (9, (5, 9))
        assert history.tiles_before(5) == sum(step < 5 for step in steps[one])


def test_a_withdrawn_slide_is_told_of_checkpoint_by_checkpoint(run: Store) -> None:
    history = slide_history(run, WITHDRAWN)
    assert max(history.steps) < 6
    lines = list(history.lines())
    assert lines[0].startswith(f"slide {WITHDRAWN}: {len(history.steps)} tiles in ")
    assert lines[1] == f"checkpoint of step 5: has seen it, {history.tiles_before(5)} tiles"
    assert len(lines) == 3
    write_parent(run, Parent("/other", 4, "f", 1, 4))
    assert list(slide_history(run, WITHDRAWN).lines())[-1].startswith("forked from /other at step 4")


def test_a_slide_that_was_never_used_is_told_as_such(run: Store) -> None:
    write_segments(run, (Segment(0, (IDS[2],)),))
    lines = list(slide_history(run, IDS[2]).lines())
    assert lines[:2] == [f"slide {IDS[2]}: no tile in 9 committed steps", "checkpoint of step 5: has not seen it"]


def test_what_cannot_be_answered_is_refused(index: Store, run: Store, tmp_path: Path) -> None:
    with pytest.raises(SlideIndexError, match="not in the index"):
        slide_history(run, "f" * 32)
    young = open_store(tmp_path / "young")
    start_run(young, RECIPE, index.uri, open_catalogue(index.uri).snapshot_id)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        slide_history(young, IDS[0])
