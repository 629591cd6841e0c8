"""From a run's checkpoint to an export: weights in a layout that others load, their proof, and what they are."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from histoscale.checkpoint.manifest import Commit
from histoscale.config.archs import ARCHS, Arch
from histoscale.config.recipe import Recipe
from histoscale.errors import ExportError
from histoscale.evaluate.backbone import trained_backbone
from histoscale.export.about import About, gather
from histoscale.export.card_snippets import eva_yaml
from histoscale.export.huggingface_layout import huggingface_files, huggingface_tensors, require_huggingface_fit
from histoscale.export.marker import CARD, WEIGHTS, Marker, publish, require_own_place, sha256_of
from histoscale.export.model_card import licence_notice, model_card
from histoscale.export.parity import PARITY, Parity, ParityTiles, prove
from histoscale.export.tiles import procedural_tiles
from histoscale.export.timm_layout import timm_files, timm_tensors
from histoscale.models import VisionTransformer
from histoscale.storage import Store, open_store

FORMATS = ("timm", "huggingface")
SHIPPED = ("vit.py", "use_with_trident.py", "use_with_eva.py")
LICENCE, EVA = "LICENSE", "eva.yaml"

FindTiles = Callable[[Commit], ParityTiles]
"""Gives the tiles to prove with, once it is known which checkpoint is exported."""


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        uri: The folder.
        marker: What it says of itself.
        parameters: How many the backbone has.
        parity: The proof.
    """

    uri: str
    marker: Marker
    parameters: int
    parity: Parity


@dataclass(frozen=True)
class ExportRequest:
    """One call of the export.

    Attributes:
        out_uri: The folder.
        layout: One of `FORMATS`.
        step: Of the checkpoint; the newest one without it.
        licence: Under which the weights are given away.
    """

    out_uri: str
    layout: str = "timm"
    step: int | None = None
    licence: str | None = None


def export_run(
    run_store: Store, recipe: Recipe, request: ExportRequest, find_tiles: FindTiles | None = None
) -> ExportResult:
    """Write the backbone of a run's checkpoint to a folder, once other implementations were seen to equal it.

    Args:
        run_store: The run folder.
        recipe: The run's.
        request: What is wanted.
        find_tiles: What to prove with; drawn tissue without it.

    Raises:
        ExportError: No such layout, the backbone does not fit it, the folder holds something else, or an
            implementation computes something else.
        CheckpointError: The run has no usable checkpoint, or none of that step.
    """
    if request.layout not in FORMATS:
        raise ExportError(
            "no such export format",
            value=request.layout,
            expected=" or ".join(FORMATS),
            remedy="give one of these as --format",
        )
    if request.layout == "huggingface":
        require_huggingface_fit(recipe.model.arch, recipe.model.qk_norm)
    out = open_store(request.out_uri)
    backbone, commit = trained_backbone(run_store, recipe, request.step)
    about = gather(run_store, recipe, commit)
    marker = _marker(recipe, commit, about, request)
    require_own_place(out, marker)  # before the work; `publish` looks again
    image_px = recipe.crops.global_px
    shown = procedural_tiles(image_px, "none was asked for") if find_tiles is None else find_tiles(commit)
    with tempfile.TemporaryDirectory(prefix="histoscale-export-") as scratch:
        folder = Path(scratch)
        marker = replace(marker, sha256={WEIGHTS: write_model(folder, backbone, marker)})
        parity = prove(folder, request.layout, backbone, image_px, shown)
        (folder / PARITY).write_text(parity.encode())
        (folder / CARD).write_text(model_card(recipe, marker, about, parity))
        (folder / LICENCE).write_text(licence_notice(marker, about, recipe))
        marker = publish(out, folder, marker)
    return ExportResult(out.uri, marker, sum(parameter.numel() for parameter in backbone.parameters()), parity)


def write_model(folder: Path, backbone: VisionTransformer, marker: Marker) -> str:
    """Write what loads the model, weights included, into a local folder; gives the SHA-256 of the weights."""
    arch = ARCHS[marker.arch]
    save_file(_tensors(dict(backbone.state_dict()), arch, marker), folder / WEIGHTS, metadata={"format": "pt"})
    described = timm_files(arch, marker) if marker.layout == "timm" else huggingface_files(arch, marker)
    for name, text in (described | {EVA: eva_yaml(marker, arch)}).items():
        (folder / name).write_text(text)
    for name in SHIPPED:
        (folder / name).write_bytes(files("histoscale.export.shipped").joinpath(name).read_bytes())
    return sha256_of(folder / WEIGHTS)


def _tensors(state: dict[str, Tensor], arch: Arch, marker: Marker) -> dict[str, Tensor]:
    return timm_tensors(state) if marker.layout == "timm" else huggingface_tensors(state, arch)


def _marker(recipe: Recipe, commit: Commit, about: About, request: ExportRequest) -> Marker:
    return Marker(
        layout=request.layout,
        arch=recipe.model.arch,
        image_px=recipe.crops.global_px,
        qk_norm=recipe.model.qk_norm,
        recipe=commit.fingerprint,
        snapshot=about.snapshot,
        step=commit.step,
        images_seen=commit.images_seen,
        teacher=commit.teacher,
        licence=request.licence,
        origins=about.origins,
        sha256={},
    )
