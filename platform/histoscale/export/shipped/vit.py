"""The network of this folder in plain torch: needs torch and safetensors; `preprocess` needs Pillow and numpy, too.

    from vit import Vit, preprocess
    model = Vit("FOLDER")
    embeddings = model.embed(torch.stack([preprocess(model, image) for image in images]))

Every tensor of the file is used, and each must be there in its shape, or the folder is refused.
Shape suffixes: B images, T tokens (class, registers, patches), D width, H heads, C width of a head.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")


class Vit(nn.Module):
    """A vision transformer.

    Args:
        folder: Of the export, in either layout.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape; names them.
    """

    def __init__(self, folder: str | Path = ".") -> None:
        super().__init__()
        config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
        weights = load_file(Path(folder) / "model.safetensors")
        if "model_args" in config:
            shape = config["model_args"]
            self.image_px, self.patch_px = shape["img_size"], shape["patch_size"]
            self.heads, self.registers, self.depth = shape["num_heads"], shape["reg_tokens"], shape["depth"]
            self.width, self.gated = shape["embed_dim"], "mlp_layer" in shape
            first_layer = round(shape["mlp_ratio"] * self.width)
            self.hidden = first_layer // 2 if self.gated else first_layer
            self.scaled, self.qk_norm = "init_values" in shape, shape.get("qk_norm", False)
        else:
            self.image_px, self.patch_px = config["image_size"], config["patch_size"]
            self.heads, self.registers = config["num_attention_heads"], config["num_register_tokens"]
            self.depth, self.width, self.gated = (
                config["num_hidden_layers"],
                config["hidden_size"],
                config["use_swiglu_ffn"],
            )
            plain = self.width * config["mlp_ratio"]
            self.hidden = (int(plain * 2 / 3) + 7) // 8 * 8 if self.gated else plain
            self.scaled, self.qk_norm = True, False
            weights = self._renamed(weights)
        self._require_shapes(weights)
        self.w = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(t) for name, t in weights.items()})
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Tokens [B, T, D] after the final norm, of normalised images [B, 3, h, w], sides in multiples of a patch."""
        patches = F.conv2d(images, self._w("patch_embed.proj.weight"), self._w("patch_embed.proj.bias"), self.patch_px)
        first = torch.cat([self._w("cls_token"), self._w("reg_token")], 1) if self.registers else self._w("cls_token")
        tokens = torch.cat([first.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        x = tokens + self._positions(patches.shape[2], patches.shape[3])
        for number in range(self.depth):
            at = f"blocks.{number}."
            x = x + self._scaled(at + "ls1.gamma", self._attention(at, self._norm(at + "norm1", x)))
            x = x + self._scaled(at + "ls2.gamma", self._mlp(at, self._norm(at + "norm2", x)))
        return self._norm("norm", x)

    @torch.inference_mode()
    def embed(self, images: Tensor) -> Tensor:
        """Embeddings [B, 2 D]: the class token, then the mean of the patch tokens."""
        tokens = self(images)
        return torch.cat([tokens[:, 0], tokens[:, 1 + self.registers :].mean(dim=1)], dim=1)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """[1, T, D]; for another grid than the trained one resampled bicubically with antialiasing, in fp32."""
        first, grid = self._w("pos_embed").tensor_split([1 + self.registers], dim=1)
        side = self.image_px // self.patch_px
        if (rows, columns) != (side, side):
            plane = grid.float().transpose(1, 2).reshape(1, -1, side, side)
            plane = F.interpolate(plane, size=(rows, columns), mode="bicubic", antialias=True)
            grid = plane.flatten(2).transpose(1, 2).to(first.dtype)
        return torch.cat([first, grid], dim=1)

    def _attention(self, at: str, x: Tensor) -> Tensor:
        qkv = self._linear(at + "attn.qkv", x).view(*x.shape[:2], 3, self.heads, -1)  # [B, T, 3, H, C]
        q, k, v = qkv.unbind(dim=2)
        if self.qk_norm:
            q, k = self._norm(at + "attn.q_norm", q), self._norm(at + "attn.k_norm", k)
        scores = torch.einsum("bthc,bshc->bhts", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bhts,bshc->bthc", scores.softmax(dim=-1), v)
        return self._linear(at + "attn.proj", mixed.flatten(2))

    def _mlp(self, at: str, x: Tensor) -> Tensor:
        x = self._linear(at + "mlp.fc1", x)
        gate = x[..., : self.hidden]  # all of it where there is no gate
        x = F.silu(gate) * x[..., self.hidden :] if self.gated else F.gelu(gate)
        return self._linear(at + "mlp.fc2", x)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._w(name + ".weight"), self._w(name + ".bias"), 1e-6)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._w(name + ".weight"), self._w(name + ".bias"))

    def _scaled(self, name: str, x: Tensor) -> Tensor:
        return x * self._w(name) if self.scaled else x

    def _w(self, name: str) -> Tensor:
        tensor: Tensor = self.w[name.replace(".", "/")]
        return tensor

    def _renamed(self, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of transformers' layout under timm's names; a name that is not known stays."""
        plain = {
            "embeddings.cls_token": "cls_token",
            "embeddings.register_tokens": "reg_token",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
            "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
            "layernorm.weight": "norm.weight",
            "layernorm.bias": "norm.bias",
        }
        inside = {
            "attention.output.dense": "attn.proj",
            "layer_scale1.lambda1": "ls1.gamma",
            "layer_scale2.lambda1": "ls2.gamma",
            "mlp.weights_in": "mlp.fc1",
            "mlp.weights_out": "mlp.fc2",
        }
        ours: dict[str, Tensor] = {}
        for name, tensor in theirs.items():
            if name == "embeddings.mask_token":  # of training alone
                continue
            if layer := _LAYER.fullmatch(name):
                number, rest = layer.groups()
                for old, new in inside.items():
                    rest = rest.replace(old, new)
                ours[f"blocks.{number}.{rest}"] = tensor
            else:
                ours[plain.get(name, name)] = tensor
        for number in range(self.depth):
            for leaf in ("weight", "bias"):
                names = [f"blocks.{number}.attention.attention.{part}.{leaf}" for part in ("query", "key", "value")]
                if all(name in ours for name in names):
                    ours[f"blocks.{number}.attn.qkv.{leaf}"] = torch.cat([ours.pop(name) for name in names])
        if not self.registers:
            ours.pop("reg_token", None)
        elif "pos_embed" in ours:  # theirs adds no position to registers
            at = ours["pos_embed"]
            ours["pos_embed"] = torch.cat([at[:, :1], at.new_zeros(1, self.registers, self.width), at[:, 1:]], dim=1)
        return ours

    def _require_shapes(self, weights: dict[str, Tensor]) -> None:
        width, patches = self.width, (self.image_px // self.patch_px) ** 2
        wanted: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, width),
            "pos_embed": (1, 1 + self.registers + patches, width),
            "patch_embed.proj.weight": (width, 3, self.patch_px, self.patch_px),
            "patch_embed.proj.bias": (width,),
            "norm.weight": (width,),
            "norm.bias": (width,),
        }
        if self.registers:
            wanted["reg_token"] = (1, self.registers, width)
        layers = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": ((2 if self.gated else 1) * self.hidden, width),
            "mlp.fc2": (width, self.hidden),
        }
        for number in range(self.depth):
            at = f"blocks.{number}."
            for name, shape in layers.items():
                wanted |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
            for name in ("norm1", "norm2"):
                wanted |= {f"{at}{name}.{leaf}": (width,) for leaf in ("weight", "bias")}
            if self.qk_norm:
                norms = [f"{at}attn.{name}.{leaf}" for name in ("q_norm", "k_norm") for leaf in ("weight", "bias")]
                wanted |= {name: (width // self.heads,) for name in norms}
            if self.scaled:
                wanted |= {f"{at}ls1.gamma": (width,), f"{at}ls2.gamma": (width,)}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        if wrong:
            lines = [f"{n}: {found.get(n, 'missing')}, expected {wanted.get(n, 'no such tensor')}" for n in wrong[:5]]
            raise ValueError(f"{len(wrong)} tensors of model.safetensors do not fit: {'; '.join(lines)}")


def preprocess(model: Vit, image: Any) -> Tensor:  # noqa: ANN401 - Pillow is imported where it is needed alone
    """A Pillow image as the model wants it, [3, S, S]: cropped to a square, resized with antialiasing, normalised."""
    import numpy as np
    from PIL import Image, ImageOps

    side = (model.image_px, model.image_px)
    fitted = ImageOps.fit(image.convert("RGB"), side, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255.0
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
