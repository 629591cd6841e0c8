"""What a recipe's precision means on which hardware."""

import ctypes
from typing import Any, ClassVar

import pytest
import torch

from histoscale.config.decode import decode_recipe
from histoscale.config.recipe import Recipe
from histoscale.errors import TrainingError
from histoscale.models import build_ssl_net
from histoscale.models.vit import Block
from histoscale.train.engine import _keep_freed_memory, _tune, compute_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A GPU of some compute capability; a fake, since tests run without one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)], indirect=True)
@pytest.mark.usefixtures("capability")
def test_bf16_is_refused_by_name_before_ampere() -> None:
    for precision in ("bf16", "auto"):
        with pytest.raises(TrainingError, match=r"does not compute in bf16.*Tesla V100.*Ampere.*new --out"):
            compute_dtype(Recipe(precision=precision), GPU)
    assert compute_dtype(Recipe(precision="fp32"), GPU) == torch.float32


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], indirect=True)
@pytest.mark.usefixtures("capability")
def test_auto_is_bf16_from_ampere_on() -> None:
    assert compute_dtype(Recipe(precision="auto"), GPU) == torch.bfloat16
    assert compute_dtype(Recipe(precision="bf16"), GPU) == torch.bfloat16
    assert compute_dtype(Recipe(precision="fp32"), GPU) == torch.float32


def test_the_cpu_computes_in_fp32_unless_told() -> None:
    assert compute_dtype(Recipe(precision="auto"), CPU) == torch.float32
    assert compute_dtype(Recipe(precision="bf16"), CPU) == torch.bfloat16


def test_checkpointing_and_compilation_reach_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(Block, "compile", lambda block: compiled.append(block))
    sections: dict[str, Any] = {
        "model": {"arch": "vit_test14"},
        "heads": {"dino_prototypes": 8, "ibot_prototypes": 8, "hidden_dim": 8},
    }
    for tuned in (False, True):
        cluster = {"activation_checkpointing": tuned, "compile": tuned}
        recipe = decode_recipe({**sections, "cluster": cluster})
        net = build_ssl_net(recipe)
        _tune(net, recipe)
        assert net.backbone.checkpointing is tuned
        assert len(compiled) == (len(net.backbone.blocks) if tuned else 0)


def test_freed_memory_is_kept_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeLibrary:
        """A C library that only notes what it is told."""

        told: ClassVar[dict[int, int]] = {}

        def mallopt(self, parameter: int, value: int) -> int:
            self.told[parameter] = value
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary())
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    _keep_freed_memory()
    assert FakeLibrary.told == {-3: 2**31 - 1}
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    _keep_freed_memory()
