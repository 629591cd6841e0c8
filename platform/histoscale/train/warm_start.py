"""The published weights that the backbone of a new run starts from, where its recipe names any."""

from torch import nn

from histoscale.checkpoint.collective import on_first_rank, receive
from histoscale.checkpoint.reader import latest_commit
from histoscale.config.recipe import Recipe
from histoscale.models.published import load_for
from histoscale.storage.store import Store


def start_from_published(network: nn.Module, recipe: Recipe, store: Store) -> None:
    """Give a student's backbone the published weights that its recipe names (collective).

    The first rank alone reads the file. A run with a commit takes all of its state from there, and needs no file.

    Args:
        network: The student with the weights that were drawn for it, on the device that it trains on.
        recipe: The run's.
        store: The run folder.

    Raises:
        HistoscaleError: The weights cannot be reached or read, or do not fit; raised on every rank.
    """
    path = recipe.model.weights
    if path is None or on_first_rank(lambda: latest_commit(store)) is not None:
        return
    # What the file may lack was checked, and stays as it was drawn.
    receive(network.get_submodule("backbone"), lambda: (load_for(recipe, path).state, None))
