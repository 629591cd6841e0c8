"""The tiles of a run to be looked at: those of a step as it saw them, and those by which checkpoints are compared.

Slides that were withdrawn are never read, whatever a step had of them.
"""

from collections.abc import Sequence
from functools import cached_property

from histoscale.checkpoint.ledger import replacements_of
from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.run_record import recorded_index
from histoscale.cluster.segments import out_from, read_segments
from histoscale.config.recipe import Recipe
from histoscale.sampling.gallery import Mpp, first_tiles
from histoscale.sampling.plan import Plan, TilePlan
from histoscale.sampling.rows import COPIED
from histoscale.slides.catalogue import Catalogue, Locations, open_catalogue
from histoscale.slides.exclusions import read_exclusions
from histoscale.slides.tile_check import tile_fault
from histoscale.storage import Store, open_store
from histoscale.stream.reader import ReaderSpec
from histoscale.stream.seen_tiles import SeenTile, read_tiles
from histoscale.stream.slide_pool import SlidePool

_MOST_COPIED = 16  # slides; each of them is fetched as a whole for the sake of its tiles


class RunTiles:
    """What a run has drawn from its slides.

    Args:
        store: The run folder.
        recipe: Of the run.
        commit: One of it: slides that it has quarantined are out from the steps on that it says.

    Attributes:
        withdrawn: Ids of slides that must not be looked at.
        plan: As the committed steps had it.

    Raises:
        HistoscaleError: The run's records or its index cannot be read.
    """

    def __init__(self, store: Store, recipe: Recipe, commit: Commit) -> None:
        self._store, self._recipe = store, recipe
        index_uri, snapshot_id = recorded_index(store)
        self.catalogue = open_catalogue(index_uri, snapshot_id)
        segments = read_segments(store)
        excluded = [slide_id for one in read_exclusions(open_store(index_uri)) for slide_id in one.slide_ids]
        self.withdrawn = frozenset(excluded).union(*(segment.excluded for segment in segments))
        self._unreadable = {slide.slide_id for slide in commit.quarantine}
        out = out_from(segments, commit.quarantine)
        self._spec = ReaderSpec.from_recipe(recipe, index_uri, snapshot_id, out)
        self.plan = self._spec.open_plan(self.catalogue)

    @property
    def mix(self) -> tuple[Mpp, ...]:
        """The magnifications that the recipe asks for."""
        return tuple(entry.mpp for entry in self._recipe.data.mix)

    def of_step(self, step: int) -> list[TilePlan]:
        """The tiles that entered a committed step, but for those of slides that are withdrawn by now.

        Raises:
            CheckpointError: The ledger of the step is damaged.
        """
        last_attempt: dict[int, int] = {}
        for sample_id, attempt, _, _ in replacements_of(self._store, step):
            last_attempt[sample_id] = max(attempt, last_attempt.get(sample_id, 0))
        per_step = self._recipe.batch.tiles
        tiles = []
        for sample_id in range(step * per_step, (step + 1) * per_step):
            refused = last_attempt.get(sample_id)
            tiles.append(self.plan.tile(sample_id, 0 if refused is None else refused + 1))
        return [tile for tile in tiles if self.catalogue.slide_id(tile.row) not in self.withdrawn]

    def gallery(self, count: int) -> tuple[list[SeenTile], list[str]]:
        """The tiles that checkpoints are compared by, as far as a run may learn from them, and lines on slides."""
        spec, catalogue = self.plan.spec, self.catalogue
        whole = Plan(spec, catalogue.rows, catalogue.columns, catalogue.values, catalogue.mask)
        tiles = first_tiles(whole, self.mix, count, _Reach(catalogue).fits)
        out = self.withdrawn | self._unreadable
        seen, lines = self.read([tile for tile in tiles if catalogue.slide_id(tile.row) not in out])
        check = self._spec.check
        return [tile for tile in seen if tile_fault(tile.pixels, tile.plan.mpp, check) is None], lines

    def within_reach(self, tiles: Sequence[TilePlan]) -> list[TilePlan]:
        """Those tiles for which few slides must be fetched as a whole."""
        return list(filter(_Reach(self.catalogue).fits, tiles))

    def read(self, tiles: Sequence[TilePlan]) -> tuple[list[SeenTile], list[str]]:
        """The tiles that can be read, and lines on those that cannot."""
        return read_tiles(self._pool, self.catalogue, tiles, self._recipe.data.region_px)

    @cached_property
    def _pool(self) -> SlidePool:
        spec = self._spec
        return SlidePool(
            self.catalogue, Locations(self.catalogue), spec.cache_folder, spec.cache_bytes, spec.open_tile_cache()
        )


class _Reach:
    """Lets tiles pass until too many slides would have to be fetched as a whole."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._fetched: set[int] = set()

    def fits(self, tile: TilePlan) -> bool:
        """Whether a tile is read in place, or from one of the first slides that are not."""
        if not self._catalogue.rows["flags"][tile.row] & COPIED or tile.row in self._fetched:
            return True
        if len(self._fetched) >= _MOST_COPIED:
            return False
        self._fetched.add(tile.row)
        return True
