"""The README of an exported model: what it is, and how to load it."""

from collections.abc import Sequence
from typing import Any

from histoscale.augment.colour import IMAGENET_MEAN, IMAGENET_STD
from histoscale.checkpoint.manifest import Commit
from histoscale.config.archs import ARCHS
from histoscale.config.recipe import Recipe
from histoscale.units import describe_mpp


def model_card(
    recipe: Recipe, commit: Commit, name: str, arguments: dict[str, Any], origins: Sequence[str] = ()
) -> str:
    """Markdown text whose Python block runs as it stands in the folder of the export."""
    arch, side_px = ARCHS[recipe.model.arch], recipe.crops.global_px
    prefix = 1 + arch.registers
    patches = (side_px // arch.patch_px) ** 2
    scales = ", ".join(describe_mpp(entry.mpp) for entry in recipe.data.mix)
    how = "pretrained by self-supervision" if recipe.distill is None else "distilled from a larger network"
    learnt = "".join(f"| learnt from | {origin} |\n" for origin in origins)
    return f"""# {recipe.model.arch}

A vision transformer, {how} on whole-slide images with histoscale.
These are the weights of the moving average of the trained network.

| | |
|---|---|
| recipe | `{commit.fingerprint}` |
| optimiser steps | {commit.step:,} |
| tiles seen | {commit.images_seen:,} |
| magnifications | {scales} |
{learnt}| input | {side_px} x {side_px} px, RGB in [0, 1], mean {IMAGENET_MEAN}, standard deviation {IMAGENET_STD} |
| tokens | 1 class, {arch.registers} register, {patches} patch tokens of width {arch.width}, after the final norm |
| embedding | class token ++ mean of the patch tokens: {2 * arch.width} numbers |

## Use

```python
{_snippet(name, arguments, side_px, prefix)}```

timm imports torchvision, which must be the build that belongs to your torch; one from PyPI fails beside a CPU build.

Resize tiles bicubically with antialiasing to {side_px} px. The input may have other sides that are multiples of
{arch.patch_px} px: the position embedding is resampled.

No model for clinical use. Whether it may be used, and for what, is for those to say whose slides it was trained on.
"""


def _snippet(name: str, arguments: dict[str, Any], side_px: int, prefix: int) -> str:
    imports = ["import timm", "import torch", "from safetensors.torch import load_file"]
    shown = {key: repr(value) for key, value in arguments.items()}
    if "mlp_layer" in arguments:
        shown["mlp_layer"] = f"timm.layers.{arguments['mlp_layer']}"
    lines = [
        *imports,
        "",
        "model = timm.create_model(",
        f'    "{name}",',
        "    pretrained=False,",
        *(f"    {key}={text}," for key, text in shown.items()),
        ")",
        'model.load_state_dict(load_file("model.safetensors"), strict=True)',
        "model.eval()",
        "",
        f"mean = torch.tensor({list(IMAGENET_MEAN)}).view(3, 1, 1)",
        f"std = torch.tensor({list(IMAGENET_STD)}).view(3, 1, 1)",
        f"tiles = torch.rand(1, 3, {side_px}, {side_px})  # RGB in [0, 1]",
        "with torch.inference_mode():",
        "    tokens = model((tiles - mean) / std)",
        f"embedding = torch.cat([tokens[:, 0], tokens[:, {prefix}:].mean(dim=1)], dim=1)",
        "",
    ]
    return "\n".join(lines)
