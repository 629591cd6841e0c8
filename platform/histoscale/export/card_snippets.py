"""How to load an export: text of its card that runs as it stands in its folder, and its configuration for eva."""

from collections.abc import Iterator

from histoscale.augment.colour import IMAGENET_MEAN, IMAGENET_STD
from histoscale.config.archs import Arch
from histoscale.export.marker import Marker
from histoscale.export.timm_layout import timm_model

_OF_TIMM = """\
model.load_state_dict(load_file("model.safetensors"), strict=True)  # every tensor used, none missing
model.eval()
"""
_PLAIN = """\
import torch
from PIL import Image
from vit import Vit, preprocess  # vit.py of this folder

model = Vit(".")  # refuses a file with a tensor missing, left over or of another shape
tile = Image.new("RGB", (256, 256), "white")  # your tile here
embedding = model.embed(preprocess(model, tile)[None])
"""
_OF_TRANSFORMERS = """\
import torch
from transformers import AutoModel

model, found = AutoModel.from_pretrained(".", output_loading_info=True)
if any(found.values()):  # a tensor that is missing, left over or of another shape
    raise ValueError(found)
model.eval()
"""


def how_to_load(marker: Marker, arch: Arch) -> Iterator[str]:
    """The sections of the card, one code block for each way."""
    yield from ("## Load it", "", "Each block runs as it stands, in this folder.", "")
    if marker.layout == "timm":
        yield from ("### timm", "", "```python", _timm(marker, arch).rstrip(), "```", "")
        yield "timm imports torchvision, which must be the build that belongs to your torch; one from PyPI fails beside"
        yield "a CPU build."
        yield ""
    else:
        yield from ("### transformers", "", "```python", _transformers(marker, arch).rstrip(), "```", "")
        yield '`AutoImageProcessor.from_pretrained(".")` prepares Pillow images likewise. Versions from 4.48 on'
        yield "read the folder. `pooler_output` is the class token. The mask token is zero: only masked images meet it."
        yield ""
    yield from ("### Plain torch", "", "Needs torch, safetensors, numpy and Pillow alone.", "")
    yield from ("```python", _PLAIN.rstrip(), "```", "")
    yield from ("### TRIDENT and eva", "")
    yield "`use_with_trident.py` gives a patch encoder for TRIDENT (`from use_with_trident import encoder`);"
    yield "`use_with_eva.py` and `eva.yaml` a backbone for kaiko's eva. Both need this folder on `PYTHONPATH`."
    yield ""


def eva_yaml(marker: Marker, arch: Arch) -> str:
    """The parts of a configuration of eva that name the model."""
    return f"""\
# The parts of an offline configuration of eva (github.com/kaiko-ai/eva) that name this model. Put each in the place
# of the same key, and run eva with the folder of this file on PYTHONPATH:
#     PYTHONPATH=FOLDER eva predict_fit --config CONFIG.yaml
# Scale is not part of a configuration: take tasks at a scale that README.md names.
backbone:  # of eva.callbacks.ClassificationEmbeddingsWriter
  class_path: eva.models.ModelFromFunction
  init_args:
    path: use_with_eva.embedding
    arguments:
      with_patch_mean: true
head:  # of eva.HeadModule; out_features is the task's
  class_path: torch.nn.Linear
  init_args:
    in_features: {2 * arch.width}
transforms:  # of the datasets under `predict`
  class_path: eva.vision.data.transforms.common.ResizeAndCrop
  init_args:
    size: {marker.image_px}
    mean: {list(IMAGENET_MEAN)}
    std: {list(IMAGENET_STD)}
"""


def _timm(marker: Marker, arch: Arch) -> str:
    name, arguments = timm_model(arch, marker.image_px, marker.qk_norm)
    shown = {key: repr(value) for key, value in arguments.items()}
    if "mlp_layer" in arguments:
        shown["mlp_layer"] = f"timm.layers.{arguments['mlp_layer']}"
    built = "".join(f"    {key}={text},\n" for key, text in shown.items())
    return (
        "import timm\nimport torch\nfrom safetensors.torch import load_file\n\n"
        f'model = timm.create_model(\n    "{name}",\n    pretrained=False,\n{built})\n'
        + _OF_TIMM
        + _normalised(marker)
        + "with torch.inference_mode():\n    tokens = model((tiles - mean) / std)\n"
        + _embedding(arch)
    )


def _transformers(marker: Marker, arch: Arch) -> str:
    text = (
        _OF_TRANSFORMERS
        + _normalised(marker)
        + "with torch.inference_mode():\n    tokens = model(pixel_values=(tiles - mean) / std).last_hidden_state\n"
    )
    return text + _embedding(arch)


def _normalised(marker: Marker) -> str:
    return (
        f"\nmean = torch.tensor({list(IMAGENET_MEAN)}).view(3, 1, 1)\n"
        f"std = torch.tensor({list(IMAGENET_STD)}).view(3, 1, 1)\n"
        f"tiles = torch.rand(1, 3, {marker.image_px}, {marker.image_px})  # RGB in [0, 1]\n"
    )


def _embedding(arch: Arch) -> str:
    return f"embedding = torch.cat([tokens[:, 0], tokens[:, {1 + arch.registers}:].mean(dim=1)], dim=1)\n"
