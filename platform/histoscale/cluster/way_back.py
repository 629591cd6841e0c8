"""How a person takes a run back to before its trouble: a fork from an earlier checkpoint, over other data."""

from collections.abc import Iterable

from histoscale.config.recipe import Recipe


def way_back(recipe: Recipe, run_uri: str, index_uri: str, steps: Iterable[int], since: int) -> str:
    """The command that goes on from the newest checkpoint of before a trouble, with other tiles from there on.

    Args:
        recipe: Of the run.
        run_uri: Its folder.
        index_uri: Of its slides.
        steps: Of its checkpoints.
        since: The first step of the trouble.
    """
    before = max((step for step in steps if step <= since), default=None)
    if before is None:
        return (
            f"No checkpoint of before step {since} is left to fork from: raise checkpoint.keep_last, or set "
            "checkpoint.keep_every_steps, in the next run"
        )
    images = recipe.schedule.images - before * recipe.batch.tiles
    return (
        f"To go back before it with other tiles: python jobs/pretrain.py --recipe RECIPE --index {index_uri} --out NEW "
        f"--fork-from {run_uri}@{before} --set seed={recipe.seed + 1} --set schedule.images={images} (RECIPE is a copy "
        "of the run's recipe.yaml with what you change; docs/guides/health.md)"
    )
