"""A backbone's tensors under the names of transformers' `Dinov2WithRegistersModel`, and back under ours.

The two networks are the same but for what each keeps apart. Theirs adds no position to the registers, so a register's
row of our position embedding is added to the register itself. Theirs always has LayerScale, which is one where ours has
none. Theirs has a mask token, which no image without a mask ever meets.

The names are those that weights on the Hub have had since transformers 4.31; version 5 renames them while it loads.

Shape suffixes: D width, R registers, T rows of the position embedding.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

CLASS_TOKEN = "embeddings.cls_token"
MASK_TOKEN = "embeddings.mask_token"
_REGISTERS, _POSITIONS = "embeddings.register_tokens", "embeddings.position_embeddings"
_WHOLE = {
    "cls_token": CLASS_TOKEN,
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_IN_BLOCK = {
    "norm1.": "norm1.",
    "norm2.": "norm2.",
    "attn.proj.": "attention.output.dense.",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}
_MLP = {"mlp.fc1.": "mlp.fc1.", "mlp.fc2.": "mlp.fc2."}
_GATED_MLP = {"mlp.fc1.": "mlp.weights_in.", "mlp.fc2.": "mlp.weights_out."}
_QKV = ("attention.attention.query.", "attention.attention.key.", "attention.attention.value.")
_OUR_BLOCK, _THEIR_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)"), re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_GAMMA = re.compile(r"blocks\.\d+\.ls[12]\.gamma")


def to_huggingface(state: Mapping[str, Tensor], gated: bool) -> dict[str, Tensor]:
    """The tensors of a backbone without norms of queries and keys, under their names.

    Args:
        state: Of a `VisionTransformer`, fp32.
        gated: Whether its MLP is SwiGLU.
    """
    positions_1TD = state["pos_embed"]
    depth = 1 + max(int(found[1]) for found in map(_OUR_BLOCK.fullmatch, state) if found)
    width = positions_1TD.shape[-1]
    reg_1RD = state.get("reg_token", positions_1TD.new_zeros(1, 0, width))
    registers = reg_1RD.shape[1]
    named = {theirs: state[ours] for ours, theirs in _WHOLE.items()}
    named[MASK_TOKEN] = positions_1TD.new_zeros(1, width)
    named[_REGISTERS] = reg_1RD + positions_1TD[:, 1 : 1 + registers]
    named[_POSITIONS] = torch.cat([positions_1TD[:, :1], positions_1TD[:, 1 + registers :]], dim=1)
    names = _IN_BLOCK | (_GATED_MLP if gated else _MLP)
    for at in range(depth):
        for scale in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
            named[f"encoder.layer.{at}.{scale}"] = positions_1TD.new_ones(width)
    for name, tensor in state.items():
        if not (block := _OUR_BLOCK.fullmatch(name)):
            continue
        number, rest = block.groups()
        if rest.startswith("attn.qkv."):
            for part, kind in zip(tensor.chunk(3), _QKV, strict=True):
                named[f"encoder.layer.{number}.{kind}{rest.removeprefix('attn.qkv.')}"] = part
            continue
        ours = next(prefix for prefix in names if rest.startswith(prefix))
        named[f"encoder.layer.{number}.{names[ours]}{rest.removeprefix(ours)}"] = tensor
    return {name: tensor.contiguous() for name, tensor in named.items()}


def from_huggingface(tensors: Mapping[str, Tensor], layer_scale: bool) -> dict[str, Tensor]:
    """Their tensors under our names; a tensor of no known name keeps it, so that whoever checks the fit names it.

    The position embedding keeps its row of the class token alone, as Meta stores it.

    Args:
        tensors: By their names; the mask token is left out.
        layer_scale: Whether our backbone has LayerScale; without it, factors that are all one are left out.
    """
    whole = {theirs: ours for ours, theirs in _WHOLE.items()} | {_POSITIONS: "pos_embed", _REGISTERS: "reg_token"}
    in_block = {theirs: ours for ours, theirs in (_IN_BLOCK | _MLP).items()}
    in_block |= {theirs: ours for ours, theirs in _GATED_MLP.items()}
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == MASK_TOKEN or (name == _REGISTERS and tensor.numel() == 0):
            continue
        block = _THEIR_BLOCK.fullmatch(name)
        if block is None:
            named[whole.get(name, name)] = tensor
            continue
        number, rest = block.groups()
        if rest.startswith(_QKV):
            packed = _packed(tensors, number, rest)
            named[f"blocks.{number}.attn.qkv.{rest.rpartition('.')[2]}" if packed is not None else name] = (
                tensor if packed is None else packed
            )
            continue
        theirs = next((prefix for prefix in in_block if rest.startswith(prefix)), None)
        ours = name if theirs is None else f"blocks.{number}.{in_block[theirs]}{rest.removeprefix(theirs)}"
        if layer_scale or not _GAMMA.fullmatch(ours) or not bool((tensor == 1.0).all()):
            named[ours] = tensor
    return named


def _packed(tensors: Mapping[str, Tensor], number: str, rest: str) -> Tensor | None:
    """Queries, keys and values of a block as one tensor; None where one of the three is missing or unlike the rest."""
    leaf = rest.rpartition(".")[2]
    parts = [tensors.get(f"encoder.layer.{number}.{kind}{leaf}") for kind in _QKV]
    found = [part for part in parts if part is not None]
    if len(found) < len(_QKV) or len({part.shape for part in found}) > 1:
        return None
    return torch.cat(found)
