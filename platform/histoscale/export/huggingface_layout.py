"""A backbone as transformers' `Dinov2WithRegistersModel` reads it, also where it has no registers.

`Dinov2Model`, which has none, resamples its position embedding without antialiasing, so that it would give other tokens
than ours at every size of image but the trained one; the model with registers takes zero of them as well.
"""

import importlib
import importlib.util
import json
from pathlib import Path

from torch import Tensor, nn

from histoscale.augment.colour import IMAGENET_MEAN, IMAGENET_STD
from histoscale.config.archs import ARCHS, Arch
from histoscale.errors import ExportError
from histoscale.export.marker import CONFIG, Marker
from histoscale.export.timm_import import name_operators_of_torchvision
from histoscale.models.huggingface import to_huggingface
from histoscale.models.vit import NORM_EPS

PREPROCESSOR = "preprocessor_config.json"
_BICUBIC = 3  # Pillow's number


def huggingface_tensors(state: dict[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """What goes into `model.safetensors`."""
    return to_huggingface(state, gated=arch.ffn == "swiglu")


def huggingface_files(arch: Arch, marker: Marker) -> dict[str, str]:
    """Name and content of what transformers reads beside the weights."""
    config = {
        "architectures": ["Dinov2WithRegistersModel"],
        "model_type": "dinov2_with_registers",
        "hidden_size": arch.width,
        "num_hidden_layers": arch.depth,
        "num_attention_heads": arch.heads,
        "mlp_ratio": _mlp_ratio(arch),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "layer_norm_eps": NORM_EPS,
        "image_size": marker.image_px,
        "patch_size": arch.patch_px,
        "num_channels": 3,
        "qkv_bias": True,
        "layerscale_value": 1.0 if arch.layer_scale is None else arch.layer_scale,
        "use_swiglu_ffn": arch.ffn == "swiglu",
        "num_register_tokens": arch.registers,
        "torch_dtype": "float32",
    }
    side_px = marker.image_px
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side_px},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side_px, "width": side_px},
        "do_rescale": True,
        "rescale_factor": 1.0 / 255.0,
        "do_normalize": True,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    }
    return {CONFIG: json.dumps(config, indent=2) + "\n", PREPROCESSOR: json.dumps(preprocessor, indent=2) + "\n"}


def require_huggingface_fit(name: str, qk_norm: bool) -> None:
    """Refuse a backbone that transformers' model cannot hold.

    Args:
        name: Of its shape.
        qk_norm: Whether it normalises queries and keys.

    Raises:
        ExportError: Names what does not fit.
    """
    arch, misfits = ARCHS[name], []
    if qk_norm:
        misfits.append("norms of queries and keys (model.qk_norm)")
    if _mlp_ratio(arch) is None:
        misfits.append(f"an MLP of width {arch.ffn_hidden}, which no whole mlp_ratio gives at width {arch.width}")
    if misfits:
        raise ExportError(
            "transformers' Dinov2WithRegistersModel cannot hold this backbone",
            value=f"{name} with {' and '.join(misfits)}",
            expected="plain attention, and an MLP whose width is a whole multiple of the token's",
            remedy="export it with --format timm",
        )


def load_in_transformers(folder: Path) -> nn.Module:
    """Transformers' model of an export, every weight in its place, in evaluation mode.

    Raises:
        ExportError: transformers is not installed, or tensors are missing, unexpected or of another shape.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ExportError(
            "transformers is not installed",
            expected="transformers 4.48 or newer",
            remedy="run pip install 'histoscale[export]'",
        )
    name_operators_of_torchvision()
    transformers = importlib.import_module("transformers")
    model, found = transformers.AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if wrong:
        raise ExportError(
            "transformers does not load every tensor of the export into its place",
            value="; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in wrong.items()),
            expected="every tensor used, none missing, none of another shape",
            remedy="nothing was written; install a version of transformers that constraints.txt allows",
        )
    return _Tokens(model.eval())


class _Tokens(nn.Module):
    """A model of transformers that gives its tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Tokens [B, T, D] after the final norm."""
        tokens: Tensor = self.model(pixel_values=images_B3HW).last_hidden_state
        return tokens


def _mlp_ratio(arch: Arch) -> int | None:
    """The whole number that gives the MLP's width; None where none does. Versions from 5 on take no other number."""
    for ratio in range(1, 9):
        plain = arch.width * ratio
        hidden = plain if arch.ffn == "mlp" else (int(plain * 2 / 3) + 7) // 8 * 8
        if hidden == arch.ffn_hidden:
            return ratio
    return None
