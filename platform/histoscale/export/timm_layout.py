"""A backbone as timm has it. Parameter names and shapes are timm's already: the weights are written as they are."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from histoscale.augment.colour import IMAGENET_MEAN, IMAGENET_STD
from histoscale.config.archs import Arch
from histoscale.export.marker import CONFIG, WEIGHTS, Marker
from histoscale.export.timm_import import import_timm

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


def timm_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What goes into `model.safetensors`."""
    return {name: tensor.contiguous() for name, tensor in state.items()}


def timm_files(arch: Arch, marker: Marker) -> dict[str, str]:
    """Name and content of what timm reads beside the weights."""
    name, arguments = timm_model(arch, marker.image_px, marker.qk_norm)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": arch.width,
        "global_pool": "",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, marker.image_px, marker.image_px],
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
        },
    }
    return {CONFIG: json.dumps(config, indent=2) + "\n"}


def timm_model(arch: Arch, image_px: int, qk_norm: bool) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which `timm.create_model` builds a backbone."""
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
    return _NAME_BY_WIDTH.get(arch.width, "vit_base_patch16_224"), arguments


def load_in_timm(folder: Path) -> nn.Module:
    """Timm's model of an export, every weight in its place, in evaluation mode.

    Raises:
        ExportError: timm is not installed.
        RuntimeError: A tensor is missing, unexpected or of another shape.
    """
    timm = import_timm()
    config = json.loads((folder / CONFIG).read_text())
    arguments = config["model_args"]
    if "mlp_layer" in arguments:  # timm takes this one as a class only
        arguments["mlp_layer"] = getattr(timm.layers, arguments["mlp_layer"])
    model: nn.Module = timm.create_model(config["architecture"], pretrained=False, **arguments)
    model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    return model.eval()
