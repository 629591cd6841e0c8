"""Published weights of a DINOv2 backbone, in timm's layout, Meta's or Hugging Face's, as the state of our backbone.

Every tensor of the file is used or named, and every parameter of the backbone is filled or named. A position embedding
that lands in the wrong rows, or a tensor that is left out in silence, still trains: only to a worse model.

Shape suffixes: T rows of the position embedding, g rows and columns of patches in the file, w wanted ones, D width.
"""

import hashlib
import math
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from histoscale.config.archs import ARCHS, Arch
from histoscale.config.recipe import Recipe
from histoscale.errors import ModelError
from histoscale.models.huggingface import CLASS_TOKEN, MASK_TOKEN, from_huggingface
from histoscale.models.vit import VisionTransformer
from histoscale.storage import Store, open_store

Layout: TypeAlias = Literal["timm", "meta", "huggingface"]
Shapes: TypeAlias = dict[str, tuple[int, ...]]

_POSITIONS = "pos_embed"
_WRAPPERS = ("teacher", "model")  # of a training checkpoint, the better one first
_PREFIXES = ("teacher.backbone.", "backbone.", "")
_THEIR_PREFIXES = ("dinov2_with_registers.", "dinov2.", "")  # of transformers' classifiers, and of its backbones
_META_ONLY = re.compile(r"mask_token|register_tokens|blocks\.\d+\.\d+\..+|blocks\.\d+\.mlp\.w\d+\..+")
_BLOCK = re.compile(r"blocks\.(?:\d+\.)?(\d+)\.(.+)")  # Meta's chunks keep the number that a block has in the whole
_TIMM_NAMES = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}  # the first half of both packed layers is the gate
_NO_BACKBONE = {"mask_token", MASK_TOKEN, "head.weight", "head.bias"}


@dataclass(frozen=True)
class PublishedWeights:
    """The state of a backbone that a file gave.

    Attributes:
        state: fp32 tensors by the names of `VisionTransformer`, all of them but `fresh`.
        layout: Whose names the file has.
        sha256: Of the file.
        resized_from_grid: Rows of patches that the position embedding had before it was resampled; None if it fitted.
        unused: Tensors and entries of the file that are no part of a backbone, as it names them.
        fresh: Parameters that the file has nothing for: the norms of queries and keys.
    """

    state: dict[str, Tensor]
    layout: Layout
    sha256: str
    resized_from_grid: int | None
    unused: tuple[str, ...]
    fresh: tuple[str, ...]


def load_published(path: str, arch: Arch, image_px: int, qk_norm: bool = False) -> PublishedWeights:
    """Read the weights that a backbone starts from.

    The position embedding is resampled to the grid of `image_px` as timm does it: bicubic, antialiased, in fp32. Rows
    that the file has none for, those of registers in both layouts, are zero.

    Args:
        path: A path or a URI of a .safetensors or .pth file: a state dict, or a training checkpoint around one.
        arch: Shape of the backbone.
        image_px: Side of the images that its position embedding is made for.
        qk_norm: Whether it normalises queries and keys.

    Raises:
        ModelError: The file cannot be read, or holds another network than `arch`.
        StorageError: The file cannot be reached.
    """
    content, sha256 = _read(path)
    tensors, layout, unused = _backbone_of(content)
    if layout == "huggingface":
        named = from_huggingface(tensors, arch.layer_scale is not None)
    else:
        named = _in_our_names(tensors)
    fresh = _require_fit(named, arch, qk_norm)
    positions_1TD, grid = _split_positions(named[_POSITIONS], layout, arch)
    wanted = image_px // arch.patch_px
    state = {name: tensor.float().contiguous() for name, tensor in named.items()}
    state[_POSITIONS] = resample_positions(positions_1TD.float(), 1 + arch.registers, grid, wanted)
    resized_from_grid = None if grid == wanted else grid
    return PublishedWeights(state, layout, sha256, resized_from_grid, tuple(sorted(unused)), tuple(sorted(fresh)))


def load_for(recipe: Recipe, path: str) -> PublishedWeights:
    """Read the weights that the backbone of a recipe starts from; see `load_published`."""
    model = recipe.model
    return load_published(path, ARCHS[model.arch], recipe.crops.global_px, model.qk_norm)


def describe_published(path: str, weights: PublishedWeights) -> str:
    """A line for people: which weights a backbone starts from, and what of the file plays no part."""
    resized = f", positions resized from a grid of {weights.resized_from_grid}" if weights.resized_from_grid else ""
    unused = f", without {', '.join(weights.unused)}" if weights.unused else ""
    fresh = f", {len(weights.fresh)} norms of queries and keys drawn" if weights.fresh else ""
    return f"weights: {path} in {weights.layout}'s layout, sha256:{weights.sha256}{resized}{unused}{fresh}"


def located(uri: str) -> tuple[Store, str]:
    """The store of a file, and the file's name in it."""
    folder, _, name = uri.rpartition("/")
    return open_store(folder or ("/" if uri.startswith("/") else ".")), name


@contextmanager
def fetched(uri: str) -> Iterator[tuple[Path, str]]:
    """A file of weights on this machine, for as long as the block lasts, and its SHA-256.

    Raises:
        StorageError: It cannot be reached.
    """
    store, name = located(uri)
    with tempfile.TemporaryDirectory(prefix="histoscale-weights-") as scratch:
        path = store.local_path(name)
        if path is None or not path.is_file():
            path = Path(scratch) / name
            store.download(name, path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        yield path, sha256


def _read(uri: str) -> tuple[Any, str]:
    """What the file holds, and its SHA-256."""
    suffix = Path(uri).suffix
    if suffix not in (".safetensors", ".pth"):
        raise ModelError(
            "the weights are in no known format",
            value=uri,
            expected="a .safetensors or .pth file",
            remedy="save the model's state dict with safetensors",
        )
    with fetched(uri) as (path, sha256):
        try:
            content = load_file(path) if suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ModelError(
                "the weights cannot be read",
                value=" ".join(str(error).split())[:200],
                expected=f"a {suffix} file of tensors alone",
                remedy="fetch the file again, or save its state dict with safetensors",
            ) from error
    return content, sha256


def _backbone_of(content: object) -> tuple[dict[str, Tensor], Layout, list[str]]:
    """The backbone's tensors by their names in it, the layout of these, and the names of everything else."""
    tensors, siblings = _state_dict(content)
    theirs = next((prefix for prefix in _THEIR_PREFIXES if f"{prefix}{CLASS_TOKEN}" in tensors), None)
    prefix = theirs
    if prefix is None:
        prefix = next((prefix for prefix in _PREFIXES if f"{prefix}cls_token" in tensors), None)
    if prefix is None:
        raise ModelError(
            "the weights have no class token",
            value=f"{next(iter(tensors))} and others" if tensors else "no tensor at all",
            expected="cls_token, as timm and Meta name it, or Hugging Face's embeddings.cls_token",
            remedy="convert them to the layout of timm, of Meta's DINOv2 or of transformers",
        )
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    of_meta = any(_META_ONLY.fullmatch(name) for name in inside)
    layout: Layout = "huggingface" if theirs is not None else "meta" if of_meta else "timm"
    backbone = {name: tensor for name, tensor in inside.items() if name not in _NO_BACKBONE}
    unused = [name for name in tensors if not name.startswith(prefix) or name.removeprefix(prefix) in _NO_BACKBONE]
    return backbone, layout, siblings + unused


def _state_dict(content: object) -> tuple[Mapping[str, Tensor], list[str]]:
    """Tensors by name, and the names of what stands beside them in a training checkpoint."""
    siblings: list[str] = []
    if isinstance(content, Mapping):
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper is not None:
            siblings = [str(name) for name in content if name != wrapper]
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(
            "the weights are no state dict",
            value=type(content).__name__,
            expected=f"tensors by name, or a checkpoint with such under {' or '.join(_WRAPPERS)}",
            remedy="save the model's state dict alone, with safetensors",
        )
    return content, siblings


def _in_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under timm's names, which are ours."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = "reg_token" if name == "register_tokens" else name
        if block := _BLOCK.fullmatch(name):
            number, rest = block.groups()
            for meta, timm in _TIMM_NAMES.items():
                rest = timm + rest.removeprefix(meta) if rest.startswith(meta) else rest
            ours = f"blocks.{number}.{rest}"
        if ours in named:
            raise ModelError(
                "two tensors of the weights are for one place",
                value=name,
                expected=f"one for {ours}",
                remedy="leave one of the two out of the file",
            )
        named[ours] = tensor
    return named


def _require_fit(named: dict[str, Tensor], arch: Arch, qk_norm: bool) -> list[str]:
    """Refuse tensors that are not exactly the backbone's; returns those that may start afresh."""
    tokens = named[_POSITIONS].shape[1:2] if _POSITIONS in named else ()
    wanted = _shapes(arch, qk_norm) | {_POSITIONS: (1, *tokens, arch.width)}
    found: Shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    fresh = [] if _has_qk_norm(found) else [name for name in wanted if _has_qk_norm([name])]
    for name in [name for name in wanted if name not in fresh] + list(found):
        if found.get(name) != wanted.get(name):
            raise _misfit(name, found, wanted)
    return fresh


def _misfit(name: str, found: Shapes, wanted: Shapes) -> ModelError:
    """The error for one tensor."""
    if name not in found:
        what = f"the weights lack the tensor {name}"
    elif name not in wanted:
        what = f"the model has no place for the tensor {name} of the weights"
    else:
        what = f"the tensor {name} of the weights does not fit the model"
    return ModelError(
        what,
        value=list(found[name]) if name in found else None,
        expected=f"the shape {list(wanted[name])}" if name in wanted else None,
        remedy=_remedy(name, found),
    )


def _remedy(misfit: str, found: Shapes) -> str:
    """Which model the tensors are of."""
    if misfit == _POSITIONS:
        return "take weights with a learnt position embedding, as timm, Meta and Hugging Face store it"
    qk_norm = _has_qk_norm(found)
    shapes = {name: shape for name, shape in found.items() if name != _POSITIONS}
    fitting = [name for name, arch in ARCHS.items() if _shapes(arch, qk_norm) == shapes]
    if not fitting:
        return f"no model has just these tensors; take weights of one of {', '.join(ARCHS)}"
    return f"set model.arch to {' or '.join(fitting)}" + (" and model.qk_norm to true" if qk_norm else "")


def _shapes(arch: Arch, qk_norm: bool) -> Shapes:
    """Shapes of the backbone's parameters, save for the position embedding, whose length is the file's."""
    with torch.device("meta"):
        backbone = VisionTransformer(arch, arch.patch_px, qk_norm=qk_norm)
    return {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items() if name != _POSITIONS}


def _has_qk_norm(names: Mapping[str, Any] | list[str]) -> bool:
    return any(".q_norm." in name or ".k_norm." in name for name in names)


def _split_positions(rows_1TD: Tensor, layout: Layout, arch: Arch) -> tuple[Tensor, int]:
    """Position embedding with a row for each token that is no patch, and the grid of its patches.

    timm's has rows for all of these or for none of them, Meta's and Hugging Face's for the class token alone.
    """
    rows, prefix = rows_1TD.shape[1], 1 + arch.registers
    grids = {
        leading: math.isqrt(rows - leading)
        for leading in ({0, prefix} if layout == "timm" else {1})
        if rows > leading and math.isqrt(rows - leading) ** 2 == rows - leading
    }
    if len(grids) != 1:
        raise ModelError(
            f"the position embedding of the weights fits {len(grids)} square grids of patches",
            value=f"{rows} rows in the layout of {layout}",
            expected=f"a square and {f'none or {prefix} rows' if layout == 'timm' else 'one row'} before it",
            remedy="take weights that were trained on square images of more than 70 px",
        )
    ((leading, grid),) = grids.items()
    without_row_1TD = rows_1TD.new_zeros(1, prefix - leading, arch.width)
    return torch.cat([rows_1TD[:, :leading], without_row_1TD, rows_1TD[:, leading:]], dim=1), grid


def resample_positions(rows_1TD: Tensor, prefix: int, grid: int, wanted: int) -> Tensor:
    """Position embedding for another grid of patches, resampled as timm does it: bicubic, antialiased.

    Args:
        rows_1TD: fp32, `prefix` rows of tokens that are no patches, then `grid * grid` rows of patches.
        prefix: Rows that stay as they are.
        grid: Rows and columns of patches that there are.
        wanted: Rows and columns of patches that there shall be.
    """
    if grid == wanted:
        return rows_1TD.contiguous()
    head_1TD, patches_1TD = rows_1TD.tensor_split([prefix], dim=1)
    plane_1Dgg = patches_1TD.transpose(1, 2).reshape(1, -1, grid, grid)
    plane_1Dww = F.interpolate(plane_1Dgg, size=(wanted, wanted), mode="bicubic", antialias=True)
    return torch.cat([head_1TD, plane_1Dww.flatten(2).transpose(1, 2)], dim=1)
