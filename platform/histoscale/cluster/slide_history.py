"""Which steps, and so which checkpoints, of a run have seen a slide: from the plan, read backwards, and the ledger."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histoscale.checkpoint.ledger import read_replacements
from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.parent import Parent, read_parent
from histoscale.checkpoint.reader import require_commit
from histoscale.checkpoint.retention import committed_steps
from histoscale.checkpoint.run_record import recorded_index
from histoscale.cluster.run_folder import require_run
from histoscale.cluster.segments import out_from, read_segments
from histoscale.sampling.plan import Plan
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.catalogue import Catalogue, open_catalogue
from histoscale.storage import Store


@dataclass(frozen=True)
class SlideHistory:
    """What a run took from a slide.

    Attributes:
        slide_id: The slide.
        committed: Steps of the run that are committed.
        steps: int64 [N], the step of each tile that came from the slide, ascending.
        checkpoints: Steps of the checkpoints that are there.
        parent: What the run was forked from, which may have seen the slide, too.
    """

    slide_id: str
    committed: int
    steps: NDArray[np.int64]
    checkpoints: tuple[int, ...]
    parent: Parent | None

    def tiles_before(self, step: int) -> int:
        """Tiles of the slide that a checkpoint of this step has seen."""
        return int(np.searchsorted(self.steps, step))

    def lines(self) -> Iterator[str]:
        """The answer for people."""
        if not len(self.steps):
            yield f"slide {self.slide_id}: no tile in {self.committed:,} committed steps"
        else:
            yield (
                f"slide {self.slide_id}: {len(self.steps):,} tiles in {len(np.unique(self.steps)):,} of "
                f"{self.committed:,} committed steps, from step {self.steps[0]:,} to step {self.steps[-1]:,}; every "
                f"checkpoint after step {self.steps[0]:,} has seen it"
            )
        for step in self.checkpoints:
            tiles = self.tiles_before(step)
            yield f"checkpoint of step {step:,}: " + (f"has seen it, {tiles:,} tiles" if tiles else "has not seen it")
        if self.parent is not None:
            yield f"{self.parent.line()}: ask there, too, for what came before"


def slide_history(store: Store, slide_id: str) -> SlideHistory:
    """What the committed steps of a run took from a slide.

    Raises:
        HistoscaleError: The run has no checkpoint, its index or its ledger cannot be read, or the slide is not in it.
    """
    recipe = require_run(store)
    commit = require_commit(store)
    catalogue = open_catalogue(*recorded_index(store))
    row = catalogue.row_of(slide_id)
    samples = _samples(store, commit, _plan(store, commit, PlanSpec.from_recipe(recipe), catalogue), row)
    steps = samples // recipe.batch.tiles
    return SlideHistory(slide_id, commit.step, steps, tuple(committed_steps(store)), read_parent(store))


def _plan(store: Store, commit: Commit, spec: PlanSpec, catalogue: Catalogue) -> Plan:
    out = {catalogue.row_of(one): step for one, step in out_from(read_segments(store), commit.quarantine).items()}
    return Plan(spec, catalogue.rows, catalogue.columns, catalogue.values, catalogue.mask, out)


def _samples(store: Store, commit: Commit, plan: Plan, row: int) -> NDArray[np.int64]:
    """The samples that came from a slide: the plan's, but for those whose content was refused, as the ledger says."""
    last_attempt: dict[int, int] = {}
    for _, replaced in read_replacements(store, commit.step):
        for sample_id, attempt, _, _ in replaced:
            last_attempt[sample_id] = max(attempt, last_attempt.get(sample_id, 0))
    by_attempt: dict[int, list[int]] = defaultdict(list)
    for sample_id, attempt in last_attempt.items():
        by_attempt[attempt + 1].append(sample_id)
    planned = np.setdiff1d(plan.samples_of(row, commit.step), np.array(sorted(last_attempt), np.int64))
    spares = [plan.spares_of(row, np.array(ids, np.int64), attempt) for attempt, ids in by_attempt.items()]
    return np.unique(np.concatenate([planned, *spares]))
