"""Tiles of a run's own slides, to prove an export with: those of its last committed step, read by the plan again."""

from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.run_record import recorded_index
from histoscale.cluster.segments import next_segments, out_from, read_segments
from histoscale.config.recipe import Recipe
from histoscale.errors import HistoscaleError
from histoscale.export.parity import ParityTiles
from histoscale.export.tiles import TILES, procedural_tiles
from histoscale.slides.catalogue import open_catalogue
from histoscale.slides.exclusions import read_exclusions
from histoscale.storage import Store, open_store
from histoscale.stream.chapters import Chapter
from histoscale.stream.reader import Reader, ReaderSpec


def tiles_to_prove_with(store: Store, recipe: Recipe, commit: Commit) -> tuple[ParityTiles, str | None]:
    """The run's own tiles; drawn ones where its slides cannot be read, and then what stood in the way."""
    try:
        return tiles_of_run(store, recipe, commit), None
    except HistoscaleError as error:
        drawn = procedural_tiles(recipe.crops.global_px, "the slides of the run could not be read")
        return drawn, str(error)


def tiles_of_run(store: Store, recipe: Recipe, commit: Commit) -> ParityTiles:
    """Tiles of the last step before a commit; none of a slide that was withdrawn since.

    Raises:
        HistoscaleError: The index or a slide cannot be read.
    """
    index_uri, snapshot_id = recorded_index(store)
    catalogue, step = open_catalogue(index_uri, snapshot_id), commit.step - 1
    withdrawn = {slide_id for one in read_exclusions(open_store(index_uri)) for slide_id in one.slide_ids}
    segments = next_segments(read_segments(store), step, filter(catalogue.has, withdrawn))
    out = out_from(segments, commit.quarantine)
    reader = Reader(ReaderSpec.from_recipe(recipe, index_uri, snapshot_id, out))
    replicas = min(recipe.batch.replicas, -(-TILES // recipe.batch.per_replica))
    chapters = [Chapter(step // recipe.batch.chapter_steps, replica, step, step) for replica in range(replicas)]
    tiles = [tile for number, chapter in enumerate(chapters) for tile in reader.read(chapter, number).tiles[0]]
    return ParityTiles(tuple(tiles[:TILES]), f"tiles of the run's own slides, from step {step:,}")
