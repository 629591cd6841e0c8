"""Beginning from another run's checkpoint: what of it fits, and how it gets into a new run's state.

A checkpoint is cut into ranges of named parameters, so any world size and any ZeRO stage can begin from it. Names and
shapes of the two networks must agree, with one exception: a position embedding for another number of patches, which is
resampled. Centres of the teacher's logits go along where both runs have them.
"""

import math
from collections.abc import Mapping

import torch

from histoscale.checkpoint.fragments import CENTER_PREFIX, EMA, MASTER, Fragment
from histoscale.checkpoint.parent import Parent, open_parent
from histoscale.checkpoint.reader import load_into, read_manifest
from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.models.feature_net import FeatureNet
from histoscale.models.published import resample_positions
from histoscale.models.ssl import SSLNet
from histoscale.train.teacher_source import TeacherWeights, find_teacher

POSITIONS = "backbone.pos_embed"

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the network that a recipe trains; nothing is allocated.

    Raises:
        HistoscaleError: The recipe distils from features of a teacher that cannot be found.
    """
    width = None
    if recipe.distill is not None and recipe.distill.mode == "features":
        source = find_teacher(recipe, recipe.distill)
        width = ARCHS[source.arch].width if isinstance(source, TeacherWeights) else None
    with torch.device("meta"):
        network = SSLNet(recipe) if width is None else FeatureNet(recipe, width)
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


def misfits(stored: Shapes, wanted: Shapes) -> list[str]:
    """Names of the parameters that one network has and the other has not, or in another shape.

    Centres are no parameters, and a position embedding of the same width is resampled where its length differs.
    """
    names = {name for name in (*stored, *wanted) if not name.startswith(CENTER_PREFIX)}
    return sorted(name for name in names if not _fits(name, stored.get(name), wanted.get(name)))


def _fits(name: str, stored: tuple[int, ...] | None, wanted: tuple[int, ...] | None) -> bool:
    if name == POSITIONS and stored is not None and wanted is not None:
        return stored[-1] == wanted[-1]
    return stored == wanted


def load_parent(parent: Parent, targets: Mapping[str, Fragment], shapes: Shapes, recipe: Recipe) -> None:
    """Fill this rank's state from the checkpoint that its run is forked from.

    A position embedding of another length is resampled for weights and average, as that of published weights is; its
    moments, which belong to places that no longer exist, stay as they are: zero.

    Args:
        parent: The checkpoint.
        targets: Name -> fragment whose tensors are overwritten, centres among them.
        shapes: Name -> shape of every parameter of the new run, and of its centres.
        recipe: Of the new run.

    Raises:
        CheckpointError: The checkpoint is gone, corrupt, or of another network.
        StorageError: It cannot be reached.
    """
    store, commit = open_parent(parent)
    stored = read_manifest(store, commit).shapes
    expected = {name: shape for name, shape in shapes.items() if not name.startswith(CENTER_PREFIX)}
    expected |= {name: shape for name, shape in stored.items() if name.startswith(CENTER_PREFIX)}
    if POSITIONS in expected and _fits(POSITIONS, stored.get(POSITIONS), expected[POSITIONS]):
        expected[POSITIONS] = stored[POSITIONS]
    # What is left are centres that the parent has not, and a position embedding of another length.
    fitting = {name: part for name, part in targets.items() if expected.get(name) == shapes[name]}
    load_into(store, commit, fitting, expected)
    if POSITIONS in targets and POSITIONS not in fitting:
        numel = math.prod(expected[POSITIONS])
        whole = Fragment(0, numel, expected[POSITIONS], {kind: torch.empty(numel) for kind in (MASTER, EMA)})
        load_into(store, commit, {POSITIONS: whole}, expected)
        _fill_resampled(targets[POSITIONS], whole, 1 + ARCHS[recipe.model.arch].registers)


@torch.no_grad()
def _fill_resampled(target: Fragment, whole: Fragment, prefix: int) -> None:
    """Resample a whole position embedding, and copy this rank's range of it."""
    grid, wanted = (math.isqrt(part.shape[1] - prefix) for part in (whole, target))
    for kind, values in whole.tensors.items():
        rows_1TD = resample_positions(values.view(whole.shape), prefix, grid, wanted)
        target.tensors[kind].copy_(rows_1TD.reshape(-1)[target.offset : target.offset + target.numel])
