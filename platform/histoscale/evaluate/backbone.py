"""The two backbones of a run that are of use outside of it: the trained teacher, and what the run began with."""

from torch import Tensor

from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.reader import commit_at, load_teacher_backbone, read_newest, require_recipe
from histoscale.config.archs import ARCHS
from histoscale.config.decode import fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import CheckpointError
from histoscale.models import VisionTransformer, build_ssl_net
from histoscale.models.published import load_for
from histoscale.storage import Store


def trained_backbone(run_store: Store, recipe: Recipe, step: int | None = None) -> tuple[VisionTransformer, Commit]:
    """Backbone of the EMA teacher at a commit of a run, in fp32 on the CPU, and that commit.

    Args:
        run_store: The run folder.
        recipe: The run's.
        step: Of the commit; the newest one that is whole without it.

    Raises:
        CheckpointError: The run has no such commit, or none that is whole, or it is of another network.
    """

    def read(commit: Commit) -> dict[str, Tensor]:
        require_recipe(commit, fingerprint(recipe))
        return load_teacher_backbone(run_store, commit)

    if step is not None:
        commit = commit_at(run_store, step)
        return _backbone(recipe, read(commit)), commit
    weights, commit = read_newest(run_store, read)
    return _backbone(recipe, weights), commit


def initial_backbone(recipe: Recipe) -> VisionTransformer:
    """The same network before the first step: what the recipe's seed draws, and published weights, if it names any.

    Raises:
        ModelError: These cannot be read or do not fit.
        StorageError: They cannot be reached.
    """
    backbone = build_ssl_net(recipe).backbone
    if recipe.model.weights is not None:
        published = load_for(recipe, recipe.model.weights)
        backbone.load_state_dict(published.state, strict=False)  # what the file may lack was checked, and stays drawn
    return backbone.eval()


def _backbone(recipe: Recipe, weights: dict[str, Tensor]) -> VisionTransformer:
    model = recipe.model
    backbone = VisionTransformer(ARCHS[model.arch], recipe.crops.global_px, qk_norm=model.qk_norm)
    try:
        backbone.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            "the checkpoint holds another network than the recipe says",
            value=" ".join(str(error).split())[:300],
            expected=f"the weights of {recipe.model.arch} for crops of {recipe.crops.global_px} px",
            remedy="restore the recipe.yaml that the run was started with",
        ) from error
    return backbone.eval()
