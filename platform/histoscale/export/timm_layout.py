"""The EMA teacher's backbone as timm has it: `model.safetensors`, `config.json` and a model card.

Parameter names and shapes are timm's already, so the weights are written as they are. `config.json` is in the form
that timm itself reads, and marks the folder as an export of ours.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from histoscale.augment.colour import IMAGENET_MEAN, IMAGENET_STD
from histoscale.checkpoint.manifest import Commit
from histoscale.config.archs import ARCHS, Arch
from histoscale.config.recipe import Recipe
from histoscale.errors import ExportError
from histoscale.evaluate.backbone import trained_backbone
from histoscale.export.model_card import model_card
from histoscale.export.timm_import import import_timm
from histoscale.models import VisionTransformer
from histoscale.storage import Store, open_store

FORMAT_VERSION = 1
FORMATS = ("timm",)
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
MAX_DIFFERENCE = 1e-3  # of tokens after the final norm, which are of order 1; rounding leaves about 1e-5
OURS = "histoscale"
_PARITY_IMAGES = 2
# timm's model of about the same width, so that the name says the size; every argument is given beside it.
_NAME_BY_WIDTH = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
    1280: "vit_huge_patch14_224",
    1536: "vit_giant_patch14_224",
    1664: "vit_gigantic_patch14_224",
}


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        uri: The folder.
        step: Optimiser steps of the checkpoint.
        parameters: How many the backbone has.
        difference: Largest absolute difference between all tokens of timm's model and of ours, on random images; None
            where timm could not be imported, hence nothing was compared.
    """

    uri: str
    step: int
    parameters: int
    difference: float | None


def export_run(
    run_store: Store, recipe: Recipe, out_uri: str, layout: str = "timm", origins: Sequence[str] = ()
) -> ExportResult:
    """Write the backbone of a run's newest checkpoint to a folder, once timm's model was seen to equal ours.

    Args:
        run_store: The run folder.
        recipe: The run's.
        out_uri: The folder.
        layout: One of `FORMATS`.
        origins: Lines on the weights that the run learnt from beside slides, for the model card and the configuration.

    Raises:
        ExportError: No such layout, the folder holds something else, or timm's model computes something else.
        CheckpointError: The run has no usable checkpoint.
    """
    if layout not in FORMATS:
        raise ExportError(
            "no such export format", value=layout, expected=" or ".join(FORMATS), remedy="give one of these as --format"
        )
    out = open_store(out_uri)
    _refuse_strangers(out)
    backbone, commit = trained_backbone(run_store, recipe)
    with tempfile.TemporaryDirectory(prefix="histoscale-export-") as scratch:
        folder = Path(scratch)
        write_layout(folder, backbone, recipe, commit, origins)
        difference = parity(folder, backbone, recipe.crops.global_px) if timm_is_usable() else None
        if difference is not None:
            require_equal(difference)
        # The configuration goes first: it marks the folder, and its checksum tells weights of another export.
        for name in (CONFIG, CARD, WEIGHTS):
            out.upload(folder / name, name)
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    return ExportResult(out.uri, commit.step, parameters, difference)


def write_layout(
    folder: Path, backbone: VisionTransformer, recipe: Recipe, commit: Commit, origins: Sequence[str] = ()
) -> None:
    """Write the three files of an export into a local folder."""
    weights: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    name, arguments = timm_model(recipe)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": ARCHS[recipe.model.arch].width,
        "global_pool": "",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, recipe.crops.global_px, recipe.crops.global_px],
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
        },
        OURS: {
            "format": FORMAT_VERSION,
            "recipe": commit.fingerprint,
            "step": commit.step,
            "images_seen": commit.images_seen,
            "teacher": commit.teacher,
            "origins": list(origins),
            "sha256": {WEIGHTS: _sha256(folder / WEIGHTS)},
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / CARD).write_text(model_card(recipe, commit, name, arguments, origins))


def timm_model(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which `timm.create_model` builds the backbone of a recipe."""
    arch = ARCHS[recipe.model.arch]
    name = _NAME_BY_WIDTH.get(arch.width, "vit_base_patch16_224")
    return name, timm_arguments(arch, recipe.crops.global_px, recipe.model.qk_norm)


def timm_arguments(arch: Arch, image_px: int, qk_norm: bool) -> dict[str, Any]:
    """What `timm.create_model` must be told to build a backbone."""
    first_layer = 2 * arch.ffn_hidden if arch.ffn == "swiglu" else arch.ffn_hidden
    arguments: dict[str, Any] = {
        "img_size": image_px,
        "patch_size": arch.patch_px,
        "embed_dim": arch.width,
        "depth": arch.depth,
        "num_heads": arch.heads,
        "mlp_ratio": first_layer / arch.width,
        "reg_tokens": arch.registers,
        "num_classes": 0,
        "global_pool": "",
        "dynamic_img_size": True,
    }
    if arch.layer_scale is not None:
        arguments["init_values"] = arch.layer_scale
    if qk_norm:
        arguments["qk_norm"] = True
    if arch.ffn == "swiglu":
        arguments |= {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    return arguments


def load_in_timm(folder: Path) -> nn.Module:
    """Load an export into timm's model, every weight in its place, in evaluation mode.

    Raises:
        ExportError: timm is not installed.
    """
    timm = import_timm()
    config = json.loads((folder / CONFIG).read_text())
    arguments = config["model_args"]
    if "mlp_layer" in arguments:  # timm takes this one as a class only
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    model: nn.Module = timm.create_model(config["architecture"], pretrained=False, **arguments)
    model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    return model.eval()


@torch.inference_mode()
def parity(folder: Path, backbone: VisionTransformer, image_px: int) -> float:
    """Largest absolute difference between all tokens of timm's model and of ours, on random images, in fp32."""
    images_B3HW = torch.randn(_PARITY_IMAGES, 3, image_px, image_px, generator=torch.Generator().manual_seed(0))
    theirs_BTD = load_in_timm(folder)(images_B3HW)
    return float((theirs_BTD - backbone(images_B3HW)).abs().max())


def require_equal(difference: float) -> None:
    """Refuse an export that computes something else in timm.

    Raises:
        ExportError: The difference is more than rounding leaves.
    """
    if not difference <= MAX_DIFFERENCE:
        raise ExportError(
            "timm's model computes something else than ours",
            value=difference,
            expected=f"a difference of tokens of at most {MAX_DIFFERENCE:g}",
            remedy="nothing was written; install a version of timm that constraints.txt allows",
        )


def timm_is_usable() -> bool:
    """Whether timm is installed and imports here."""
    try:
        import_timm()
    except (ExportError, ImportError, RuntimeError):  # a torchvision that does not fit torch raises either
        return False
    return True


def _refuse_strangers(out: Store) -> None:
    keys = [info.key for info in out.list()]
    if not keys:
        return
    stranger = next((key for key in keys if key not in (WEIGHTS, CONFIG, CARD)), None)
    if stranger is not None or CONFIG not in keys or not _is_ours(out.get(CONFIG)):
        raise ExportError(
            f"{out.uri} holds something else than an export",
            value=stranger or keys[0],
            expected="an empty folder or an earlier export, which is overwritten",
            remedy="give another place with --out",
        )


def _is_ours(config: bytes) -> bool:
    try:
        return OURS in json.loads(config)
    except (ValueError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
