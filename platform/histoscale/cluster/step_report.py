"""From a step of a run to the page that shows its tiles."""

from histoscale.checkpoint.manifest import Commit
from histoscale.cluster.run_tiles import RunTiles
from histoscale.config.recipe import Recipe
from histoscale.errors import RunError
from histoscale.observe.metrics import read_metrics
from histoscale.observe.picture_store import step_page_key
from histoscale.observe.step_page import chosen, step_page
from histoscale.storage import Store, join


def write_step_page(
    store: Store, recipe: Recipe, commit: Commit, step: int, tiles: RunTiles | None = None
) -> tuple[str, list[str]]:
    """Write the page of a step into the run folder; gives its URI, and lines on slides that cannot be read.

    Args:
        store: The run folder.
        recipe: Of the run.
        commit: Its newest one.
        step: The step, from 0.
        tiles: The tiles of the run, if they are open already.

    Raises:
        RunError: The step is not committed.
        HistoscaleError: The run's records or its index cannot be read, or the page cannot be written.
    """
    if not 0 <= step < commit.step:
        raise RunError(
            f"the run has no committed step {step}",
            value=step,
            expected=f"0 to {commit.step - 1}",
            remedy="give a step that a curve of report.html shows; later ones come with the next commit",
        )
    tiles = tiles or RunTiles(store, recipe, commit)
    planned = tiles.within_reach(tiles.of_step(step))
    seen, lines = tiles.read([planned[place] for place in chosen(len(planned))])
    metrics = list(read_metrics(store, commit.step))
    key = step_page_key(step)
    store.put(key, step_page(step, seen, recipe.batch.tiles, tiles.mix, metrics).encode())
    return join(store.uri, key), lines
