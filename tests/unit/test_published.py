"""Published weights give timm's tokens in either layout, and every tensor that does not fit is named."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.conftest import S3Server
from torch import Tensor, nn

from histoscale.config.archs import ARCHS, Arch
from histoscale.errors import ModelError, StorageError
from histoscale.export.parity import is_usable
from histoscale.export.timm_import import import_timm
from histoscale.models import VisionTransformer
from histoscale.models.published import PublishedWeights, load_published
from histoscale.storage import open_store

needs_timm = pytest.mark.skipif(not is_usable("timm"), reason="timm does not import here")
TIMM_NAMES = {
    "vit_s14_scaled": "vit_small_patch14_dinov2",
    "vit_s14_reg4": "vit_small_patch14_reg4_dinov2",
    "vit_giant14": "vit_giant_patch14_dinov2",
    "vit_giant14_reg4": "vit_giant_patch14_reg4_dinov2",
}
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Arch:
    """An arch of no other size, known as vit_small_test."""
    arch = Arch(patch_px=14, depth=2, width=48, heads=3)
    monkeypatch.setitem(ARCHS, "vit_small_test", arch)
    return arch


def few_blocks(name: str) -> tuple[Arch, dict[str, int]]:
    """An arch with two blocks, the giant ones thinner, and what timm's factory must be told for it."""
    width = 384 if ARCHS[name].width == 384 else 192
    arch = replace(ARCHS[name], depth=2, width=width, heads=6)
    return arch, {"depth": 2, "embed_dim": width, "num_heads": 6}


def lively(net: nn.Module, seed: int = 0) -> nn.Module:
    """The net with every parameter far from its neutral value, of order one after every layer."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim in (2, 4) else 4
            mean = 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")) else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * fan_in**-0.5 + mean)
    return net.eval()


def state_of(arch: Arch, side_px: int = 98, qk_norm: bool = False) -> State:
    """Random weights in our layout, which is timm's with rows for class and registers."""
    return dict(lively(VisionTransformer(arch, side_px, qk_norm=qk_norm)).state_dict())


def in_metas_layout(timm_state: State, registers: int, gated: bool, chunk: int | None = None) -> State:
    """The same network as Meta's code stores it, with a class row of the position embedding and a mask token."""
    width = timm_state["cls_token"].shape[-1]
    meta = {"mask_token": torch.full((1, width), 7.0), **timm_state}
    if registers:
        # timm's class token has the class row of the embedding within; here the two are apart again.
        row = torch.linspace(-1.0, 1.0, width)
        meta["register_tokens"] = meta.pop("reg_token")
        meta["cls_token"] = timm_state["cls_token"] - row
        meta["pos_embed"] = torch.cat([row.expand(1, 1, -1), timm_state["pos_embed"]], dim=1)
    for name in [name for name in meta if name.startswith("blocks.")]:
        _, block, *rest = name.split(".")
        if gated and rest[:2] == ["mlp", "fc1"]:
            rest = ["mlp", "w12", rest[2]]
        elif gated and rest[:2] == ["mlp", "fc2"]:
            rest = ["mlp", "w3", rest[2]]
        place = [block] if chunk is None else [str(int(block) // chunk), block]
        meta[".".join(["blocks", *place, *rest])] = meta.pop(name)
    return meta


def saved(state: Any, path: Path) -> str:
    """Save a state by the suffix of a path; returns the path as text."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


def tokens_of(loaded: PublishedWeights, arch: Arch, side_px: int, images: Tensor) -> Tensor:
    backbone = VisionTransformer(arch, side_px).eval()
    backbone.load_state_dict(loaded.state, strict=True)
    with torch.inference_mode():
        return backbone(images)


@needs_timm
@pytest.mark.parametrize(("layout", "suffix"), [("timm", ".safetensors"), ("meta", ".pth")])
@pytest.mark.parametrize("name", list(TIMM_NAMES))
def test_all_tokens_are_timms_at_the_grid_of_the_file_and_at_ours(
    tmp_path: Path, name: str, layout: str, suffix: str
) -> None:
    arch, size = few_blocks(name)
    factory = import_timm().create_model
    theirs = lively(factory(TIMM_NAMES[name], num_classes=0, global_pool="", dynamic_img_size=True, **size))
    state = dict(theirs.state_dict())
    if layout == "meta":
        state = in_metas_layout(state, arch.registers, arch.ffn == "swiglu")
    path = saved(state, tmp_path / f"weights{suffix}")
    for side_px, resized in ((518, None), (224, 37)):
        images = torch.randn(1, 3, side_px, side_px, generator=torch.Generator().manual_seed(side_px))
        with torch.inference_mode():
            expected = theirs.forward_features(images)
        loaded = load_published(path, arch, side_px)
        got = tokens_of(loaded, arch, side_px, images)
        assert (loaded.layout, loaded.resized_from_grid, loaded.fresh) == (layout, resized, ())
        assert loaded.unused == (("mask_token",) if layout == "meta" else ())
        assert loaded.sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
        assert (got - expected).abs().max() <= 1e-5
        assert expected.std() > 0.1


def bicubic_weights(old: int, new: int) -> np.ndarray:
    """Matrix [new, old] of Keys' cubic with a = -1/2, stretched over what one new place covers: plain arithmetic."""
    stretch = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    distance = np.abs(np.arange(old)[None] - centres[:, None]) / stretch
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("old", "new"), [(37, 16), (37, 28), (7, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positions_are_resampled_bicubically_with_antialiasing(
    tmp_path: Path, small: Arch, old: int, new: int, dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in state_of(small, 14 * old).items()}
    loaded = load_published(saved(state, tmp_path / "w.safetensors"), small, 14 * new)
    plane = state["pos_embed"][0, 1:].double().numpy().reshape(old, old, -1)
    weights = bicubic_weights(old, new)
    expected = np.einsum("yi,xj,ijd->yxd", weights, weights, plane).reshape(new * new, -1)
    assert np.abs(loaded.state["pos_embed"][0, 1:].numpy() - expected).max() <= 1e-5
    assert torch.equal(loaded.state["pos_embed"][0, 0], state["pos_embed"][0, 0].float())
    assert {tensor.dtype for tensor in loaded.state.values()} == {torch.float32}


def test_a_square_grid_keeps_rows_and_columns_apart(tmp_path: Path, small: Arch) -> None:
    state = state_of(small, 14 * 37)
    rows = torch.arange(37.0).repeat_interleave(37)
    state["pos_embed"] = torch.cat([torch.zeros(1), rows])[None, :, None].repeat(1, 1, 48)
    loaded = load_published(saved(state, tmp_path / "w.pth"), small, 224)
    plane = loaded.state["pos_embed"][0, 1:, 5].view(16, 16)
    assert (plane - plane[:, :1]).abs().max() <= 1e-4
    assert (plane[1:, 0] > plane[:-1, 0]).all()


def test_metas_class_row_goes_to_the_class_token_and_registers_get_none(tmp_path: Path, small: Arch) -> None:
    arch = replace(small, registers=4)
    state = state_of(arch)
    del state["reg_token"]
    state |= {"register_tokens": torch.ones(1, 4, 48), "mask_token": torch.ones(1, 48)}
    state["pos_embed"] = torch.arange(50.0)[None, :, None].repeat(1, 1, 48)
    loaded = load_published(saved(state, tmp_path / "w.pth"), arch, 98)
    assert loaded.state["pos_embed"][0, :, 3].tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, *map(float, range(1, 50))]
    assert torch.equal(loaded.state["reg_token"], torch.ones(1, 4, 48))
    assert loaded.layout == "meta"


def test_timms_embedding_without_class_row_leaves_class_and_registers_without(tmp_path: Path, small: Arch) -> None:
    arch = replace(small, registers=4)
    state = state_of(arch)
    state["pos_embed"] = torch.arange(1.0, 50.0)[None, :, None].repeat(1, 1, 48)
    loaded = load_published(saved(state, tmp_path / "w.pth"), arch, 98)
    assert loaded.state["pos_embed"][0, :, 3].tolist() == [0.0] * 5 + list(map(float, range(1, 50)))


def test_weights_in_our_own_layout_come_back_as_they_are(tmp_path: Path, small: Arch) -> None:
    arch = replace(small, registers=4)
    state = state_of(arch, qk_norm=True)
    loaded = load_published(saved(state, tmp_path / "w.safetensors"), arch, 98, qk_norm=True)
    assert loaded.state.keys() == state.keys()
    assert all(torch.equal(loaded.state[name], state[name]) for name in state)
    assert (loaded.layout, loaded.resized_from_grid, loaded.unused, loaded.fresh) == ("timm", None, (), ())


@pytest.mark.parametrize(
    ("wrap", "unused"),
    [
        (lambda backbone: backbone, ("mask_token",)),
        (
            lambda backbone: {"model": backbone, "iteration": 5, "optimizer": {"lr": 1.0}},
            ("iteration", "mask_token", "optimizer"),
        ),
        (
            lambda backbone: {
                "teacher": {f"backbone.{name}": tensor for name, tensor in backbone.items()}
                | {"dino_head.last_layer.weight": torch.ones(3)}
            },
            ("backbone.mask_token", "dino_head.last_layer.weight"),
        ),
        (
            lambda backbone: {
                "model": {f"teacher.backbone.{name}": tensor for name, tensor in backbone.items()}
                | {f"student.backbone.{name}": tensor + 1 for name, tensor in backbone.items()}
            },
            None,
        ),
    ],
    ids=["plain", "model", "teacher-backbone", "both-in-model"],
)
def test_training_checkpoints_give_their_teacher(
    tmp_path: Path, small: Arch, wrap: Callable[[State], Any], unused: tuple[str, ...] | None
) -> None:
    state = state_of(small)
    chunked = in_metas_layout(state, 0, gated=False, chunk=1)
    assert "blocks.1.1.attn.qkv.weight" in chunked
    loaded = load_published(saved(wrap(chunked), tmp_path / "w.pth"), small, 98)
    assert loaded.state.keys() == state.keys()
    assert all(torch.equal(loaded.state[name], state[name]) for name in state)
    others = {f"student.backbone.{name}" for name in chunked} | {"teacher.backbone.mask_token"}
    assert loaded.unused == (tuple(sorted(others)) if unused is None else unused)


def test_a_classifier_is_left_and_named(tmp_path: Path, small: Arch) -> None:
    state = state_of(small) | {"head.weight": torch.ones(5, 48), "head.bias": torch.ones(5)}
    loaded = load_published(saved(state, tmp_path / "w.pth"), small, 98)
    assert loaded.unused == ("head.bias", "head.weight")


def test_norms_of_queries_and_keys_may_start_afresh_and_are_named(tmp_path: Path, small: Arch) -> None:
    loaded = load_published(saved(state_of(small), tmp_path / "w.pth"), small, 98, qk_norm=True)
    assert loaded.fresh == tuple(
        f"blocks.{block}.attn.{norm}_norm.{leaf}" for block in (0, 1) for norm in "kq" for leaf in ("bias", "weight")
    )
    wanted = VisionTransformer(small, 98, qk_norm=True).state_dict().keys()
    assert loaded.state.keys() | set(loaded.fresh) == wanted


def refusal(path: str, arch: Arch, **keywords: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_published(path, arch, 98, **keywords)
    return str(caught.value)


@pytest.mark.parametrize(
    ("holds", "wanted", "expected"),
    [
        ("vit_ti14", "vit_small_test", r"tensor cls_token .*\[1, 1, 192\]; .*shape \[1, 1, 48\].* to vit_ti14\."),
        ("vit_s14", "vit_s14_scaled", r"weights lack the tensor blocks.0.ls1.gamma .*\[384\].* to vit_s14\."),
        ("vit_s14_scaled", "vit_s14", r"no place .* blocks.0.ls1.gamma .*\[384\].* to vit_s14_scaled\."),
        ("vit_s14_scaled", "vit_s16", r"patch_embed.proj.weight .*14, 14\]; .*16, 16\].* to vit_s14_scaled\."),
        ("vit_s14_scaled", "vit_s14_reg4", r"lack the tensor reg_token .*\[1, 4, 384\].* to vit_s14_scaled\."),
        ("vit_s14_reg4", "vit_s14_scaled", r"no place .* reg_token .*\[1, 4, 384\].* to vit_s14_reg4\."),
    ],
)
def test_another_network_is_refused_with_the_arch_that_fits(
    tmp_path: Path, small: Arch, holds: str, wanted: str, expected: str
) -> None:
    with torch.device("meta"):
        shapes = VisionTransformer(ARCHS[holds], 98).state_dict()
    zeros = {name: torch.zeros(tensor.shape) for name, tensor in shapes.items()}
    path = saved(zeros, tmp_path / "w.safetensors")
    assert re.search(expected, refusal(path, ARCHS[wanted]))


def test_another_depth_is_refused_with_the_arch_that_fits(
    tmp_path: Path, small: Arch, monkeypatch: pytest.MonkeyPatch
) -> None:
    deeper = replace(small, depth=3)
    monkeypatch.setitem(ARCHS, "vit_deeper_test", deeper)
    text = refusal(saved(state_of(deeper), tmp_path / "deeper.pth"), small)
    assert re.search(r"no place .* blocks.2.norm1.weight .*\[48\].*to vit_deeper_test\.", text)
    text = refusal(saved(state_of(small), tmp_path / "small.pth"), deeper)
    assert re.search(r"lack the tensor blocks.2.norm1.weight .*\[48\].*to vit_small_test\.", text)


def test_norms_of_queries_and_keys_that_the_model_lacks_are_refused(tmp_path: Path, small: Arch) -> None:
    text = refusal(saved(state_of(small, qk_norm=True), tmp_path / "w.pth"), small)
    assert "attn.q_norm.weight" in text
    assert text.endswith("Set model.arch to vit_small_test and model.qk_norm to true.")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state | {"rope.periods": torch.ones(4)}, r"no place for the tensor rope.periods .*\[4\]"),
        (lambda state: without(state, "norm.bias"), r"lack the tensor norm.bias .*shape \[48\]"),
        (lambda state: without(state, "blocks.1.mlp.fc2.weight"), "lack the tensor blocks.1.mlp.fc2.weight"),
        (lambda state: without(state, "blocks.0.attn.q_norm.bias"), "lack the tensor blocks.0.attn.q_norm.bias"),
        (
            lambda state: state | {"norm.bias": torch.ones(47)},
            "tensor norm.bias .*\\[47\\]; expected the shape \\[48\\]",
        ),
        (lambda state: state | {"pos_embed": torch.ones(50, 48)}, "tensor pos_embed .*\\[50, 48\\]"),
        (lambda state: state | {"pos_embed": torch.ones(1, 50, 40)}, "pos_embed .*40\\]; expected .*\\[1, 50, 48\\]"),
        (lambda state: without(state, "pos_embed"), "lack the tensor pos_embed.* a learnt position embedding"),
        (lambda state: state | {"blocks.0.1.norm1.bias": torch.ones(48)}, "two tensors .*one for blocks.1.norm1.bias"),
        (lambda state: without(state, "cls_token"), "no class token"),
        (lambda state: {}, "no class token \\(got 'no tensor at all'"),
        (lambda state: state | {"epoch": 3}, "no state dict"),
        (lambda state: list(state.values()), "no state dict \\(got 'list'"),
    ],
)
def test_every_tensor_out_of_place_is_named(
    tmp_path: Path, small: Arch, change: Callable[[State], Any], expected: str
) -> None:
    path = saved(change(state_of(small, qk_norm=True)), tmp_path / "w.pth")
    assert re.search(expected, refusal(path, small, qk_norm=True))


def without(state: State, name: str) -> State:
    return {other: tensor for other, tensor in state.items() if other != name}


@pytest.mark.parametrize(
    ("layout", "rows", "grids"),
    [
        ("timm", 60, 0),  # neither 60 nor 55 is a square
        ("timm", 50, 0),  # Meta's single row under timm's names
        ("timm", 9, 2),  # a grid of 3, or of 2 behind rows for the class and four registers
        ("meta", 49, 0),
        ("meta", 54, 0),
    ],
)
def test_a_position_embedding_that_could_be_read_in_no_or_two_ways_is_refused(
    tmp_path: Path, small: Arch, layout: str, rows: int, grids: int
) -> None:
    arch = replace(small, registers=4)
    state = state_of(arch) | {"pos_embed": torch.ones(1, rows, 48)}
    if layout == "meta":
        state["register_tokens"] = state.pop("reg_token")
    text = refusal(saved(state, tmp_path / "w.pth"), arch)
    assert f"fits {grids} square grids" in text
    assert f"{rows} rows in the layout of {layout}" in text


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"PK\x03\x04 torn"])
def test_a_file_that_is_damaged_is_refused(tmp_path: Path, small: Arch, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    assert "cannot be read" in refusal(str(path), small)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, small: Arch) -> None:
    path = saved({"cls_token": Path("x"), "loader": print}, tmp_path / "w.pth")
    assert "cannot be read" in refusal(path, small)


def test_a_torn_file_is_refused(tmp_path: Path, small: Arch) -> None:
    for suffix in (".safetensors", ".pth"):
        path = Path(saved(state_of(small), tmp_path / f"w{suffix}"))
        path.write_bytes(path.read_bytes()[:-1000])
        assert "cannot be read" in refusal(str(path), small)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path, small: Arch) -> None:
    assert "a .safetensors or .pth file" in refusal(str(tmp_path / "w.npz"), small)


def test_a_missing_file_is_named(tmp_path: Path, small: Arch) -> None:
    with pytest.raises(StorageError, match=r"absent\.pth"):
        load_published(str(tmp_path / "absent.pth"), small, 98)


def test_paths_and_uris_lead_to_the_same_weights(tmp_path: Path, small: Arch, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(state_of(small), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    assert len({load_published(uri, small, 98).sha256 for uri in (path, "w.safetensors", f"file://{path}")}) == 1


def test_weights_come_from_a_bucket(tmp_path: Path, small: Arch, s3_env: S3Server) -> None:
    path = Path(saved(state_of(small), tmp_path / "w.safetensors"))
    root = f"s3://{s3_env.make_bucket()}/models"
    open_store(root).upload(path, path.name)
    from_bucket, from_disk = load_published(f"{root}/{path.name}", small, 98), load_published(str(path), small, 98)
    assert from_bucket.sha256 == from_disk.sha256
    assert all(torch.equal(tensor, from_disk.state[name]) for name, tensor in from_bucket.state.items())
