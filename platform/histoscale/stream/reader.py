"""Reads chapters: an actor of Ray Data that turns one row of the plan into one block of tiles.

A sample whose tile the content refuses (damaged data, a slide that changed, no tissue after all, out of focus) is
read again at its next attempt, so that a block is always whole and a replay finds the same tiles.
"""

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from histoscale.config.recipe import Recipe
from histoscale.sampling.plan import ChapterPlan, Plan
from histoscale.sampling.spec import PlanSpec
from histoscale.slides.catalogue import Catalogue, Locations, open_catalogue
from histoscale.slides.identity import index_key
from histoscale.slides.snapshot import protected
from histoscale.slides.tile_check import TileCheck, tile_fault
from histoscale.slides.tiled import Region
from histoscale.storage import open_store
from histoscale.storage.disk_cache import DiskCache
from histoscale.stream.chapters import Chapter, ChapterTiles
from histoscale.stream.faults import Fault
from histoscale.stream.slide_pool import Outcome, Refusal, SlidePool


@dataclass(frozen=True)
class ReaderSpec:
    """What every reader needs.

    Attributes:
        index_uri: The slide index, whose protected part says where the slides lie.
        snapshot_id: The snapshot of it that the run reads.
        plan: What decides the plan beside the slides.
        out_from: Slide id -> first step at which the slide is out (withdrawn, or quarantined).
        check: What a tile must be to be trained on.
        cache_folder: A node-local folder for copies of slides that cannot be read in place.
        cache_bytes: Disk of a node for these copies, which its readers share.
        tile_cache_bytes: Disk of a node for compressed tiles that its processes share; 0 keeps none.
    """

    index_uri: str
    snapshot_id: str
    plan: PlanSpec
    out_from: Mapping[str, int]
    check: TileCheck
    cache_folder: Path
    cache_bytes: int
    tile_cache_bytes: int = 0

    @classmethod
    def from_recipe(cls, recipe: Recipe, index_uri: str, snapshot_id: str, out_from: Mapping[str, int]) -> Self:
        """What the readers of a run need, with their copies in the temporary folder of their node."""
        return cls(
            index_uri=index_uri,
            snapshot_id=snapshot_id,
            plan=PlanSpec.from_recipe(recipe),
            out_from=out_from,
            check=TileCheck(recipe.data.min_tile_tissue, recipe.data.min_sharpness),
            cache_folder=Path(tempfile.gettempdir()) / f"histoscale-slides-{os.getuid()}",
            cache_bytes=int(recipe.cluster.slide_cache_gb * 1e9),
            tile_cache_bytes=int(recipe.cluster.tile_cache_gb * 1e9),
        )

    def open_plan(self, catalogue: Catalogue) -> Plan:
        """The plan of the run over the slides of its catalogue."""
        out_from = {catalogue.row_of(slide_id): step for slide_id, step in self.out_from.items()}
        return Plan(self.plan, catalogue.rows, catalogue.columns, catalogue.values, catalogue.mask, out_from)

    def open_tile_cache(self) -> DiskCache | None:
        """The node's cache of compressed tiles, encrypted under the index's id key."""
        if not self.tile_cache_bytes:
            return None
        secret = index_key(protected(open_store(self.index_uri)))
        return DiskCache(self.cache_folder / "tiles", self.tile_cache_bytes, secret)


@dataclass(frozen=True)
class _Wanted:
    """One tile that is still to be read, at its place (step, position) in the chapter."""

    at: tuple[int, int]
    sample_id: int
    attempt: int
    row: int
    region: Region


class Reader:
    """The actor of `map_batches`: one row of the plan in, one block out. Several threads may call it.

    Args:
        spec: What to read, and from where.
    """

    def __init__(self, spec: ReaderSpec) -> None:
        self._spec = spec
        self._planning = threading.Lock()

    @cached_property
    def _catalogue(self) -> Catalogue:
        # Not in __init__: there, an error would reach the rank as the death of an actor, without its type.
        return open_catalogue(self._spec.index_uri, self._spec.snapshot_id)

    @cached_property
    def _plan(self) -> Plan:
        return self._spec.open_plan(self._catalogue)

    @cached_property
    def slides(self) -> SlidePool:
        """The slides that are read."""
        spec = self._spec
        return SlidePool(
            self._catalogue, Locations(self._catalogue), spec.cache_folder, spec.cache_bytes, spec.open_tile_cache()
        )

    def __call__(self, row: pa.Table) -> pa.Table:
        """Read one chapter; padding becomes a block without tiles.

        Raises:
            StorageError: The objects of a slide cannot be fetched.
            SlideIndexError: The index cannot be read.
            PlanError: No attempt at a sample gives a tile.
        """
        chapter = Chapter.from_row(row)
        tiles = ChapterTiles.padding() if chapter.replica is None else self.read(chapter, chapter.replica)
        return tiles.to_block(chapter)

    def read(self, chapter: Chapter, replica: int) -> ChapterTiles:
        """The tiles of one replica's chapter; errors as those of a call."""
        with self._planning:
            plan = self._plan.chapter(replica, chapter.first_step, chapter.last_step)
            slides = self.slides
        side_px = self._spec.plan.region_px
        tiles = np.empty((*plan.sample_ids.shape, side_px, side_px, 3), np.uint8)
        rows, mpp = plan.rows.copy(), plan.mpp.copy()
        faults: list[Fault] = []
        wanted = _all_of(plan, side_px)
        while wanted:
            visits = [list(visit) for _, visit in groupby(sorted(wanted, key=_visit_order), key=_visit)]
            begun = [slides.begin(visit[0].row, [tile.region for tile in visit]) for visit in visits]
            wanted = []
            for visit, outcomes in zip(visits, begun, strict=True):
                for tile, outcome in zip(visit, outcomes(), strict=True):
                    refusal = self._refusal(outcome, tile)
                    if refusal is None:
                        tiles[tile.at], rows[tile.at], mpp[tile.at] = outcome, tile.row, tile.region.mpp
                    else:
                        faults.append(self._fault(tile, refusal))
                        wanted.append(self._next_attempt(tile))
        faults.sort(key=lambda fault: (fault.sample_id, fault.attempt))
        return ChapterTiles(plan.sample_ids, rows, mpp, tiles, faults)

    def _refusal(self, outcome: Outcome, tile: _Wanted) -> Refusal | None:
        if isinstance(outcome, Refusal):
            return outcome
        reason = tile_fault(outcome, tile.region.mpp, self._spec.check)
        return None if reason is None else Refusal(reason, whole_slide=False)

    def _fault(self, tile: _Wanted, refusal: Refusal) -> Fault:
        slide_id = self._catalogue.slide_id(tile.row)
        return Fault(tile.sample_id, tile.attempt, slide_id, refusal.reason, refusal.whole_slide)

    def _next_attempt(self, tile: _Wanted) -> _Wanted:
        with self._planning:
            found = self._plan.tile(tile.sample_id, tile.attempt + 1)
        region = Region(found.x_px0, found.y_px0, tile.region.side_px, found.mpp)
        return _Wanted(tile.at, tile.sample_id, found.attempt, found.row, region)


def _all_of(plan: ChapterPlan, side_px: int) -> list[_Wanted]:
    columns = (plan.sample_ids, plan.attempts, plan.rows, plan.x_px0, plan.y_px0, plan.mpp)
    values: Iterator[tuple[int, int, int, float, float, float]] = zip(
        *(column.reshape(-1).tolist() for column in columns), strict=True
    )
    places = np.ndindex(*plan.sample_ids.shape)
    return [
        _Wanted((step, i), sample_id, attempt, row, Region(x_px0, y_px0, side_px, mpp))
        for (step, i), (sample_id, attempt, row, x_px0, y_px0, mpp) in zip(places, values, strict=True)
    ]


def _visit(tile: _Wanted) -> tuple[int, float]:
    """Tiles of one slide at one scale are fetched together."""
    return tile.row, tile.region.mpp


def _visit_order(tile: _Wanted) -> tuple[int, float, float, float, int]:
    return tile.row, tile.region.mpp, tile.region.y_px0, tile.region.x_px0, tile.sample_id
