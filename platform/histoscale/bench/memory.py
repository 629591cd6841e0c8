"""How far the forecast of a rank's memory is from what a step takes, over ZeRO stages, precisions and workers.

Each case runs in processes of its own, and takes two steps of a ViT-S/14: in pretraining, or as the student of a ViT-B,
by its heads or its features. On the CPU a rank's memory is what the system
holds for it beyond what it held before the trainer was built; pages that belong to files do not count. The C library is
told to give back what is freed. On a GPU it is what PyTorch has allocated. Nothing here needs Ray.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from histoscale.bench.figure import Figure
from histoscale.bench.step import DTYPES, Tiles
from histoscale.config.archs import ARCHS
from histoscale.config.decode import decode_recipe, dump_recipe
from histoscale.config.recipe import Recipe
from histoscale.models import VisionTransformer
from histoscale.models.weights import initialise
from histoscale.sampling.replicas import replicas_of
from histoscale.storage import open_store
from histoscale.train.memory import forecast
from histoscale.train.trainer import Trainer, build_trainer

Mode: TypeAlias = Literal["pretraining", "heads", "features"]

_STEPS = 2
_SAMPLE_S = 0.002
_TIMEOUT_S = 900.0
_TEACHERS: dict[Mode, str] = {
    "heads": "vit_b14",
    "features": "vit_b16",
}  # the latter sees a coarser grid than its student
# A fixed threshold: otherwise the C library raises it with every large tensor that is freed, and keeps later ones.
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Case:
    """One run that is measured."""

    zero_stage: int
    workers: int
    precision: str
    checkpointing: bool
    device: str
    mode: Mode = "pretraining"

    def recipe(self, arch: str = "vit_s14", prototypes: int = 4096, local_count: int = 8) -> Recipe:
        """Two replicas of two tiles: about as many bytes of activations as of state."""
        return decode_recipe(
            {
                "precision": self.precision,
                "batch": {"tiles": 4, "replicas": 2},
                "model": {"arch": arch, "drop_path": 0.0},
                "heads": {"dino_prototypes": prototypes, "ibot_prototypes": prototypes},
                "crops": {"local_count": local_count},
                "schedule": {"images": 1_000_000},
                "cluster": {
                    "zero_stage": self.zero_stage,
                    "workers": self.workers,
                    "activation_checkpointing": self.checkpointing,
                },
            }
        )

    def student(self, folder: Path) -> Recipe:
        """What is measured; in distillation with a teacher in the folder."""
        if self.mode == "pretraining":
            return self.recipe()
        if self.mode == "heads":
            return decode_recipe(self.recipe().model_dump() | {"distill": {"teacher": str(folder / "teacher")}})
        file = {"teacher": str(folder / "teacher.safetensors"), "arch": _TEACHERS[self.mode], "licence": "random"}
        return decode_recipe(self.recipe(local_count=0).model_dump() | {"distill": {"mode": self.mode, **file}})


def cases(device: str) -> list[Case]:
    """All stages, numbers of workers that there are devices for, precisions, with and without checkpointing.

    Distillation runs on as many workers as there can be, without checkpointing.
    """
    workers = (1, 2) if device == "cpu" or torch.cuda.device_count() > 1 else (1,)
    pretraining = [Case(*each, device) for each in product((1, 2, 3), workers, DTYPES, (False, True))]
    return pretraining + [
        Case(stage, workers[-1], precision, False, device, mode)
        for stage, precision, mode in product((1, 2, 3), DTYPES, _TEACHERS)
    ]


def memory(device: str = "cpu") -> Iterator[Figure]:
    """`memory.prediction_error`: the largest relative error of the forecast; every case stands in the details."""
    rows = [compare(case) for case in cases(device)]
    worst = max(abs(row["error"]) for row in rows)
    yield Figure("memory.prediction_error", worst, "share", details={"cases": rows})


def compare(case: Case) -> dict[str, Any]:
    """The forecast of a case beside what its first rank took."""
    recipe, teacher = case.student(Path("/")), None
    if case.mode != "pretraining":
        model = recipe.model.model_copy(update={"arch": _TEACHERS[case.mode]})
        teacher = recipe.model_copy(update={"model": model})
    on: Literal["cpu", "cuda"] = "cpu" if case.device == "cpu" else "cuda"
    predicted = forecast(recipe, case.workers, case.zero_stage, DTYPES[case.precision], on, teacher)
    measured = measure(case)
    return {
        **asdict(case),
        "predicted_bytes": predicted.total_bytes,
        "measured_bytes": measured,
        "error": predicted.total_bytes / measured - 1.0,
        "peak": predicted.peak,
        "items_bytes": dict(predicted.items),
    }


def measure(case: Case) -> int:
    """Peak bytes of the first rank of a case, which runs in processes of its own."""
    with tempfile.TemporaryDirectory(prefix="histoscale-bench-") as folder:
        command = [sys.executable, "-m", "histoscale.bench.memory", json.dumps(asdict(case)), folder]
        environment = {**os.environ, **_GIVE_BACK, "WORLD_SIZE": str(case.workers), "OMP_NUM_THREADS": "1"}
        ranks = []
        try:
            for rank in range(case.workers):
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL))
            for process in ranks:
                if process.wait(_TIMEOUT_S):
                    raise subprocess.CalledProcessError(process.returncode, command)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return int((Path(folder) / "measured").read_text())


def run_rank(case: Case, folder: Path) -> None:
    """One rank: a small net first, for the memory of the libraries themselves, then the case."""
    rank, workers = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu") if case.device == "cpu" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers)
    _take_steps(case.recipe("vit_test14", 64), device, folder / "small")
    _make_teacher(case, device, folder)
    gc.collect()
    with Peak(device) as peak:
        _take_steps(case.student(folder), device, folder / "run")
    dist.destroy_process_group()
    if rank == 0:
        (folder / "measured").write_text(str(peak.bytes))


def _make_teacher(case: Case, device: torch.device, folder: Path) -> None:
    """What the case distils from (collective): a run of one short step, or a file of weights as they are drawn."""
    if case.mode == "heads":
        recipe = replace(case, zero_stage=2, precision="fp32").recipe(_TEACHERS[case.mode], local_count=0)
        trainer = _take_steps(recipe, device, folder / "teacher", steps=1)
        trainer.save(1)
        trainer.student.close()
        open_store(folder / "teacher").put("recipe.yaml", dump_recipe(recipe).encode())
    elif case.mode == "features" and dist.get_rank() == 0:
        net = VisionTransformer(ARCHS[_TEACHERS[case.mode]], case.recipe().crops.global_px)
        initialise(net, seed=0)
        save_file(net.state_dict(), folder / "teacher.safetensors")
    dist.barrier()


def _take_steps(recipe: Recipe, device: torch.device, run: Path, steps: int = _STEPS) -> Trainer:
    trainer = build_trainer(recipe, device, open_store(run))
    mine = replicas_of(dist.get_rank(), dist.get_world_size(), recipe.batch.replicas)
    side_px, count = recipe.data.region_px, recipe.batch.per_replica
    pixels = np.random.default_rng(0).integers(0, 256, (count, side_px, side_px, 3), np.uint8)
    batches = [
        None if replica is None else Tiles(pixels, np.arange(count, dtype=np.int64) + count * replica, replica)
        for replica in mine
    ]
    for step in range(steps):
        trainer.step(step, batches)
    return trainer


class Peak:
    """The most memory that this process held while the context was open, beyond what it held before.

    Attributes:
        bytes: After the context.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self.bytes = 0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return self
        self._before = _anonymous_bytes()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._over.set()
        self._watcher.join()

    def _watch(self) -> None:
        over = False
        while not over:
            over = self._over.wait(_SAMPLE_S)
            self.bytes = max(self.bytes, _anonymous_bytes() - self._before)


def _anonymous_bytes() -> int:
    """Resident memory of this process that belongs to no file."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    run_rank(Case(**json.loads(sys.argv[1])), Path(sys.argv[2]))
