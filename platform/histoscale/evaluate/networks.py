"""Networks that can be evaluated, wherever their weights lie: a run, an export, or a file of published weights."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from histoscale.checkpoint.manifest import Commit
from histoscale.checkpoint.run_record import find_recipe
from histoscale.config.archs import ARCHS, Arch
from histoscale.config.decode import fingerprint
from histoscale.config.recipe import Recipe
from histoscale.errors import ModelError
from histoscale.evaluate.backbone import trained_backbone
from histoscale.evaluate.figures import BASELINES, PRETRAINED
from histoscale.export.exported import load_export, read_export
from histoscale.models import VisionTransformer
from histoscale.models.published import load_published
from histoscale.models.weights import initialise
from histoscale.storage import Store, open_store

PUBLISHED_PX = 224
"""Side of the images that a network sees whose file does not say."""

_EXPECTED = "a run folder, an export, or ARCH=FILE for a .safetensors or .pth file of published weights"


@dataclass(frozen=True)
class Network:
    """A backbone that is evaluated.

    Attributes:
        name: As tables call it.
        backbone: In fp32 on the CPU, in evaluation mode.
        arch: Its shape.
        image_px: Side of the images that it sees.
        fingerprint: Names its recipe, or its weights where there is none.
        step: Optimiser steps of its checkpoint, or 0 where that is not known.
        images_seen: Tiles that entered them.
    """

    name: str
    backbone: VisionTransformer
    arch: Arch
    image_px: int
    fingerprint: str
    step: int = 0
    images_seen: int = 0

    @classmethod
    def of_commit(cls, name: str, backbone: VisionTransformer, recipe: Recipe, commit: Commit) -> "Network":
        """The backbone that a commit of a run holds."""
        arch, image_px = ARCHS[recipe.model.arch], recipe.crops.global_px
        return cls(name, backbone, arch, image_px, fingerprint(recipe), commit.step, commit.images_seen)


def find_network(place: str) -> Network:
    """The network that a place holds.

    Args:
        place: A run folder (its newest checkpoint is taken), an export, or `ARCH=FILE`.

    Raises:
        ModelError: There is none, or its weights are of another shape.
        HistoscaleError: It cannot be read.
    """
    arch, separator, file = place.partition("=")
    if separator and "/" not in arch:
        return _of_file(arch, file)
    store = open_store(place)
    recipe = find_recipe(store)
    if recipe is not None:
        return _of_run(store, recipe)
    try:
        read_export(store)
    except ModelError as error:
        raise ModelError(
            "there is no network to evaluate", value=place, expected=_EXPECTED, remedy="correct the place"
        ) from error
    backbone, export = load_export(store)
    marker, name = export.marker, _last_part(store.uri)
    sha256 = f"sha256:{export.sha256}"
    return Network(name, backbone, ARCHS[marker.arch], marker.image_px, sha256, marker.step, marker.images_seen)


def untrained_like(network: Network) -> VisionTransformer:
    """A network of the same shape that has learnt nothing."""
    twin = copy.deepcopy(network.backbone)
    initialise(twin, 0, network.arch.init_std)
    return twin


def require_names(networks: Sequence[Network]) -> None:
    """Refuse networks that a table could not tell apart.

    Raises:
        ModelError: Two have one name, or one has a name that stands for something else.
    """
    names = [network.name for network in networks]
    taken = {PRETRAINED, *BASELINES}
    for name in names:
        if names.count(name) > 1 or name in taken:
            raise ModelError(
                "two networks of one name cannot be told apart in a table",
                value=name,
                expected=f"names that differ, and none of {', '.join(sorted(taken))}",
                remedy="rename a folder or file: the last part of its path is the name",
            )


def _of_run(store: Store, recipe: Recipe) -> Network:
    backbone, commit = trained_backbone(store, recipe)
    return Network.of_commit(_last_part(store.uri), backbone, recipe, commit)


def _of_file(arch: str, file: str) -> Network:
    if arch not in ARCHS:
        raise ModelError(
            "the shape of the weights is not known",
            value=f"{arch}={file}",
            expected=f"ARCH=FILE with one of {', '.join(ARCHS)}",
            remedy="say which of these the weights are of",
        )
    return _of_weights(PurePosixPath(file).stem, file, ARCHS[arch], PUBLISHED_PX, qk_norm=False)


def _of_weights(name: str, uri: str, arch: Arch, image_px: int, qk_norm: bool) -> Network:
    published = load_published(uri, arch, image_px, qk_norm)
    backbone = VisionTransformer(arch, image_px, qk_norm=qk_norm)
    backbone.load_state_dict(published.state, strict=True)
    return Network(name, backbone.eval(), arch, image_px, f"sha256:{published.sha256}")


def _last_part(uri: str) -> str:
    return PurePosixPath(uri.rstrip("/")).name
