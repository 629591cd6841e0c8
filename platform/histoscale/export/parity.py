"""How far an export's weights, in another implementation, are from the network that was trained.

Shape suffixes: B images, T tokens, D width.
"""

import importlib
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from histoscale.augment.colour import normalise
from histoscale.errors import ExportError
from histoscale.evaluate.datasets import Tile
from histoscale.export.huggingface_layout import load_in_transformers
from histoscale.export.shipped.vit import Vit
from histoscale.export.timm_import import import_timm, name_operators_of_torchvision
from histoscale.export.timm_layout import load_in_timm
from histoscale.models import VisionTransformer

PARITY = "parity.json"
MAX_DIFFERENCE = 1e-3  # of tokens after the final norm, which are of order 1; rounding in fp32 leaves about 1e-5
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROVEN = "fp32"
PLAIN = "vit.py of this folder"
_LIBRARIES = {"timm": "timm", "huggingface": "transformers"}


@dataclass(frozen=True)
class ParityTiles:
    """What the networks are shown.

    Attributes:
        tiles: uint8 [h, w, 3] each.
        source: Where they come from, for people; no path.
    """

    tiles: tuple[Tile, ...]
    source: str


@dataclass(frozen=True)
class Difference:
    """One row of the table: one kind of token, in one precision, at one size, against one implementation.

    Attributes:
        implementation: Whose, with its version.
        precision: Of both networks.
        image_px: Side of the images.
        tokens: `class`, `register` or `patch`.
        largest: Of all absolute differences.
        relative: The same over the largest magnitude of ours.
        cosine: The smallest between a token and its counterpart.
    """

    implementation: str
    precision: str
    image_px: int
    tokens: str
    largest: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class Parity:
    """The proof of an export.

    Attributes:
        layout: Of the export.
        tiles: How many were shown.
        source: Where they come from.
        rows: The table.
        notes: Which implementation could not be asked, and why.
    """

    layout: str
    tiles: int
    source: str
    rows: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> float:
        """Of all absolute differences in fp32."""
        return max((row.largest for row in self.rows if row.precision == PROVEN), key=_worst)

    def lines(self) -> Iterator[str]:
        """For people: the largest difference of each implementation in each precision, and what was not asked."""
        for name, precision in dict.fromkeys((row.implementation, row.precision) for row in self.rows):
            found = [row.largest for row in self.rows if (row.implementation, row.precision) == (name, precision)]
            yield f"largest difference of tokens between {name} and ours in {precision}: {max(found, key=_worst):.2e}"
        yield f"over {self.tiles} tiles: {self.source}"
        yield from self.notes

    def encode(self) -> str:
        """As JSON."""
        return json.dumps({"format": 1, "limit_fp32": MAX_DIFFERENCE, **asdict(self)}, indent=1) + "\n"


def prove(folder: Path, layout: str, backbone: VisionTransformer, image_px: int, shown: ParityTiles) -> Parity:
    """Compare an export in a local folder with the network that it was made from, and refuse what differs.

    Args:
        folder: Of the export.
        layout: Of the export.
        backbone: The network, fp32, in evaluation mode.
        image_px: Side of the images that it was trained at; images of two patches more are compared, too.
        shown: The tiles.

    Raises:
        ExportError: An implementation computes something else, or does not load the export.
    """
    implementations, notes = implementations_of(folder, layout)
    step_px = image_px // backbone.grid
    rows = [
        row
        for side_px in (image_px, image_px + 2 * step_px)
        for row in compare(backbone, implementations, images_of(shown.tiles, side_px))
    ]
    found = Parity(layout, len(shown.tiles), shown.source, tuple(rows), tuple(notes))
    require_equal(found)
    return found


def implementations_of(folder: Path, layout: str) -> tuple[dict[str, nn.Module], list[str]]:
    """Other networks with the weights of an export, by name and version; and a note on what is not installed here."""
    found: dict[str, nn.Module] = {}
    notes = []
    library = _LIBRARIES[layout]
    try:
        if is_usable(library):
            loaded = load_in_timm(folder) if layout == "timm" else load_in_transformers(folder)
            found[f"{library} {version(library)}"] = loaded
        else:
            notes.append(f"{library} does not import here: its model was not compared, the one of {PLAIN} was")
        found[PLAIN] = Vit(folder)
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            "the export does not load: its tensors are not those that its configuration asks for",
            value=" ".join(str(error).split())[:300],
            expected="every tensor used, none missing, none of another shape",
            remedy="nothing was written; install a version that constraints.txt allows",
        ) from error
    return found, notes


def is_usable(library: str) -> bool:
    """Whether timm or transformers is installed and imports here."""
    try:
        version(library)
        if library == "timm":
            import_timm()
        else:
            name_operators_of_torchvision()
            importlib.import_module("transformers.models.dinov2_with_registers.modeling_dinov2_with_registers")
    except (ExportError, ImportError, RuntimeError, PackageNotFoundError):  # a torchvision that does not fit torch
        return False
    return True


@torch.inference_mode()
def compare(ours: VisionTransformer, others: dict[str, nn.Module], images_B3HW: Tensor) -> list[Difference]:
    """The rows of each of the other networks, in every precision.

    Args:
        ours: fp32, in evaluation mode.
        others: By name; likewise.
        images_B3HW: fp32, normalised.
    """
    rows = []
    for precision, dtype in PRECISIONS.items():
        images, wanted_BTD = images_B3HW.to(dtype), _tokens(ours, images_B3HW, dtype)
        spans = {"class": slice(1), "register": slice(1, ours.prefix_tokens), "patch": slice(ours.prefix_tokens, None)}
        for name, other in others.items():
            got_BTD = _tokens(other, images, dtype)
            rows += [
                _difference((name, precision, images.shape[-1], kind), wanted_BTD[:, span], got_BTD[:, span])
                for kind, span in spans.items()
                if wanted_BTD[:, span].numel()
            ]
    return rows


def images_of(tiles: Sequence[Tile], side_px: int) -> Tensor:
    """Tiles as the networks see them: fp32 [B, 3, S, S], cropped to squares, resized and normalised."""
    fitted = [ImageOps.fit(Image.fromarray(tile), (side_px, side_px), Image.Resampling.BICUBIC) for tile in tiles]
    pixels_BHW3 = torch.from_numpy(np.stack([np.asarray(image) for image in fitted]))
    return normalise(pixels_BHW3.permute(0, 3, 1, 2).float() / 255.0)


def require_equal(parity: Parity) -> None:
    """Refuse an export that computes something else in another implementation.

    Raises:
        ExportError: The difference is more than rounding leaves.
    """
    worst = max((row for row in parity.rows if row.precision == PROVEN), key=lambda row: _worst(row.largest))
    if not worst.largest <= MAX_DIFFERENCE:
        raise ExportError(
            f"{worst.implementation} computes something else than the network that was trained",
            value=f"{worst.largest:.3g} of a {worst.tokens} token at {worst.image_px} px",
            expected=f"a difference of tokens of at most {MAX_DIFFERENCE:g}",
            remedy="nothing was written; install a version that constraints.txt allows",
        )


def _tokens(network: nn.Module, images_B3HW: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 [B, T, D] of a network in a precision, one image at a time: memory stays that of one."""
    cast = network if dtype == torch.float32 else deepcopy(network).to(dtype)
    return torch.cat([cast(image[None].to(dtype)).float() for image in images_B3HW])


def _difference(row: tuple[str, str, int, str], wanted: Tensor, got: Tensor) -> Difference:
    largest = float((got - wanted).abs().max())
    cosine = float(F.cosine_similarity(got, wanted, dim=-1).min())
    return Difference(*row, largest, largest / max(float(wanted.abs().max()), 1e-12), cosine)


def _worst(value: float) -> float:
    """NaN is worse than any number."""
    return value if value == value else float("inf")
