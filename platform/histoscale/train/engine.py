"""The student inside one DeepSpeed engine: ZeRO 1, 2 or 3 at any world size, with accumulation managed by us.

A step's loss is a sum over replicas, and so is its gradient. No replica's loss is scaled by the world size on the way:
bf16 would round its gradient otherwise, unless the size is a power of two.

DeepSpeed is imported on first use: it takes seconds, and only training needs it.
"""

import contextlib
import ctypes
import io
import logging
import math
import os
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from histoscale.config.recipe import Recipe
from histoscale.errors import NonFiniteError, TrainingError
from histoscale.train.groups import parameter_groups
from histoscale.train.schedules import StepSettings

_BF16_CAPABILITY = (8, 0)  # Ampere
# Environment variable -> number and value of glibc's mallopt: from which size on memory is mapped anew (the largest
# that can be said), and how much freed memory is given back (-1: none).
_GLIBC_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": (-3, 2**31 - 1), "MALLOC_TRIM_THRESHOLD_": (-1, -1)}


class StudentEngine:
    """A network under ZeRO. The caller has initialised `torch.distributed` and set the current CUDA device, if any.

    Args:
        network: The student with its initial weights, the same on every rank.
        recipe: Its `cluster.zero_stage`, `optim` and `precision` are used.
        device: Where to train.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, device: torch.device) -> None:
        self.device = device
        self.dtype = compute_dtype(recipe, device)
        self.world_size = dist.get_world_size()
        network.to(device)
        _tune(network, recipe)
        if device.type == "cpu":
            _keep_freed_memory()
        groups = parameter_groups(network, recipe.optim)
        optimizer = torch.optim.AdamW(groups, lr=recipe.optim.lr, betas=recipe.optim.betas, fused=True)
        deepspeed, config = _import_deepspeed(device), _config(recipe, self.dtype)
        with contextlib.redirect_stdout(io.StringIO()):  # its ZeRO 1 in bf16 prints tables of memory
            self.deepspeed = deepspeed.initialize(
                model=network, optimizer=optimizer, config=config, dist_init_required=False
            )[0]
        self._averages = recipe.cluster.zero_stage == 3
        if self._averages:
            # ZeRO 3 has no sum. It undoes this scale in fp32, as it clips, and so its mean over the ranks becomes one.
            self.deepspeed.optimizer.override_loss_scale(1.0 / self.world_size)

    def forward(self, *inputs: Tensor | None, **options: bool) -> dict[str, Tensor]:
        """The network's outputs, for what it takes; every rank must call this equally often in a step."""
        outputs: dict[str, Tensor] = self.deepspeed(*inputs, **options)
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-step's loss to that of the step."""
        # The factor meets the scale of the same size before anything is rounded to bf16.
        self.deepspeed.backward(loss * self.world_size if self._averages else loss, scale_wrt_gas=False)

    def step(self, settings: StepSettings) -> float:
        """Update the weights; returns the global gradient norm before clipping.

        Raises:
            NonFiniteError: A gradient is not finite; the weights are as before.
        """
        for group in self.deepspeed.optimizer.param_groups:
            frozen = group["last_layer"] and settings.last_layer_frozen
            group["lr"] = 0.0 if frozen else settings.lr * group["lr_factor"]
            group["weight_decay"] = settings.weight_decay if group["decays"] else 0.0
        self.deepspeed.step()
        norm = float(self.deepspeed.get_global_grad_norm())
        if not self.deepspeed.was_step_applied() or not math.isfinite(norm):
            raise NonFiniteError(
                "the gradient is not finite, so no update was made",
                value=norm,
                expected="a finite norm",
                remedy="start another run, with a new --out and a lower optim.lr or precision=fp32",
                measured={"grad_norm": norm},
            )
        return norm

    def close(self) -> None:
        """Let DeepSpeed take off the hooks that hold its state: the garbage collector then frees it.

        Under ZeRO 3 they stay, and under ZeRO 1 the weights do.
        """
        self.deepspeed.destroy()


def _tune(network: nn.Module, recipe: Recipe) -> None:
    """Trade time for memory, or start-up for speed, in the blocks of the backbone."""
    backbone: Any = network.get_submodule("backbone")
    backbone.checkpointing = recipe.cluster.activation_checkpointing
    if recipe.cluster.compile:
        for block in backbone.blocks:
            block.compile()


def _keep_freed_memory() -> None:
    """Let the C library use freed tensors of any size again, as PyTorch does on a GPU.

    By default glibc maps a tensor of more than 32 MB anew each time, and the system clears its pages. What the user has
    set in the environment stands; another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for variable, (parameter, value) in _GLIBC_THRESHOLDS.items():
        if mallopt is not None and variable not in os.environ:
            mallopt(parameter, value)


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """What the network computes in: `auto` is bf16 on a GPU, fp32 elsewhere.

    Raises:
        TrainingError: It would be bf16 and the GPU has none.
    """
    on_gpu = device.type == "cuda"
    wants_bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpu)
    if wants_bf16 and on_gpu and torch.cuda.get_device_capability(device) < _BF16_CAPABILITY:
        raise TrainingError(
            "this GPU does not compute in bf16",
            value=torch.cuda.get_device_name(device),
            expected="Ampere or newer (A100, L4, H100, ...)",
            remedy="set precision=fp32 and a new --out, or run on such a GPU",
        )
    return torch.bfloat16 if wants_bf16 else torch.float32


def _config(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    stage = recipe.cluster.zero_stage
    return {
        "train_micro_batch_size_per_gpu": recipe.batch.per_replica,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": recipe.optim.clip_norm,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        # The default accumulates in bf16, where the sum depends on how replicas are spread over ranks.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }


def _import_deepspeed(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read at import
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    # An all-reduce for ranks of one machine, compiled on first use: training machines need no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist.get_backend(), verbose=False)
    module: ModuleType = deepspeed
    return module
