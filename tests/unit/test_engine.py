"""What a recipe's precision means on which hardware."""

import pytest
import torch

from histoscale.config.recipe import Recipe
from histoscale.errors import TrainingError
from histoscale.train.engine import compute_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A GPU of some compute capability; a fake, since tests run without one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-32GB")


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)], indirect=True)
@pytest.mark.usefixtures("capability")
def test_bf16_is_refused_by_name_before_ampere() -> None:
    with pytest.raises(TrainingError, match=r"does not compute in bf16.*Tesla V100.*Ampere"):
        compute_dtype(Recipe(precision="bf16"), GPU)
    assert compute_dtype(Recipe(precision="auto"), GPU) == torch.float32
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
